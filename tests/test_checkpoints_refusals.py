"""Whatever does not fit is refused by the name it has on disk, and nothing in a file is ever run."""

import argparse
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from sightline.checkpoints.convert import convert
from sightline.checkpoints.directory import write_model
from sightline.checkpoints.hashes import hashes_of
from sightline.checkpoints.load import load_bundle
from sightline.checkpoints.sealed import sealed
from sightline.errors import UserError
from sightline.images.preprocess import Preprocess
from sightline.network import create_model

TINY = {"image_size": (24, 40), "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3, "num_classes": 5}
LABELS = tuple("abcde")


def write(folder: Path, layout: str) -> Path:
    """A tiny model in one of the layouts; returns what `load_bundle` is given."""
    network = create_model("vit_tiny_patch16_224", **TINY, activation="gelu_tanh")
    write_model(folder / "ours", network, Preprocess((24, 40), resize="squash"), LABELS)
    name = {"google": "x.npz", "big_vision": "x.npz", "timm file": "x.safetensors", "timm pth": "x.pth"}.get(layout)
    if layout == "sightline":
        return folder / "ours"
    return convert(folder / "ours", layout.split()[0], folder / (name or "theirs")).files[-1].parent / (name or "")


def options(layout: str) -> dict[str, Any]:
    bare = layout in ("google", "big_vision") or " " in layout
    return {"image_size": (24, 40), "num_heads": 3} if bare else {}


def reseal(source: Path, **entries: Any) -> None:
    """Makes a configuration of ours fit its files again, as a forger would; others have no seal and just change."""
    config = {**json.loads((source / "config.json").read_text()), **entries}
    if config.pop("seal", None) is None:
        (source / "config.json").write_text(json.dumps(config))
    else:
        config["weights"] = hashes_of(source / "model.safetensors")
        (source / "config.json").write_bytes(sealed(config))


def change(source: Path, act: Callable[[dict[str, Any]], None]) -> None:
    """Alters the tensors of a checkpoint in place, whatever its container."""
    file = source / "model.safetensors" if source.is_dir() else source
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            state = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        act(state)
        np.savez(file, **{name: tensor.numpy() for name, tensor in state.items()})
    elif file.suffix == ".pth":
        state = torch.load(file, weights_only=True)
        act(state)
        torch.save(state, file)
    else:
        state = {name: tensor.clone() for name, tensor in load_file(file).items()}
        act(state)
        save_file(state, file)
    if source.is_dir():
        reseal(source)


NORM = {
    "sightline": "backbone.norm.weight",
    "timm": "norm.weight",
    "timm file": "norm.weight",
    "timm pth": "norm.weight",
    "transformers": "vit.layernorm.weight",
    "google": "Transformer/encoder_norm/scale",
    "big_vision": "params/Transformer/encoder_norm/scale",
}


def missing(state: dict[str, Tensor], name: str) -> str:
    del state[name]
    return rf"'{name}' is missing"


def superfluous(state: dict[str, Tensor], name: str) -> str:
    state[f"{name}_2"] = torch.zeros(3)
    return rf"'{name}_2' belongs to nothing"


def misshapen(state: dict[str, Tensor], name: str) -> str:
    state[name] = torch.ones(13)
    return rf"'{name}' has shape \[13\] where \[12\] is needed"


def not_a_number(state: dict[str, Tensor], name: str) -> str:
    state[name][7] = torch.nan
    return rf"'{name}' holds NaN"


def infinite(state: dict[str, Tensor], name: str) -> str:
    state[name][7] = -torch.inf
    return rf"'{name}' holds an infinite number"


def whole_numbers(state: dict[str, Tensor], name: str) -> str:
    state[name] = torch.ones(12, dtype=torch.int32)
    return rf"'{name}' holds int32"


def too_large_for_float32(state: dict[str, Tensor], name: str) -> str:
    state[name] = torch.full((12,), 1e300, dtype=torch.float64)
    return rf"'{name}' holds numbers too large for float32 \(it is float64\)"


def zero(state: dict[str, Tensor], name: str) -> str:
    state[name][:] = 0
    return rf"'{name}' is zero throughout"


FAULTS = [missing, superfluous, misshapen, not_a_number, infinite, whole_numbers, too_large_for_float32, zero]


@pytest.mark.parametrize("layout", NORM)
def test_each_fault_is_named_as_on_disk(tmp_path: Path, layout: str) -> None:
    whole = write(tmp_path / "whole", layout)
    load_bundle(whole, **options(layout))
    for fault in FAULTS:
        source = tmp_path / fault.__name__ / whole.name
        source.parent.mkdir()
        shutil.copytree(whole, source) if whole.is_dir() else shutil.copy(whole, source)
        messages: list[str] = []
        change(source, lambda state, fault=fault, messages=messages: messages.append(fault(state, NORM[layout])))
        with pytest.raises(UserError, match=messages[0]) as refusal:
            load_bundle(source, **options(layout))
        assert str(source) in str(refusal.value)


def test_names_are_those_before_a_prefix_is_taken_off(tmp_path: Path) -> None:
    source = write(tmp_path, "timm pth")
    torch.save({f"module.{name}": t for name, t in torch.load(source, weights_only=True).items()}, source)
    load_bundle(source, **options("timm pth"))
    change(source, lambda state: state.pop("module.norm.weight"))
    with pytest.raises(UserError, match=r"'module\.norm\.weight' is missing"):
        load_bundle(source, **options("timm pth"))


@pytest.mark.parametrize("container", ["model", "state_dict", "state_dict_ema", "model_ema", "teacher"])
def test_containers_are_opened_and_said(tmp_path: Path, container: str) -> None:
    source = write(tmp_path, "timm pth")
    state = torch.load(source, weights_only=True)
    torch.save({container: state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, source)
    bundle = load_bundle(source, **options("timm pth"))
    assert any(f"'{container}'; left aside: 'epoch', 'args'" in note for note in bundle.coverage.notes)


def test_a_file_of_an_older_pytorch_is_read(tmp_path: Path) -> None:
    source = write(tmp_path, "timm pth")
    state = torch.load(source, weights_only=True)
    torch.save(state, source, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(source)
    network = load_bundle(source, **options("timm pth")).network
    assert torch.equal(network.state_dict()["backbone.norm.weight"], state["norm.weight"])


# Another architecture, and what a file cannot tell


def test_a_checkpoint_of_another_architecture(tmp_path: Path) -> None:
    source = write(tmp_path, "timm file")
    with pytest.raises(UserError, match=r"'cls_token' has shape \[1, 1, 12\] where \[1, 1, 768\] is needed"):
        load_bundle(source, architecture="vit_base_patch16_224", image_size=(24, 40))
    for layout in ("transformers", "sightline"):
        with pytest.raises(UserError, match="is not a vit_base_patch16_224"):
            load_bundle(write(tmp_path / layout, layout), architecture="vit_base_patch16_224")


def test_what_a_file_cannot_tell_is_asked(tmp_path: Path) -> None:
    source = write(tmp_path, "timm file")
    with pytest.raises(UserError, match="does not tell its num_heads"):
        load_bundle(source, image_size=(24, 40))
    with pytest.raises(UserError, match="source_size"):
        load_bundle(source, num_heads=3)
    stretched = load_bundle(source, num_heads=3, source_size=(24, 40), image_size=(32, 32))
    assert stretched.network.backbone.place.positions.table.shape == (1, 17, 12)


def test_a_grid_that_could_be_two_is_asked(tmp_path: Path) -> None:
    network = create_model("vit_tiny_patch16_224", **{**TINY, "image_size": (32, 32)})
    write_model(tmp_path / "ours", network, Preprocess((32, 32), resize="squash"), LABELS)
    file = convert(tmp_path / "ours", "timm", tmp_path / "x.safetensors").files[0]
    with pytest.raises(UserError, match="2×8 or 4×4"):
        load_bundle(file, num_heads=3, image_size=(16, 64))
    load_bundle(file, num_heads=3, image_size=(16, 64), source_size=32)


def test_settings_that_need_other_weights(tmp_path: Path) -> None:
    source = write(tmp_path, "sightline")
    assert load_bundle(source, drop_path_rate=0.2).architecture.backbone.drop_path_rate == 0.2
    with pytest.raises(UserError, match="other weights"):
        load_bundle(source, positions="none")
    with pytest.raises(UserError, match=r"no setting 'drop_paht_rate'"):
        load_bundle(source, drop_paht_rate=0.2)


@pytest.mark.parametrize("layout", NORM)
def test_another_number_of_classes(tmp_path: Path, layout: str) -> None:
    bundle = load_bundle(write(tmp_path, layout), num_classes=3, **options(layout))
    assert bundle.network(torch.randn(2, 3, 24, 40)).tolist() == [[0.0] * 3] * 2
    assert bundle.labels == ("0", "1", "2")
    assert any("dropped for 3 classes" in note for note in bundle.coverage.notes)
    features = load_bundle(tmp_path / "ours", num_classes=0).network(torch.randn(2, 3, 24, 40))
    assert features.shape == (2, 12)


def test_pre_logits_go_with_the_classifier(tmp_path: Path) -> None:
    golden = Path(__file__).parent / "data" / "google-vit" / "weights.npz"
    bundle = load_bundle(golden, num_classes=3, image_size=(24, 40))
    assert bundle.network.head.pre_logits is None
    assert any("'pre_logits/kernel'" in note for note in bundle.coverage.notes)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("MAPHead_0/probe", r"attention pooling.*'MAPHead_0/probe'"),
        ("conv_root/kernel", r"'conv_root/kernel' has shape \[2\]; 4 axes"),
    ],
)
def test_google_models_of_another_kind(tmp_path: Path, extra: str, said: str) -> None:
    source = write(tmp_path, "google")
    change(source, lambda state: state.update({extra: torch.zeros(2)}))
    with pytest.raises(UserError, match=said):
        load_bundle(source, **options("google"))


def test_optimiser_state_is_left_out_by_name(tmp_path: Path) -> None:
    source = write(tmp_path, "big_vision")
    change(source, lambda state: state.update({"opt/0/mu": torch.zeros(2)}))
    assert load_bundle(source, **options("big_vision")).coverage.dropped == ("opt/0/mu",)


def test_no_such_source(tmp_path: Path) -> None:
    for source, said in [("nowhere", "no file or folder"), ("org/name", "hf:org/name")]:
        with pytest.raises(UserError, match=said):
            load_bundle(source)
    with pytest.raises(UserError, match=r"no config\.json"):
        load_bundle(tmp_path)
    (tmp_path / "weights.txt").write_text("x")
    with pytest.raises(UserError, match=r"\.safetensors"):
        load_bundle(tmp_path / "weights.txt")


def test_tensors_of_an_unknown_layout(tmp_path: Path) -> None:
    save_file({"layer1.0.conv1.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"no known layout.*'layer1\.0\.conv1\.weight'"):
        load_bundle(tmp_path / "x.safetensors")


# Configurations


CONFIGS = [
    ("transformers", {"auto_map": {"AutoModel": "evil.Evil"}}, "asks for code from the folder"),
    ("transformers", {"num_hidden_layers": 10**9}, "depth 1000000000 is larger"),
    ("transformers", {"num_hidden_layers": 1000}, "too few"),
    ("transformers", {"image_size": 10**6}, "1000000"),
    ("transformers", {"patch_size": 0}, "patch_size"),
    ("transformers", {"num_attention_heads": 5}, "num_heads"),
    ("transformers", {"num_attention_heads": "3"}, "'num_attention_heads' in config.json is '3'"),
    ("transformers", {"hidden_act": "mish"}, "hidden_act 'mish'"),
    ("transformers", {"model_type": "mobilevit"}, "model_type 'mobilevit'"),
    ("transformers", {"architectures": ["ViTForMaskedImageModeling"]}, "ViTForMaskedImageModeling"),
    ("timm", {"architecture": "vgg16"}, "unknown model 'vgg16'"),
    ("timm", {"model_args": {"qk_norm": True}}, "qk_norm=True"),
    ("timm", {"model_args": {"img_size": [24, 40], "depth": 10**9}}, "depth 1000000000 is larger"),
    ("timm", {"pretrained_cfg": 3}, "pretrained_cfg"),
    ("sightline", {"version": 3}, "version 3"),
    ("sightline", {"version": True}, "version True"),
    ("sightline", {"license": "?"}, "'license' in config.json is unknown"),
    ("sightline", {"labels": ["a"]}, "1 labels for 5 classes"),
    ("sightline", {"task": "detect"}, "'task'"),
    ("sightline", {"architecture": {"name": "x"}}, "architecture"),
]


@pytest.mark.parametrize(("layout", "entries", "said"), CONFIGS)
def test_configurations_cannot_steer(tmp_path: Path, layout: str, entries: dict[str, Any], said: str) -> None:
    source = write(tmp_path, layout)
    reseal(source, **entries)
    with pytest.raises(UserError, match=said):
        load_bundle(source)


def edited(source: Path, *path: str, value: Any) -> None:
    config = json.loads((source / "config.json").read_text())
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    reseal(source, **{path[0]: config[path[0]]})


def test_our_own_configuration_is_closed_and_sealed(tmp_path: Path) -> None:
    for path, value, said in [
        (("architecture", "backbone", "depht"), 3, "'depht'.*depth"),
        (("architecture", "backbone", "depth"), 1000, "too few"),
        (("architecture", "backbone", "norm_eps"), "small", "norm_eps"),
        (("preprocess", "mean"), [0.1, 0.2, 0.3], "fingerprint"),
        (("preprocess", "size"), "big", "size"),
    ]:
        source = write(tmp_path / path[-1], "sightline")
        edited(source, *path, value=value)
        with pytest.raises(UserError, match=said):
            load_bundle(source)


def test_a_computed_table_cannot_exhaust_memory(tmp_path: Path) -> None:
    network = create_model("vit_tiny_patch16_224", **TINY, positions="sincos2d")
    write_model(tmp_path, network, Preprocess((24, 40), resize="squash"), LABELS)
    edited(tmp_path, "architecture", "backbone", "image_size", value=[10**6, 10**6])
    with pytest.raises(UserError, match="too many patches"):
        load_bundle(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', "[" * 100_000, '{"model_type": null}', "\ud800"])
def test_json_that_is_no_configuration(tmp_path: Path, text: str) -> None:
    source = write(tmp_path, "transformers")
    (source / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError):
        load_bundle(source)


# Shards


def test_shards_stay_in_their_folder(tmp_path: Path) -> None:
    source = write(tmp_path, "transformers")
    names = list(load_file(source / "model.safetensors"))
    (source / "model.safetensors").rename(source / "part.safetensors")
    index = source / "model.safetensors.index.json"
    for place in ("../part.safetensors", "/etc/passwd", "a\\b.safetensors", "..", "part.txt", 3):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, place)}))
        with pytest.raises(UserError, match="plain name"):
            load_bundle(source)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names[1:], "part.safetensors")}))
    with pytest.raises(UserError, match=f"disagree about '{names[0]}'"):
        load_bundle(source)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "part.safetensors")}))
    load_bundle(source)


