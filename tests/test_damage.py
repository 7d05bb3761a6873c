"""Damage and malice: every change of a byte is noticed, and whatever a file says is a refusal or a model."""

import json
import pickle
import random
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sightline.checkpoints.directory import write_model
from sightline.checkpoints.files import read_json, read_sealed, read_tensors
from sightline.checkpoints.load import load_bundle
from sightline.checkpoints.sealed import parse_json, sealed
from sightline.errors import UserError
from sightline.images.preprocess import Preprocess
from sightline.network import create_model, describe
from sightline.training.run import RunFolder
from test_checkpoints_refusals import TINY, reseal, write

CONTENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


# Seals


@settings(max_examples=100)
@given(document=st.dictionaries(st.text().filter(lambda key: key != "seal"), CONTENTS, min_size=1, max_size=5))
def test_a_sealed_document_comes_back(document: dict[str, Any]) -> None:
    found = parse_json(sealed(document), "x")
    assert list(found) == ["seal", *document]
    del found["seal"]
    assert found == document


def test_every_single_bit_of_a_sealed_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    whole = sealed({"lr": 1e-05, "name": "é\udce9", "best": float("-inf")})
    path.write_bytes(whole)
    assert read_sealed(path)["name"] == "é\udce9"
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"x\.json"):
            read_sealed(path)


def test_a_seal_that_does_not_stand_first_is_none() -> None:
    with pytest.raises(UserError, match="does not stand first"):
        parse_json(b'{"a": 1, "seal": "' + b"0" * 64 + b'"}', "x")


# A model directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("whole"), "sightline")


def test_hashes_are_those_of_the_tensors(whole: Path) -> None:
    import hashlib

    written = json.loads((whole / "config.json").read_text())["weights"]
    data = (whole / "model.safetensors").read_bytes()
    assert written["bytes"] == len(data)
    assert written["sha256"] == hashlib.sha256(data).hexdigest()
    tensors = load_file(whole / "model.safetensors")
    assert tensors.keys() == written["tensors"].keys()
    for name, tensor in tensors.items():
        entry = written["tensors"][name]
        assert entry["sha256"] == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        assert (entry["dtype"], entry["shape"]) == ("F32", list(tensor.shape))


def test_a_flipped_bit_in_the_weights_names_its_tensor(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    written = json.loads((folder / "config.json").read_text())["weights"]["tensors"]
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[written["backbone.norm.bias"]["bytes"][0] + 9] ^= 4
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged.*'backbone\.norm\.bias'$"):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-1], "has 19907 bytes, and 19908 were written"),
        (lambda data: data + b"\0", "has 19909 bytes"),
        (lambda data: data[:9] + b" " + data[10:], "what differs is its header"),
        (lambda data: data[:-8] + data[-4:] + data[-8:-4], "tensor 'head.classifier|tensor 'backbone"),
    ],
)
def test_damaged_weights(whole: Path, tmp_path: Path, damage: Callable[[bytes], bytes], said: str) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    file = folder / "model.safetensors"
    state = {name: torch.randn_like(tensor) for name, tensor in load_file(file).items()}
    save_file(state, file, {"format": "pt"})
    reseal(folder)
    load_bundle(folder)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=said):
        load_bundle(folder)


def test_a_configuration_changed_by_hand_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"a",', '"A",'))
    with pytest.raises(UserError, match=r"config\.json is damaged, or was changed by hand"):
        load_bundle(folder)


@pytest.mark.parametrize("missing", ["seal", "weights", "version"])
def test_no_entry_can_be_left_out(whole: Path, tmp_path: Path, missing: str) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config[missing]
    config.pop("seal", None)
    (folder / "config.json").write_bytes(json.dumps(config).encode() if missing == "seal" else sealed(config))
    with pytest.raises(UserError, match="version" if missing == "version" else "config.json"):
        load_bundle(folder)


def test_a_directory_from_before_the_seals_is_read_and_said(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("seal", "weights")} | {"version": 1}
    (folder / "config.json").write_text(json.dumps(config))
    assert any("without hashes" in note for note in load_bundle(folder).coverage.notes)


def test_names_that_are_no_unicode_are_saved_and_read(tmp_path: Path) -> None:
    labels = ["a", "b\udce9", "c", "d", "e"]
    write_model(tmp_path, create_model("vit_tiny_patch16_224", **TINY), Preprocess((24, 40), resize="squash"), labels)
    assert list(load_bundle(tmp_path).labels) == labels


