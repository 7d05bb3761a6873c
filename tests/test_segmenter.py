"""Segmenter: the original's outputs, its way with sizes and windows, and its loss by hand."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from parity.t2t import GOLDENS
from sightline.checkpoints.convert import convert
from sightline.checkpoints.load import load_bundle
from sightline.errors import UserError
from sightline.heads.segment import IGNORE, SegmentConfig, SegmentHead, classes_at
from sightline.inference.sliding import sliding_window
from sightline.network import create_model
from sightline.types import Placement


def apart(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def weights(case, folder):
    """The weights of a case as its source stores them."""
    for name in ("weights.safetensors", "checkpoint.pth"):
        if (GOLDENS / case / name).exists():
            return GOLDENS / case / name
    recipe = json.loads((GOLDENS / case / "recipe.json").read_text())
    random, digest = np.random.RandomState(recipe["seed"]), hashlib.sha256()
    tensors = {
        e["name"]: (e["mean"] + e["std"] * random.standard_normal(tuple(e["shape"]))).astype(np.float32)
        for e in recipe["tensors"]
    }
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].tobytes())
    assert digest.hexdigest() == recipe["sha256"]
    torch.save({"model": {name: torch.from_numpy(value) for name, value in tensors.items()}}, folder / "checkpoint.pth")
    return folder / "checkpoint.pth"


CASES = {"segmenter-linear": 3, "segmenter-mask": 4, "segmenter-mask-wide": 3}


@pytest.mark.parametrize(("case", "heads"), CASES.items())
@torch.no_grad()
def test_class_maps_are_the_originals(case, heads, tmp_path):
    network = load_bundle(weights(case, tmp_path), num_heads=heads).network
    values = load_file(GOLDENS / case / "io.safetensors")
    tolerance = 1e-5 if case == "segmenter-linear" else 3e-5
    for name in [name.removeprefix("input.") for name in values if name.startswith("input.")]:
        pixels = values[f"input.{name}"]
        assert apart(network.head.maps(network.backbone(pixels)), values[f"output.maps_{name}"]) <= tolerance
        assert apart(network(pixels), values[f"output.{name}"]) <= tolerance


@pytest.mark.parametrize("case", ["segmenter-linear", "segmenter-mask"])
def test_a_round_trip_is_the_same_to_the_bit(case, tmp_path):
    stored = weights(case, tmp_path)
    convert(str(stored), "original", tmp_path / "out.safetensors", num_heads=CASES[case])
    written = load_file(tmp_path / "out.safetensors")
    theirs = torch.load(stored, weights_only=True)["model"] if stored.suffix == ".pth" else load_file(stored)
    kept = {name: tensor for name, tensor in theirs.items() if not name.startswith("encoder.head")}
    assert written.keys() == kept.keys()
    assert all(torch.equal(written[name], kept[name]) for name in kept)


def test_only_segmenters_are_written_as_segmenters(tmp_path):
    network = create_model("vit_tiny_patch16_224", 3, image_size=32, depth=1, task="segment", cells=2)
    save_file(network.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="cells=2"):
        _converted(network, "original", tmp_path)
    with pytest.raises(UserError, match="no names for the weights of a head for 'segment'"):
        _converted(network, "timm", tmp_path)


def _converted(network, to, folder):
    from sightline.checkpoints.directory import write_model
    from sightline.images.preprocess import Preprocess

    write_model(folder / "model", network, Preprocess(size=(32, 32)), ["a", "b", "c"])
    convert(str(folder / "model"), to, folder / "out.safetensors")


def test_windows_are_the_originals():
    case = "segmenter-sliding-window"
    network = load_bundle(weights(case, None), num_heads=2).network
    values = load_file(GOLDENS / case / "io.safetensors")
    for pixels, size, flip, wanted in (
        ("image", (35, 58), False, "plain"),
        ("image", (35, 58), True, "with_flip"),
        ("small", (31, 47), False, "small"),
    ):
        found = sliding_window(network, values[f"input.{pixels}"], 24, 17, size, flip=flip)
        assert (found - values[f"output.{wanted}"]).abs().max() <= 1e-5, wanted


def small(decoder: str = "mask", **settings):
    given = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": (8, 6), "image_size": (33, 47), **settings}
    network = create_model("vit_tiny_patch16_224", 5, task="segment", decoder=decoder, **given)
    for name, parameter in network.named_parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1 and name.endswith("weight")), std=0.2)
    return network.eval()


@pytest.mark.parametrize(("decoder", "cells"), [("mask", 1), ("mask", 2), ("linear", 1), ("linear", 4)])
def test_unlike_sizes_in_a_batch_and_gradients(decoder, cells):
    network = small(decoder, cells=cells)
    images = [torch.randn(3, *size) for size in ((33, 47), (70, 20), (16, 19))]
    canvas = torch.full((3, 3, 70, 47), 7.0)
    for row, image in zip(canvas, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    together = network(canvas, torch.tensor([image.shape[1:] for image in images]))
    for image, maps in zip(images, together, strict=True):
        alone = network(image[None])[0]
        assert alone.shape == (5, *image.shape[1:])
        torch.testing.assert_close(maps[:, : image.shape[1], : image.shape[2]], alone, atol=1e-4, rtol=1e-4)
    network.train()(images[0][None]).square().sum().backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_pyramids_can_carry_the_head(name):
    network = create_model(name, 5, task="segment", image_size=(64, 96)).eval()
    assert network(torch.randn(1, 3, 64, 96)).shape == (1, 5, 64, 96)
    assert network(torch.randn(1, 3, 50, 70)).shape == (1, 5, 50, 70)


def test_cells_of_a_patch_lie_where_they_belong():
    head = SegmentHead(SegmentConfig(num_classes=2, decoder="linear", cells=2), 8)
    nn.init.zeros_(head.classifier.weight)
    head.classifier.bias.data = torch.arange(8.0)  # class, row, column
    from sightline.types import Tokens

    maps = head.maps(Tokens(torch.zeros(1, 6, 8), (2, 3)))
    assert maps.shape == (1, 2, 4, 6)
    assert torch.equal(maps[0, 1, 2:, 4:], torch.tensor([[4.0, 5.0], [6.0, 7.0]]))


def test_the_loss_leaves_out_what_is_ignored_and_weighs_classes():
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 1, 0, 0] = math.log(3)  # the first pixel: 1/4 against 3/4
    target = torch.tensor([[[1, 0], [IGNORE, 1]]], dtype=torch.uint8)
    head = SegmentHead(SegmentConfig(num_classes=2, decoder="linear"), 4)
    step = head.loss(logits, target)
    wanted = (-math.log(3 / 4) + 2 * math.log(2)) / 3
    assert math.isclose(float(step.loss), wanted, rel_tol=1e-6)
    assert math.isclose(float(step.metrics["pixel_accuracy"]), 2 / 3, rel_tol=1e-6)
    weighed = SegmentHead(SegmentConfig(num_classes=2, decoder="linear", class_weights=(3.0, 1.0)), 4)
    wanted = (-math.log(3 / 4) + 3 * math.log(2) + math.log(2)) / 5
    assert math.isclose(float(weighed.loss(logits, target).loss), wanted, rel_tol=1e-6)
    assert float(head.loss(logits, torch.full_like(target, IGNORE)).loss) == 0


def test_a_mask_comes_back_at_the_size_of_the_original():
    maps = torch.zeros(2, 4, 6)
    maps[1, :, 3:] = 1  # the right half
    place = Placement((10, 14), (4 / 10, 6 / 14), (0.0, 0.0), (4, 6))
    called = classes_at(maps, place)
    assert called.shape == (10, 14)
    assert called[:, 7:].all()
    assert not called[:, :6].any()
    padded = classes_at(maps, Placement((4, 3), (1.0, 1.0), (0.0, 3.0), (4, 6)))  # the image is the right half
    assert padded.all()
