"""DINO's backbone: every token and the last map of attention, at three sizes, as the original gives them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sightline.checkpoints.load import load_bundle

GOLDEN = Path(__file__).parent / "data" / "goldens" / "dino-backbone"


@pytest.mark.parametrize("label", ["square", "wide", "larger"])
def test_tokens_and_attention_are_the_original_s(label: str) -> None:
    io = load_file(GOLDEN / "io.safetensors")
    pixels = io[f"input.{label}"]
    backbone = load_bundle(GOLDEN / "checkpoint.pth", num_heads=3).network.backbone
    with torch.no_grad():
        tokens = backbone(pixels)  # positions are stretched as it computes, not when it is loaded
        before, bias = backbone.stages(pixels)[-2].x, backbone.embed(pixels)[1]
        last = backbone.encoder.blocks[-1]
        map_ = last.attention.weights(last.norm1(before), bias=bias)
    for ours, theirs in ((tokens.x, io[f"output.tokens_{label}"]), (map_, io[f"output.attention_{label}"])):
        assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5


def test_the_teacher_is_read_and_its_projection_head_left_out() -> None:
    bundle = load_bundle(GOLDEN / "checkpoint.pth", num_heads=3)
    alone = load_file(GOLDEN / "weights.safetensors")
    assert torch.equal(bundle.network.backbone.place.class_token, alone["cls_token"])
    assert bundle.coverage.dropped
    assert all(name.startswith("head.") for name in bundle.coverage.dropped)