# PyTorch files, read as data


def tensors_of_many_kinds() -> dict[str, Any]:
    shared = torch.randn(4, 6)
    kinds = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    kinds += [torch.int8, torch.uint8, torch.bool]
    return {
        **{str(kind): torch.randn(3, 5).mul(9).to(kind) for kind in kinds},
        "transposed": shared.T,
        "part": shared[1:3, ::2],
        "same": shared,
        "none": torch.zeros(0, 3),
        "scalar": torch.tensor(3.5),
        "parameter": torch.nn.Parameter(torch.randn(2, 3)),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pytorch_file_gives_the_tensors_that_pytorch_reads(tmp_path: Path, zipped: bool) -> None:
    state = OrderedDict(tensors_of_many_kinds())
    path = tmp_path / "x.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    read, expected = read_tensors(path).tensors, torch.load(path, weights_only=True)
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


def test_numbers_of_numpy_beside_the_weights_are_left_aside(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}, "best": np.float64(0.5)}, tmp_path / "x.pth")
    contents = read_tensors(tmp_path / "x.pth")
    assert torch.equal(contents.tensors["a"], torch.ones(2))
    assert contents.notes == ("weights read from 'state_dict'; left aside: 'best'",)


def rewritten(path: Path, change: Callable[[str, bytes], list[tuple[str, bytes]]], compression: int = 0) -> None:
    """Writes a PyTorch archive anew, each member changed."""
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            for new, content in change(name, data):
                archive.writestr(new, content)


def renamed(name: str, data: bytes) -> list[tuple[str, bytes]]:
    return [(name.replace("data/0", "data/x"), data)]


def shortened(name: str, data: bytes) -> list[tuple[str, bytes]]:
    return [(name, data[:-4] if name.endswith("data/0") else data)]


def big_endian(name: str, data: bytes) -> list[tuple[str, bytes]]:
    return [(name, b"big" if name.endswith("byteorder") else data)]


@pytest.mark.parametrize(
    ("change", "said"),
    [(renamed, "storage that the file does not hold"), (shortened, "does not hold"), (big_endian, "byte order")],
)
def test_archives_that_do_not_hold_what_they_say(tmp_path: Path, change: Any, said: str) -> None:
    path = tmp_path / "x.pth"
    torch.save({"a": torch.randn(64)}, path)
    rewritten(path, change)
    with pytest.raises(UserError, match=said):
        read_tensors(path)


def test_a_compressed_or_repeated_or_long_archive(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(4096)}, path)
    rewritten(path, lambda name, data: [(name, data)], zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed, which"):
        read_tensors(path)
    torch.save({"a": torch.zeros(4096)}, path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"other")
    with pytest.raises(UserError, match="twice"):
        read_tensors(path)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(10_000):
            archive.writestr(f"x/data/{i:0200d}", b"")
    with pytest.raises(UserError, match="table of contents"):
        read_tensors(path)


def test_a_corrupted_number_fails_the_checksum(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"a": torch.full((64,), 1.5)}, path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\0\0\xc0\x3f" * 64, b"\0\0\xc0\x3f" * 63 + b"\1\0\xc0\x3f"))
    with pytest.raises(UserError, match="checksum"):
        read_tensors(path)


@pytest.mark.parametrize("count", [2**40, 2**62])
def test_an_old_file_that_claims_much_takes_nothing(tmp_path: Path, count: int) -> None:
    path = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(4)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    at = len(data) - 24
    assert int.from_bytes(data[at : at + 8], "little") == 4
    path.write_bytes(data[:at] + count.to_bytes(8, "little") + data[at + 8 :])
    with pytest.raises(UserError, match="claims more values than it holds"):
        read_tensors(path)


def test_a_sparse_tensor_is_named(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": torch.eye(3).to_sparse()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="tensor 'b' is sparse"):
        read_tensors(tmp_path / "x.pth")


def test_containers_in_one_another_without_end(tmp_path: Path) -> None:
    endless: dict[str, Any] = {}
    endless["model"] = endless
    torch.save(endless, tmp_path / "x.pth")
    with pytest.raises(UserError, match="no state dict"):
        read_tensors(tmp_path / "x.pth")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    program=st.lists(
        st.sampled_from(
            [bytes([op]) for op in pickle.__dict__["MARK"] + b"(}]).0lute2sab\x85\x86\x87RbQ"]
            + [
                b"K\x03",
                b"X\x01\x00\x00\x00a",
                b"ctorch._utils\n_rebuild_tensor_v2\n",
                b"q\x00",
                b"h\x00",
                b"ctorch\nFloatStorage\n",
                b"ccollections\nOrderedDict\n",
                b"\x88",
            ]
        ),
        max_size=40,
    )
)
def test_any_pickle_is_a_refusal(tmp_path: Path, program: list[bytes]) -> None:
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + b"".join(program) + b".")
    with pytest.raises(UserError, match=r"x\.pth"):
        read_tensors(path)


