"""DINOv2: with registers and without, MLPs and gated ones; timm's has no mask token, transformers' has one."""

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from timm.layers import SwiGLUPacked
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
)

from parity import Case, Made, spread
from vit_references import LITTLE_HUB, hub_cases, pixels_of, timm_cases


def _logits(model: nn.Module, pixels: Tensor, stretched: bool) -> Tensor:
    return model(pixels).logits


def _class_token(model: nn.Module, pixels: Tensor, stretched: bool) -> Tensor:
    return model(pixels).pooler_output


_PLAIN, _REGISTERS = "transformers/dinov2", "transformers/dinov2_with_registers"
_OBLONG = (32, 72)
"""4×9 patches: transformers takes their table for that of 6×6, and cannot do with another number that is no square."""
_GATED = {"mlp_layer": SwiGLUPacked, "mlp_ratio": 2.5}
CASES = [
    *timm_cases("dinov2", "timm/vit", "vit_small_patch14_dinov2", classes=0),
    *timm_cases("dinov2_registers", "timm/vit", "vit_small_patch14_reg4_dinov2", classes=0),
    *timm_cases(
        "dinov2_giant", "timm/vit", "vit_giant_patch14_reg4_dinov2", classes=5, given={"mlp_ratio": 2.5}, **_GATED
    ),
    *hub_cases("dinov2", _PLAIN, Dinov2ForImageClassification, Dinov2Config, _logits, oblong=_OBLONG),
    *hub_cases("dinov2_giant", _PLAIN, Dinov2Model, Dinov2Config, _class_token, oblong=_OBLONG, use_swiglu_ffn=True),
    *hub_cases(
        "dinov2_registers",
        _REGISTERS,
        Dinov2WithRegistersForImageClassification,
        Dinov2WithRegistersConfig,
        _logits,
        oblong=_OBLONG,
        num_register_tokens=3,
    ),
    *hub_cases(
        "dinov2_registers_giant",
        _REGISTERS,
        Dinov2WithRegistersModel,
        Dinov2WithRegistersConfig,
        _class_token,
        oblong=_OBLONG,
        use_swiglu_ffn=True,
    ),
]


def _original(folder: Path, registers: int) -> Made:
    """What the original repository would save of the network that transformers has."""
    kind, config = (Dinov2WithRegistersModel, Dinov2WithRegistersConfig) if registers else (Dinov2Model, Dinov2Config)
    settings = {"num_register_tokens": registers} if registers else {}
    model = spread(kind(config(**LITTLE_HUB, **settings)))
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    tensors = {_renamed(name): tensor for name, tensor in stored.items() if "attention.attention" not in name}
    for layer in range(2):
        for part in ("weight", "bias"):
            names = (f"encoder.layer.{layer}.attention.attention.{kind}.{part}" for kind in ("query", "key", "value"))
            tensors[f"blocks.{layer}.attn.qkv.{part}"] = torch.cat([stored[name] for name in names])
    path, pixels = folder / "dinov2.pth", pixels_of((32, 32))
    torch.save(tensors, path)
    with torch.no_grad():
        return Made(path, {"num_heads": 3, "source_size": (32, 32)}, pixels, _class_token(model, pixels, False))


def _renamed(name: str) -> str:
    for theirs, original in (
        ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("embeddings.position_embeddings", "pos_embed"),
        ("embeddings.", ""),
        ("encoder.layer.", "blocks."),
        ("attention.output.dense", "attn.proj"),
        ("layer_scale1.lambda1", "ls1.gamma"),
        ("layer_scale2.lambda1", "ls2.gamma"),
        ("layernorm", "norm"),
    ):
        name = name.replace(theirs, original)
    return name


CASES += [
    Case(kind, "original", "square", "original/dinov2", partial(_original, registers=registers))
    for kind, registers in (("dinov2", 0), ("dinov2_registers", 3))
]
