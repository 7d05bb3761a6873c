"""Hybrids: timm's, and the original's where its outputs are known (`tests/data/goldens/google-vit-hybrid`)."""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import HybridEmbed, StdConv2dSame
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from parity import Case, Made, spread

GOLDEN = Path(__file__).parents[1] / "data" / "goldens" / "google-vit-hybrid"
SMALL = {"embed_dim": 36, "depth": 2, "num_heads": 3, "num_classes": 11}


def drawn() -> dict[str, np.ndarray]:
    """The original's weights, as the recipe draws them."""
    recipe = json.loads((GOLDEN / "recipe.json").read_text())
    random = np.random.RandomState(recipe["seed"])
    tensors = {
        row["name"]: (row["mean"] + row["std"] * random.standard_normal(row["shape"])).astype(np.float32)
        for row in recipe["tensors"]
    }
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].tobytes())
    assert digest.hexdigest() == recipe["sha256"]
    return tensors


def golden(folder: Path) -> Made:
    np.savez(folder / "R_B_16.npz", **drawn())
    values = load_file(GOLDEN / "io.safetensors")
    return Made(folder / "R_B_16.npz", {}, values["input.pixels"], values["output.logits"])


def with_stages(size: tuple[int, int]) -> nn.Module:
    """timm's own parts, with half as many channels and fewer blocks than its named networks have."""
    backbone = ResNetV2(
        [1, 2, 1],
        (128, 256, 512),
        num_classes=0,
        global_pool="",
        stem_chs=32,
        stem_type="same",
        preact=False,
        conv_layer=partial(StdConv2dSame, eps=1e-8),
    )
    embed = partial(HybridEmbed, backbone=backbone)
    return VisionTransformer(img_size=size, patch_size=1, embed_layer=embed, **SMALL)


def stem_alone(size: tuple[int, int]) -> nn.Module:
    return timm.create_model("vit_tiny_r_s16_p8_224", img_size=size, patch_size=3, **SMALL)


def make(folder: Path, *, stem: bool, made_for: tuple[int, int], size: tuple[int, int]) -> Made:
    network = spread((stem_alone if stem else with_stages)(made_for))
    for name, parameter in network.named_parameters():
        if "backbone" in name:
            parameter.data *= 0.01  # so that each epsilon is felt
        elif "patch_embed.proj" in name:
            parameter.data *= 100
    save_file(network.state_dict(), folder / "model.safetensors")
    if size != made_for:
        network.set_input_size(img_size=size)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"num_heads": 3, "image_size": size, "source_size": made_for}
    with torch.no_grad():
        return Made(folder / "model.safetensors", options, pixels, network(pixels))


CASES = [
    Case("hybrid", "golden", "square", "google/hybrid", golden),
    *(
        Case(
            "hybrid stem" if stem else "hybrid",
            "timm",
            view,
            "timm/hybrid",
            partial(make, stem=stem, made_for=made_for, size=size),
        )
        for view, stem, made_for, size in (
            ("square", False, (64, 64), (64, 64)),
            ("square", True, (48, 48), (48, 48)),
            ("non-square", False, (48, 80), (48, 80)),
            ("non-square", True, (60, 36), (60, 36)),
            ("other size", False, (64, 64), (48, 96)),
            ("other size", True, (48, 48), (36, 72)),
        )
    ),
]