# Weights that cannot be used


def test_what_a_new_model_rightly_has_at_zero_is_read(tmp_path: Path) -> None:
    network = create_model("vit_tiny_patch16_224", **TINY, init_values=0.1)
    for name, parameter in network.named_parameters():
        if name.endswith(("bias", "token", "table", "gamma", "attention.out.weight", "mlp.fc2.weight")):
            torch.nn.init.zeros_(parameter)
    write_model(tmp_path, network, Preprocess((24, 40), resize="squash"), "abcde")
    assert not load_bundle(tmp_path).network.head.classifier.weight.any()


def test_finite_weights_whose_output_is_not(tmp_path: Path) -> None:
    network = create_model("vit_tiny_patch16_224", **TINY)
    torch.nn.init.constant_(network.backbone.norm.weight, 3e38)
    torch.nn.init.ones_(network.head.classifier.weight)
    write_model(tmp_path, network, Preprocess((24, 40), resize="squash"), "abcde")
    with pytest.raises(UserError, match=r"output is not finite.*\(3\.0e\+38\).*'backbone\.norm\.weight'"):
        load_bundle(tmp_path)


def test_a_transposed_kernel_is_recognised(tmp_path: Path) -> None:
    source = write(tmp_path, "timm")
    state = load_file(source / "model.safetensors")
    state["blocks.0.mlp.fc1.weight"] = state["blocks.0.mlp.fc1.weight"].T.contiguous()
    save_file(state, source / "model.safetensors")
    with pytest.raises(UserError, match=r"'blocks\.0\.mlp\.fc1\.weight' has shape .* \(it looks transposed\)"):
        load_bundle(source)


# Configurations


REFUSED = [
    ("transformers", {"trust_remote_code": True}, "'trust_remote_code' in config.json is unknown"),
    ("transformers", {"_attn_implementation_internal": "evil/kernel"}, "is unknown"),
    ("transformers", {"hiden_size": 12}, "Did you mean hidden_size"),
    ("transformers", {"pruned_heads": {"0": [1]}}, "'pruned_heads'"),
    ("transformers", {"hidden_size": 10**30}, "'hidden_size' in config.json is 10+, and should be like 768"),
    ("transformers", {"layer_norm_eps": float("nan")}, "norm_eps"),
    ("transformers", {"layer_norm_eps": float("inf")}, "norm_eps"),
    ("transformers", {"id2label": {"0": "a", "1": "b", "3": "d", "4": "e", "x": "f"}}, "classes|class|shape"),
    ("transformers", {"id2label": {"0": "a", "1": "b", "2": 3, "3": "d", "4": "e"}}, "no name for class 2"),
    ("transformers", {"id2label": None, "num_labels": 10**9}, "num_classes 1000000000 is larger"),
    ("timm", {"auto_map": {"AutoModel": "evil.Evil"}}, "'auto_map' in config.json is unknown"),
    ("timm", {"num_classes": 10**9, "model_args": {}}, "num_classes 1000000000 is larger"),
    ("timm", {"num_classes": 2.5, "model_args": {}}, "num_classes"),
    ("timm", {"num_classes": 10**9}, "num_classes in config.json is 5 in model_args and 1000000000 beside"),
    ("sightline", {"auto_map": {"AutoModel": "evil.Evil"}}, "'auto_map' in config.json is unknown"),
]


@pytest.mark.parametrize(("layout", "entries", "said"), REFUSED)
def test_hostile_configurations(tmp_path: Path, layout: str, entries: dict[str, Any], said: str) -> None:
    source = write(tmp_path, layout)
    reseal(source, **entries)
    with pytest.raises(UserError, match=said):
        load_bundle(source)


