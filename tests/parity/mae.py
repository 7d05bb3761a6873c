"""Encoders of masked autoencoders, which see every patch here."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from parity import Case, Made
from vit_references import hub_cases

GOLDEN = Path(__file__).parents[1] / "data" / "goldens" / "mae"


def _class_token(model: nn.Module, pixels: Tensor, stretched: bool) -> Tensor:
    # Rising noise keeps the patches in order; mask_ratio=0 keeps all of them.
    encoder = getattr(model, "vit", model)
    patches = pixels.shape[-2] * pixels.shape[-1] // 64
    noise = torch.arange(patches).repeat(2, 1) / patches
    return encoder(pixels, noise=noise, interpolate_pos_encoding=stretched).last_hidden_state[:, 0]


def _golden(view: str) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        case, io = json.loads((GOLDEN / "case.json").read_text()), load_file(GOLDEN / "io.safetensors")
        size = case["configuration"]["image_size"]
        options = {"image_size": size, "num_heads": case["configuration"]["num_heads"]}
        return Made(GOLDEN / "checkpoint.pth", options, io["input.pixels"], io["output.encoder_all_patches"][:, 0])

    return make


_HUB, _REST = "transformers/vit_mae", {"intermediate_size": 40, "mask_ratio": 0.0}
_DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
CASES = [
    *hub_cases("mae", _HUB, ViTMAEModel, ViTMAEConfig, _class_token, **_REST),
    *hub_cases(
        "mae_with_decoder", _HUB, ViTMAEForPreTraining, ViTMAEConfig, _class_token, square=True, **_REST, **_DECODER
    ),
    Case("mae", "original", "square", "original/mae", _golden("square")),
]
