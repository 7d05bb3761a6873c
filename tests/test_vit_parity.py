"""Foreign Vision Transformers give the logits here that they give where they come from."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from scipy.ndimage import zoom
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from google_reference import big_vision, google_arrays, google_logits
from sightline.checkpoints.load import load_bundle
from sightline.checkpoints.scheme import Bundle
from sightline.layers.positions import resample_table

DATA = Path(__file__).parent / "data"
TINY = {"embed_dim": 36, "depth": 2, "num_heads": 3, "num_classes": 7, "patch_size": 8}
SIZES = [(32, 32), (160, 96), (35, 58)]  # square, oblong, and not a multiple of the patches
TOLERANCE = 1e-5  # of the largest logit


def spread(model: nn.Module) -> nn.Module:
    """Every parameter matters: matrices of about unit gain, norms away from one, biases away from zero."""
    for parameter in model.parameters():
        fan_in = math.prod(parameter.shape[1:]) if parameter.ndim in (2, 4) else 4
        nn.init.normal_(parameter, std=fan_in**-0.5)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.data += 1
    return model.eval()


def apart(ours: Tensor, theirs: Tensor) -> float:
    """max|ours - theirs| in units of the largest of theirs."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def logits(bundle: Bundle, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return bundle.network(pixels)


# timm


def timm_model(size: tuple[int, int] = (32, 48), eps: float = 1e-6, **settings: Any) -> nn.Module:
    norm = partial(nn.LayerNorm, eps=eps)
    return spread(timm.create_model("vit_tiny_patch16_224", img_size=size, norm_layer=norm, **{**TINY, **settings}))


TIMM = {
    "plain": {},
    "mean pooling": {"global_pool": "avg"},
    "mean pooling, norm before": {"global_pool": "avg", "fc_norm": False},
    "no class token": {"global_pool": "avg", "class_token": False},
    "layer scale": {"init_values": 0.1},
    "no bias in attention": {"qkv_bias": False},
    "positions of patches alone": {"no_embed_class": True},
    "no positions": {"pos_embed": "none"},
    "tanh GELU": {"act_layer": "gelu_tanh"},
    "narrow MLP": {"mlp_ratio": 1.5},
    "features": {"num_classes": 0},
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("settings", TIMM.values(), ids=TIMM.keys())
def test_timm_directory(tmp_path: Path, settings: dict[str, Any], size: tuple[int, int]) -> None:
    model = timm_model(size, **settings)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    arguments = {**TINY, **settings, "img_size": size}
    del arguments["num_classes"]
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": model.num_classes, "model_args": arguments}
    cfg = {"input_size": [3, *size], "mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps({**config, "pretrained_cfg": cfg}))
    pixels = torch.randn(2, 3, *size)
    bundle = load_bundle(tmp_path)
    assert apart(logits(bundle, pixels), model(pixels).detach()) <= TOLERANCE
    assert bundle.preprocess.size == size


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
@pytest.mark.parametrize(("size", "eps"), [((32, 32), 1e-6), ((160, 96), 3e-3)])
def test_timm_file(tmp_path: Path, suffix: str, size: tuple[int, int], eps: float) -> None:
    model, file = timm_model(size, eps), tmp_path / f"weights{suffix}"
    save_file(model.state_dict(), file) if suffix == ".safetensors" else torch.save(model.state_dict(), file)
    bundle = load_bundle(file, num_heads=3, image_size=size, norm_eps=eps)
    pixels = torch.randn(2, 3, *size)
    assert apart(logits(bundle, pixels), model(pixels).detach()) <= TOLERANCE


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "vit_small_patch32_224", "vit_base_patch16_224"])
def test_timm_at_published_width(tmp_path: Path, architecture: str) -> None:
    # As published but for the depth, and the heads found by the width of the registered models.
    model = spread(timm.create_model(architecture, depth=1, num_classes=5))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    bundle = load_bundle(tmp_path / "weights.safetensors", architecture=architecture, depth=1)
    pixels = torch.randn(1, 3, 224, 224)
    assert apart(logits(bundle, pixels), model(pixels).detach()) <= TOLERANCE


def test_heads_are_those_of_the_registered_model(tmp_path: Path) -> None:
    model = spread(timm.create_model("vit_tiny_patch16_224", num_classes=3))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    bundle = load_bundle(tmp_path / "weights.safetensors")
    pixels = torch.randn(1, 3, 224, 224)
    assert bundle.architecture.name == "vit_tiny_patch16_224"
    assert apart(logits(bundle, pixels), model(pixels).detach()) <= TOLERANCE