def test_classes_of_one_name_are_told_apart_and_saved(tmp_path: Path) -> None:
    source = write(tmp_path, "transformers")
    reseal(source, id2label={"0": "crane", "1": "b", "2": "crane", "3": "d", "4": "e"})
    bundle = load_bundle(source)
    assert bundle.labels == ("crane (0)", "b", "crane (2)", "d", "e")
    write_model(tmp_path / "again", bundle.network, bundle.preprocess, bundle.labels)
    assert load_bundle(tmp_path / "again").labels == bundle.labels


def test_a_configuration_of_many_megabytes_is_not_read(tmp_path: Path) -> None:
    source = write(tmp_path, "transformers")
    with (source / "config.json").open("wb") as file:
        file.truncate(200 * 2**20)
    with pytest.raises(UserError, match="larger than it can be"):
        load_bundle(source)
    assert read_json(source / "preprocessor_config.json")


def test_sizes_are_refused_before_anything_is_laid_out() -> None:
    for settings_ in ({"image_size": 2**20}, {"depth": 2000}, {"embed_dim": 2**21, "num_heads": 1}):
        with pytest.raises(UserError, match=r"too many patches|larger than any network's"):
            describe("vit_tiny_patch16_224", **settings_)
    vast = describe("vit_tiny_patch16_224", embed_dim=2**18, num_heads=1, depth=12)
    with pytest.raises(UserError, match="this machine has"):
        vast.build()


VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    3,
    10**6,
    10**9,
    2**63,
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
]
VALUES += [
    "",
    "x",
    "3",
    "\0\x1b[2J",
    "a" * 5000,
    [],
    [[]],
    [1, 2],
    [1, 2, 3],
    ["a"],
    {},
    {"0": "a"},
    {"a": {"b": [None]}},
]


def mutated(config: Any, draw: random.Random) -> Any:
    """The JSON value with one to three entries anywhere in it replaced, removed or added."""
    config = json.loads(json.dumps(config))
    for _ in range(draw.randint(1, 3)):
        inner = config
        while True:
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            key = draw.choice(keys) if keys else None
            if key is None or not isinstance(inner[key], (dict, list)) or draw.random() < 0.3:
                break
            inner = inner[key]
        act = draw.random()
        if act < 0.15 or key is None:
            inner.update({draw.choice(["new", "_x", "auto_map", ""]): draw.choice(VALUES)}) if isinstance(
                inner, dict
            ) else inner.append(draw.choice(VALUES))
        elif act < 0.3:
            del inner[key]
        else:
            inner[key] = draw.choice(VALUES)
    return config


def tried(source: Path, good: dict[str, Any], draw: random.Random) -> str | None:
    """What a load says of a mutated configuration; nothing where it is a model. Any error but UserError escapes."""
    config = mutated(good, draw)
    (source / "config.json").write_text(json.dumps(config))
    if good.get("format") == "sightline" and isinstance(config, dict):
        config.pop("seal", None)
        if config:
            (source / "config.json").write_bytes(sealed(config))
    try:
        load_bundle(source)
    except UserError as refusal:
        return str(refusal)
    return None


@pytest.mark.parametrize("layout", ["sightline", "timm", "transformers"])
def test_any_configuration_is_a_refusal_or_a_model(tmp_path: Path, layout: str) -> None:
    source = write(tmp_path, layout)
    good = json.loads((source / "config.json").read_text())
    said = [tried(source, good, random.Random(seed)) for seed in range(60)]
    assert sum(words is not None for words in said) > 30
    assert all(words is None or source.name in words or "config.json" in words for words in said)
    assert all(words is None or words.isprintable() for words in said)


# The record of a run


@pytest.mark.parametrize("record", [{"seed": 1}, {"data": {"source": 3}}, {"data": [], "seed": "0"}, {"seed": True}])
def test_a_record_of_other_types_is_none(tmp_path: Path, record: dict[str, Any]) -> None:
    whole = {"seed": 0, "data": {"source": "x", "fingerprint": {}}, "recipe": {}}
    RunFolder(tmp_path).write(whole)
    assert RunFolder(tmp_path).read() == whole
    RunFolder(tmp_path).write({**whole, **record} if "data" in record else record)
    with pytest.raises(UserError, match=r"run\.json is not the record of a run"):
        RunFolder(tmp_path).read()
