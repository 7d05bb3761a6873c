"""DINOv2: gated MLPs, registers, and the names of the original repository."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from parity import spread
from sightline.checkpoints.load import load_bundle
from sightline.errors import UserError
from sightline.layers.encoder import SwiGLU
from sightline.network import create_model
from vit_references import LITTLE_HUB, pixels_of

LITTLE = {"image_size": 16, "patch_size": 8, "embed_dim": 6, "depth": 2, "num_heads": 2}


def test_a_gated_mlp_by_hand() -> None:
    mlp = SwiGLU(1, 2)
    with torch.no_grad():
        mlp.fc1.weight.copy_(torch.tensor([[1.0], [3.0]]))
        mlp.fc1.bias.copy_(torch.tensor([0.0, 1.0]))
        mlp.fc2.weight.fill_(2.0)
        mlp.fc2.bias.fill_(0.5)
    silu = 1 / (1 + torch.exp(torch.tensor(-1.0)))
    torch.testing.assert_close(mlp(torch.ones(1, 1)), (2 * silu * 4 + 0.5).reshape(1, 1))


def test_an_odd_number_of_hidden_units_has_no_halves() -> None:
    with pytest.raises(UserError, match="not even"):
        create_model("vit_giant_patch14_dinov2", mlp_dim=33, **LITTLE)


def test_registers_stand_between_class_token_and_patches_without_positions() -> None:
    network = create_model("dinov2_vits14_reg", **LITTLE)
    place, pixels = network.backbone.place, torch.randn(3, 3, 16, 16)
    tokens, _ = network.backbone.embed(pixels)
    assert tokens.prefix == 5
    torch.testing.assert_close(tokens.x[0, 1:5], place.register_tokens[0])
    torch.testing.assert_close(tokens.x[:, 0], (place.class_token + place.positions.table[:, :1])[0].expand(3, 6))
    assert place.register_tokens[0].unique(dim=0).shape == (4, 6)  # equal ones could never part


def _original(model: nn.Module, *, chunks: bool) -> dict[str, Tensor]:
    """transformers' tensors under facebookresearch/dinov2's names."""
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.mask_token": "mask_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.register_tokens": "register_tokens",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "layernorm.": "norm.",
        "attention.o_proj": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
        "mlp.down_proj": "mlp.w3",
        **{f"encoder.layer.{i}.": f"blocks.{'0.' * chunks}{i}." for i in range(2)},
    }
    found = {}
    for name, tensor in model.state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        found[name] = tensor
    joined = {"attention.{}_proj": ("attn.qkv", "qkv"), "mlp.{}_proj": ("mlp.w12", ("gate", "up"))}
    for pattern, (ours, parts) in joined.items():
        first = pattern.format(parts[0])
        for name in [n for n in found if first in n]:
            whole = torch.cat([found.pop(name.replace(first, pattern.format(part))) for part in parts])
            found[name.replace(first, ours)] = whole
    return found


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_original_s_names(tmp_path: Path, training: bool, gated: bool, registers: int) -> None:
    settings = {**LITTLE_HUB, "use_swiglu_ffn": gated}
    if registers:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**settings, num_register_tokens=registers))
    else:
        model = Dinov2Model(Dinov2Config(**settings))
    tensors = _original(spread(model), chunks=training)
    if training:
        tensors = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
        tensors |= {"dino_head.last_layer.weight": torch.ones(3, 2), "ibot_head.mlp.0.bias": torch.ones(2)}
        torch.save({"teacher": tensors}, tmp_path / "dinov2.pth")
    else:
        torch.save(tensors, tmp_path / "dinov2.pth")
    bundle = load_bundle(tmp_path / "dinov2.pth", num_heads=3)
    config = bundle.architecture.backbone
    assert config.position_resample == ("bicubic_antialias" if registers else "bicubic_factor")
    assert (config.mask_token, config.reg_tokens, config.mlp) == (True, registers, "swiglu" if gated else "mlp")
    assert len(bundle.coverage.dropped) == 2 * training
    with torch.no_grad():
        ours, theirs = bundle.network.backbone(pixels_of((32, 32))), model(pixels_of((32, 32)))
    torch.testing.assert_close(ours.x, theirs.last_hidden_state, atol=1e-5, rtol=1e-5)