# Hostile and damaged files


class Runs:
    """A pickle of it makes a directory when it is trusted."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_named_and_not_run(tmp_path: Path, zipped: bool) -> None:
    canary = tmp_path / "canary"
    torch.save({"cls_token": Runs(canary)}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"asks for 'posix\.mkdir'") as refusal:
        load_bundle(tmp_path / "x.pth")
    assert not canary.exists()
    assert "weights_only" not in str(refusal.value)


def test_an_unknown_class_in_a_pickle_is_named(tmp_path: Path) -> None:
    torch.save({"model": {"cls_token": torch.zeros(1)}, "when": zipfile.ZipInfo()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"asks for .*'zipfile\.ZipInfo'"):
        load_bundle(tmp_path / "x.pth")


def test_a_tensor_that_claims_more_than_its_storage(tmp_path: Path) -> None:
    torch.save({"patch_embed.proj.weight": torch.zeros(1).expand(10**6)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"'patch_embed\.proj\.weight' claims more"):
        load_bundle(tmp_path / "x.pth")


def test_an_array_of_objects(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    np.savez(tmp_path / "x.npz", **{"embedding/kernel": np.array([Runs(canary)], dtype=object)})
    with pytest.raises(UserError, match="'embedding/kernel' holds Python objects"):
        load_bundle(tmp_path / "x.npz")
    assert not canary.exists()


def test_arrays_that_claim_to_be_large(tmp_path: Path) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }".ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("w.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64))
    with pytest.raises(UserError, match="'w' claims 1099511627776 values"):
        load_bundle(tmp_path / "x.npz")
    np.savez_compressed(tmp_path / "bomb.npz", w=np.zeros(2**25, np.float32))
    with pytest.raises(UserError, match="claims to hold 128 MiB"):
        load_bundle(tmp_path / "bomb.npz")


def test_no_fall_back_by_content(tmp_path: Path) -> None:
    source = write(tmp_path, "timm pth")
    source.rename(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_bundle(tmp_path / "x.safetensors")


def refusal_of(source: Path, **settings: Any) -> str:
    """What a load is refused with, or the name of a file that is good; no other error is accepted."""
    try:
        load_bundle(source, **settings)
    except UserError as fault:
        return str(fault)
    return source.name


@pytest.mark.parametrize("layout", ["timm file", "timm pth", "google"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_a_refusal_or_harmless(tmp_path: Path, layout: str, data: st.DataObject) -> None:
    source = tmp_path / {"timm file": "x.safetensors", "timm pth": "x.pth", "google": "x.npz"}[layout]
    if not (tmp_path / "whole").exists():
        (tmp_path / "whole").write_bytes(write(tmp_path, layout).read_bytes())
    content = bytearray((tmp_path / "whole").read_bytes())
    if data.draw(st.booleans(), label="cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1), label="length")]
    else:
        for _ in range(data.draw(st.integers(1, 4), label="flips")):
            content[data.draw(st.integers(0, min(len(content), 20_000) - 1), label="at")] ^= 1 << data.draw(
                st.integers(0, 7), label="bit"
            )
    source.write_bytes(content)
    assert source.name in refusal_of(source, **options(layout))