@pytest.mark.parametrize("new", [(48, 48), (40, 72), (16, 24)])
def test_timm_at_another_resolution(tmp_path: Path, new: tuple[int, int]) -> None:
    model = timm_model((32, 32))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    bundle = load_bundle(tmp_path / "weights.safetensors", num_heads=3, image_size=new)
    model.set_input_size(img_size=new)
    pixels = torch.randn(2, 3, *new)
    assert apart(logits(bundle, pixels), model(pixels).detach()) <= TOLERANCE
    assert any("'pos_embed' resampled from 4×4" in note for note in bundle.coverage.notes)


# transformers


def transformers_model(kind: type = ViTForImageClassification, size: Any = (32, 48), **settings: Any) -> nn.Module:
    config = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 50}
    return spread(kind(ViTConfig(**{**config, "patch_size": 8, "image_size": list(size), "num_labels": 7, **settings})))


TRANSFORMERS = {
    "plain": {},
    "large eps": {"layer_norm_eps": 3e-3},
    "tanh GELU": {"hidden_act": "gelu_new"},
    "quick GELU": {"hidden_act": "quick_gelu"},
    "ReLU": {"hidden_act": "relu"},
    "no bias in attention": {"qkv_bias": False},
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("settings", TRANSFORMERS.values(), ids=TRANSFORMERS.keys())
def test_transformers_classifier(tmp_path: Path, settings: dict[str, Any], size: tuple[int, int]) -> None:
    model = transformers_model(size=size, **settings)
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, *size)
    assert apart(logits(load_bundle(tmp_path), pixels), model(pixels).logits.detach()) <= TOLERANCE


@pytest.mark.parametrize("pooler", [True, False])
def test_transformers_backbone(tmp_path: Path, pooler: bool) -> None:
    model = transformers_model(partial(ViTModel, add_pooling_layer=pooler))
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 32, 48)
    output = model(pixels)
    expected = output.pooler_output if pooler else output.last_hidden_state[:, 0]
    assert apart(logits(load_bundle(tmp_path), pixels), expected.detach()) <= TOLERANCE


def test_transformers_in_shards(tmp_path: Path) -> None:
    model = transformers_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    pixels = torch.randn(2, 3, 32, 48)
    assert apart(logits(load_bundle(tmp_path), pixels), model(pixels).logits.detach()) <= TOLERANCE


@pytest.mark.parametrize("new", [(48, 48), (40, 72)])
def test_transformers_at_another_resolution(tmp_path: Path, new: tuple[int, int]) -> None:
    model = transformers_model(size=(32, 32))
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, *new)
    expected = model(pixels, interpolate_pos_encoding=True).logits.detach()
    assert apart(logits(load_bundle(tmp_path, image_size=new), pixels), expected) <= TOLERANCE


# Google


