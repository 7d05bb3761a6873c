"""Weights leave and come back: tensors bit for bit the same, and the other library takes them without a remainder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTModel, pipeline

from sightline.checkpoints.convert import convert
from sightline.checkpoints.directory import write_model
from sightline.checkpoints.load import load_bundle
from sightline.checkpoints.rules import load, save
from sightline.checkpoints.scheme import Bundle, adjusted
from sightline.errors import UserError
from sightline.images.preprocess import Preprocess
from sightline.network import Network, create_model
from sightline.registry import table

DATA = Path(__file__).parent / "data"
LABELS = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


def network(**settings: Any) -> Network:
    """A tiny network in which every value is random, so that an exchange of tensors shows."""
    tiny = {"image_size": (24, 40), "patch_size": 8, "embed_dim": 36, "depth": 2, "num_heads": 3, "num_classes": 7}
    made = create_model("vit_tiny_patch16_224", **{**tiny, **settings}).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def bundle(tmp_path: Path, **settings: Any) -> Bundle:
    made = network(**settings)
    size = made.architecture.backbone.image_size
    labels = LABELS if made.architecture.head.num_classes else ()
    write_model(tmp_path / "model", made, Preprocess(size, resize="squash"), labels)
    return load_bundle(tmp_path / "model")


def assert_identical(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


# Through a target and back


GOOGLE = {"activation": "gelu_tanh"}
TARGETS = [
    ("sightline", "out", {}),
    ("sightline", "out", {"positions": "relative", "norm": "post", "global_pool": "both"}),
    ("sightline", "out", {"positions": "sincos2d", "pre_logits": 11}),
    ("timm", "out", {}),
    ("timm", "out", {"global_pool": "avg", "init_values": 0.1, "activation": "gelu_tanh"}),
    ("timm", "out", {"global_pool": "avg", "class_token": False, "positions": "none", "mlp_dim": 50}),
    ("timm", "out", {"image_size": (27, 43), "partial_patches": "drop", "qkv_bias": False}),
    ("timm", "out.safetensors", {}),
    ("timm", "out.pth", {}),
    ("transformers", "out", {"norm_eps": 1e-3}),
    ("transformers", "out", {"activation": "quick_gelu", "qkv_bias": False, "mlp_dim": 50}),
    ("transformers", "out", {"num_classes": 0}),
    ("transformers", "out", {"num_classes": 0, "pre_logits": 36}),
    ("google", "out.npz", GOOGLE),
    ("google", "out.npz", {**GOOGLE, "pre_logits": 11}),
    ("google", "out.npz", {**GOOGLE, "class_token": False, "global_pool": "avg", "fc_norm": False}),
    ("big_vision", "out.npz", {**GOOGLE, "class_token": False, "global_pool": "avg", "fc_norm": False}),
]


@pytest.mark.parametrize(("to", "out", "settings"), TARGETS)
def test_there_and_back(tmp_path: Path, to: str, out: str, settings: dict[str, Any]) -> None:
    started = bundle(tmp_path, **settings)
    report = convert(started, to, tmp_path / out)
    size = started.architecture.backbone.image_size
    bare = {} if report.files[-1].name == "config.json" else {"image_size": size, "num_heads": 3}
    returned = load_bundle(tmp_path / out, **bare)
    assert_identical(returned.network.state_dict(), started.network.state_dict())
    pixels = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(returned.network(pixels), started.network(pixels), rtol=0, atol=1e-6)
    assert report.to_json()["written"]["percent"] == 100
    assert (report.parity is not None) == (to in ("timm", "transformers") and not Path(out).suffix)
    assert all(name in report.describe() for name in returned.coverage.pairs[0][1])


# From the other library and back into it


def test_timm_takes_its_tensors_back(tmp_path: Path) -> None:
    tiny = {"embed_dim": 36, "depth": 2, "num_heads": 3, "img_size": (24, 40), "patch_size": 8}
    original = timm.create_model("vit_tiny_patch16_224", num_classes=7, **tiny).eval()
    timm.models.save_for_hf(original, tmp_path / "timm", model_args=tiny, safe_serialization=True)
    convert(tmp_path / "timm", "timm", tmp_path / "back")
    assert_identical(load_file(tmp_path / "back/model.safetensors"), dict(original.state_dict()))
    again = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True).eval()
    assert_identical(dict(again.state_dict()), dict(original.state_dict()))


@pytest.mark.parametrize("kind", [ViTForImageClassification, ViTModel])
def test_transformers_takes_its_tensors_back(tmp_path: Path, kind: type) -> None:
    tiny = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 50}
    config = ViTConfig(**tiny, image_size=[24, 40], patch_size=8, num_labels=7, layer_norm_eps=3e-5)
    kind(config).save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", "transformers", tmp_path / "back")
    assert_identical(load_file(tmp_path / "back/model.safetensors"), load_file(tmp_path / "theirs/model.safetensors"))
    again, info = kind.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert again.config.layer_norm_eps == 3e-5


def test_google_takes_its_tensors_back(tmp_path: Path) -> None:
    original = DATA / "google-vit" / "weights.npz"
    convert(original, "google", tmp_path / "back.npz", image_size=(24, 40))
    with np.load(original) as theirs, np.load(tmp_path / "back.npz") as ours:
        assert set(theirs.files) == set(ours.files)
        assert all(theirs[name].dtype == ours[name].dtype for name in theirs.files)
        assert all(np.array_equal(theirs[name], ours[name]) for name in theirs.files)


def test_transformers_pipeline_opens_the_result(tmp_path: Path) -> None:
    started = bundle(tmp_path, image_size=(32, 32))
    convert(started, "transformers", tmp_path / "out")
    model, info = AutoModelForImageClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.id2label == dict(enumerate(LABELS))
    image = np.random.default_rng(0).integers(0, 256, (45, 31, 3), dtype=np.uint8)
    from PIL import Image

    answers = pipeline("image-classification", model=str(tmp_path / "out"))(Image.fromarray(image), top_k=7)
    with torch.no_grad():
        scores = started.network(started.preprocess(image)[None]).softmax(dim=1)[0]
    best = int(scores.argmax())
    assert answers[0]["label"] == LABELS[best]
    assert answers[0]["score"] == pytest.approx(float(scores[best]), abs=2e-3)
    assert load_bundle(tmp_path / "out").labels == LABELS


def test_classes_without_names_are_called_by_their_numbers_there_too(tmp_path: Path) -> None:
    made = network()
    write_model(tmp_path / "model", made, Preprocess((24, 40), resize="squash"), [str(i) for i in range(7)])
    convert(tmp_path / "model", "transformers", tmp_path / "out")
    labels = AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.id2label
    assert tuple(labels.values()) == load_bundle(tmp_path / "out").labels == tuple("0123456")


def test_labels_and_pixels_survive_timm(tmp_path: Path) -> None:
    started = bundle(tmp_path, image_size=(32, 32))
    convert(started, "timm", tmp_path / "out")
    returned = load_bundle(tmp_path / "out")
    assert returned.labels == LABELS
    assert returned.preprocess.replace(kernel="torch") == started.preprocess  # timm resizes with Pillow


# What a target cannot express


REFUSED = [
    ("timm", "out", {"norm_eps": 1e-12}, "norm_eps"),
    ("timm", "out", {"pre_logits": 11}, "pre_logits"),
    ("timm", "out", {"global_pool": "both"}, "global_pool"),
    ("timm", "out", {"positions": "relative"}, "positions"),
    ("timm", "out", {"norm": "post"}, "norm='post'"),
    ("timm", "out", {"image_size": (27, 43)}, "partial_patches"),
    ("transformers", "out", {"init_values": 0.1}, "init_values"),
    ("transformers", "out", {"global_pool": "avg"}, "fc_norm"),
    ("transformers", "out", {"pre_logits": 11}, "pre_logits"),
    ("transformers", "out", {"image_size": (27, 43)}, "partial_patches"),
    ("google", "out.npz", {}, "activation"),
    ("google", "out.npz", {**GOOGLE, "norm_eps": 1e-5}, "norm_eps"),
    ("google", "out.npz", {**GOOGLE, "qkv_bias": False}, "qkv_bias"),
    ("google", "out", GOOGLE, ".npz"),
    ("flax", "out", {}, "unknown layout"),
]


@pytest.mark.parametrize(("to", "out", "settings", "named"), REFUSED)
def test_refusals_name_the_setting_and_write_nothing(
    tmp_path: Path, to: str, out: str, settings: dict[str, Any], named: str
) -> None:
    started = bundle(tmp_path, **settings)
    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        convert(started, to, tmp_path / out)
    assert not (tmp_path / out).exists()


def test_an_accepted_change_is_asked_for(tmp_path: Path) -> None:
    bundle(tmp_path)
    report = convert(tmp_path / "model", "google", tmp_path / "out.npz", activation="gelu_tanh")
    assert report.files == (tmp_path / "out.npz",)


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    started = bundle(tmp_path, drop_path_rate=0.1)
    report = convert(started, "transformers", tmp_path / "out")
    assert any("drop_path_rate=0.1" in note for note in report.written.notes)


def test_pixels_that_cannot_be_expressed_are_left_out_loudly(tmp_path: Path) -> None:
    made = network()
    write_model(tmp_path / "model", made, Preprocess((24, 40), resize="native"), LABELS)
    report = convert(tmp_path / "model", "transformers", tmp_path / "out")
    assert any("preprocessor_config.json left out" in note for note in report.written.notes)
    assert not (tmp_path / "out" / "preprocessor_config.json").exists()
    with pytest.raises(UserError, match="no counterpart"):
        convert(tmp_path / "model", "timm", tmp_path / "timm")
    assert not (tmp_path / "timm").exists()


# The table itself


@pytest.mark.parametrize("name", [n for n in table("checkpoints", "SCHEMES") if n not in ("openai", "open_clip")])
def test_rules_are_inverse_to_each_other(name: str) -> None:
    settings = {"activation": "gelu_tanh", "global_pool": "token"}
    made = network(**settings)
    rules = table("checkpoints", "SCHEMES")[name].rules(made.architecture)
    theirs = save(rules, made.state_dict())
    if name == "big_vision":  # its class token carries the class row of the positions
        made.backbone.place.class_token.data += made.backbone.place.positions.table[:, :1].data
        made.backbone.place.positions.table.data[:, :1] = 0
    from sightline.checkpoints.rules import Found

    again = load(rules, Found("memory", theirs), made.architecture.shapes())
    assert_identical(again, dict(made.state_dict()))


def test_settings_replaced_in_an_architecture_are_checked() -> None:
    architecture = network().architecture
    assert adjusted(architecture, img_size=16).backbone.image_size == (16, 16)
    with pytest.raises(UserError, match=r"no setting 'drop_paht_rate'.*drop_path_rate"):
        adjusted(architecture, drop_paht_rate=0.1)
    with pytest.raises(UserError, match="depth"):
        adjusted(architecture, depth="12")


def test_half_precision_is_read_as_float32_and_said(tmp_path: Path) -> None:
    started = bundle(tmp_path)
    convert(started, "timm", tmp_path / "out")
    state = {name: tensor.half() for name, tensor in load_file(tmp_path / "out/model.safetensors").items()}
    save_file(state, tmp_path / "out/model.safetensors")
    returned = load_bundle(tmp_path / "out")
    assert all(parameter.dtype == torch.float32 for parameter in returned.network.parameters())
    assert "converted to float32 from float16" in returned.coverage.notes


def test_timm_configuration_names_every_setting(tmp_path: Path) -> None:
    convert(bundle(tmp_path), "timm", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert config["model_args"]["img_size"] == [24, 40]
    assert config["pretrained_cfg"]["input_size"] == [3, 24, 40]