@pytest.mark.parametrize("token", [True, False], ids=["class token", "mean"])
@pytest.mark.parametrize("pre_logits", [False, True], ids=["without pre_logits", "with pre_logits"])
@pytest.mark.parametrize("size", SIZES)
def test_google(tmp_path: Path, size: tuple[int, int], pre_logits: bool, token: bool) -> None:
    arrays = google_arrays((size[0] // 8, size[1] // 8), pre_logits=pre_logits, token=token)
    np.savez(tmp_path / "weights.npz", **arrays)
    pixels = torch.randn(2, 3, *size)
    bundle = load_bundle(tmp_path / "weights.npz", image_size=size)
    assert apart(logits(bundle, pixels), google_logits(arrays, pixels)) <= TOLERANCE
    assert any("resampled" in note for note in bundle.coverage.notes) is False


@pytest.mark.parametrize("token", [True, False], ids=["class token", "mean"])
@pytest.mark.parametrize("stacked", [False, True], ids=["layer by layer", "stacked"])
@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/", "params/img/"])
def test_big_vision(tmp_path: Path, prefix: str, stacked: bool, token: bool) -> None:
    arrays = google_arrays((4, 4), token=token)
    np.savez(tmp_path / "weights.npz", **big_vision(arrays, prefix, stacked=stacked))
    pixels = torch.randn(2, 3, 32, 32)
    bundle = load_bundle(tmp_path / "weights.npz")
    assert apart(logits(bundle, pixels), google_logits(arrays, pixels)) <= TOLERANCE


@pytest.mark.parametrize("new", [(48, 48), (40, 72), (24, 16)])
def test_google_at_another_resolution(tmp_path: Path, new: tuple[int, int]) -> None:
    arrays = google_arrays((4, 4))
    np.savez(tmp_path / "weights.npz", **arrays)
    table = arrays["Transformer/posembed_input/pos_embedding"]
    plane = zoom(table[0, 1:].reshape(4, 4, 36), (new[0] / 32, new[1] / 32, 1), order=1)
    stretched = np.concatenate([table[:, :1], plane.reshape(1, -1, 36)], axis=1)
    pixels = torch.randn(2, 3, *new)
    expected = google_logits({**arrays, "Transformer/posembed_input/pos_embedding": stretched}, pixels)
    bundle = load_bundle(tmp_path / "weights.npz", image_size=new)
    assert apart(logits(bundle, pixels), expected) <= TOLERANCE


def test_the_original_code_s_own_logits() -> None:
    case, io = (
        json.loads((DATA / "google-vit" / "case.json").read_text()),
        load_file(DATA / "google-vit/io.safetensors"),
    )
    size = tuple(case["configuration"]["image_size"])
    bundle = load_bundle(DATA / "google-vit" / "weights.npz", image_size=size)
    assert apart(logits(bundle, io["input.pixels"]), io["output.logits"]) <= TOLERANCE


METHODS = {
    "dino": "bicubic_factor",
    "dinov2": "bicubic_factor",
    "dinov2_registers": "bicubic_antialias",
    "segmenter": "bilinear",
    "segmenter_two_prefix": "bilinear",
    "timm": "bicubic_antialias",
    "timm_two_prefix": "bicubic_antialias",
    "timm_npz": "bilinear",
    "mae_deit": "bicubic",
    "mae_deit_two_prefix": "bicubic",
    "t2t": "bicubic",
    "vision_transformer": "bilinear_corners",
    "big_vision_no_prefix": "bilinear_corners",
}


def test_every_source_stretches_positions_its_own_way() -> None:
    case = json.loads((DATA / "position-resize" / "case.json").read_text())
    io = load_file(DATA / "position-resize" / "io.safetensors")
    seen = set()
    for one in case["configuration"]["cases"]:
        old, new = (one["grid"],) * 2, tuple(one["to"])
        label = f"{one['grid']}_to_{new[0]}x{new[1]}"
        for method in one["methods"]:
            table = io[f"input.{label}.{'two' if 'two' in method else 'one'}_prefix"]
            table = table[:, 1:] if "no_prefix" in method else table
            expected = io[f"output.{label}.{method}"]
            assert apart(resample_table(table, old, new, METHODS[method]), expected) <= TOLERANCE, (label, method)
            seen.add(method)
    assert seen == METHODS.keys()


# The measure has teeth


def swapped_heads(arrays: dict[str, np.ndarray]) -> None:
    name = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"
    arrays[name] = arrays[name].reshape(36, 12, 3).swapaxes(1, 2).copy()


def transposed_kernel(arrays: dict[str, np.ndarray]) -> None:
    arrays["embedding/kernel"] = arrays["embedding/kernel"].swapaxes(0, 1).copy()


def transposed_positions(arrays: dict[str, np.ndarray]) -> None:
    table = arrays["Transformer/posembed_input/pos_embedding"]
    table[:, 1:] = table[:, 1:].reshape(1, 3, 5, 36).swapaxes(1, 2).reshape(1, 15, 36)


@pytest.mark.parametrize("sabotage", [swapped_heads, transposed_kernel, transposed_positions])
def test_a_wrong_axis_is_noticed(tmp_path: Path, sabotage: Callable[[dict[str, np.ndarray]], None]) -> None:
    arrays = google_arrays((3, 5))
    pixels = torch.randn(2, 3, 24, 40)
    expected = google_logits(arrays, pixels)
    sabotage(arrays)
    np.savez(tmp_path / "weights.npz", **arrays)
    assert apart(logits(load_bundle(tmp_path / "weights.npz", image_size=(24, 40)), pixels), expected) > TOLERANCE


@pytest.mark.parametrize("other", [{"activation": "gelu"}, {"norm_eps": 1e-5}, {"norm_eps": 1e-12}])
def test_a_wrong_formula_is_noticed(tmp_path: Path, other: dict[str, Any]) -> None:
    arrays = google_arrays((3, 5))
    arrays["embedding/kernel"] /= 20  # small tokens, as fresh networks have them, so that the epsilon counts
    arrays["embedding/bias"] /= 20
    arrays["cls"] /= 20
    arrays["Transformer/posembed_input/pos_embedding"] /= 20
    np.savez(tmp_path / "weights.npz", **arrays)
    pixels = torch.randn(2, 3, 24, 40)
    expected = google_logits(arrays, pixels)
    right = load_bundle(tmp_path / "weights.npz", image_size=(24, 40))
    wrong = load_bundle(tmp_path / "weights.npz", image_size=(24, 40), **other)
    assert apart(logits(right, pixels), expected) <= TOLERANCE
    assert apart(logits(wrong, pixels), expected) > TOLERANCE
