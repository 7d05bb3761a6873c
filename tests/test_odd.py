"""Inputs of `oddinputs`, and configurations of every kind with a part exchanged: refused by name, or read."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oddinputs
from examples import JSON, examples, tried
from sightline.checkpoints.convert import convert
from sightline.checkpoints.directory import write_model
from sightline.checkpoints.load import UNFORESEEN, load_bundle
from sightline.datasets.open import open_dataset
from sightline.errors import UserError
from sightline.images.decode import decode
from sightline.images.preprocess import Preprocess
from sightline.network import create_model
from sightline.registry import table

TINY = {"image_size": 32, "patch_size": 16, "embed_dim": 8, "depth": 1, "num_heads": 2}
ALREADY = {"ckpt": 44, "image": 50, "archive": 26, "config": 38, "dataset": 27}


@pytest.fixture(scope="module")
def kit(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("odd")
    return folder, oddinputs.make(str(folder))


def opened(path: Path, family: str) -> object:
    """What an input of a family becomes."""
    match family:
        case "image":
            return decode(path)
        case "archive":
            return open_dataset(path)
        case "dataset":
            return open_dataset(path) if path.suffix == ".csv" else decode(path)
        case "config":
            return load_bundle(path.parent)
    return load_bundle(path, architecture="vit_tiny_patch16_224", num_classes=4, **TINY)


@pytest.mark.parametrize("family", ALREADY)
def test_every_odd_input_meets_its_expectation(kit, family):
    folder, items = kit
    mine = [item for item in items if item["family"] == family]
    assert len(mine) == ALREADY[family]
    for item in mine:
        path = folder / item["path"]
        if family == "config":
            (path.parent / "model.safetensors").write_bytes(weights())
        found, refusal = tried(partial(opened, path, family))
        assert item["expect"] != ("accept" if found is None else "reject"), f"{item['path']}: {refusal}"
        assert UNFORESEEN not in refusal
        if family == "ckpt":
            assert (item["check"] or "").removeprefix("names=") in refusal
    assert not list(folder.rglob("BADINPUT*"))


def weights() -> bytes:
    """What fits the configuration that the others of the kit are made from."""
    inside = "vit.encoder.layer.0."
    shapes: dict[str, tuple[int, ...]] = {
        "vit.embeddings.cls_token": (1, 1, 8),
        "vit.embeddings.position_embeddings": (1, 5, 8),
        "vit.embeddings.patch_embeddings.projection.weight": (8, 3, 16, 16),
        f"{inside}intermediate.dense.weight": (32, 8),
        f"{inside}intermediate.dense.bias": (32,),
        f"{inside}output.dense.weight": (8, 32),
        "classifier.weight": (4, 8),
        "classifier.bias": (4,),
    }
    attention = [f"{inside}attention.attention.{name}" for name in ("query", "key", "value")]
    for name in (*attention, f"{inside}attention.output.dense"):
        shapes |= {f"{name}.weight": (8, 8), f"{name}.bias": (8,)}
    norms = (f"{inside}layernorm_before", f"{inside}layernorm_after", "vit.layernorm")
    shapes |= {f"{name}.{part}": (8,) for name in norms for part in ("weight", "bias")}
    biases = ("vit.embeddings.patch_embeddings.projection.bias", f"{inside}output.dense.bias")
    shapes |= dict.fromkeys(biases, (8,))
    random = np.random.default_rng(0)
    return oddinputs.kit.st({name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})


# Configurations of every kind


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """A small network of every kind, as each library that has a directory for it writes it."""
    found = []
    for kind, (name, settings) in {**table("backbones", "SMALL"), **table("tokenizers", "SMALL")}.items():
        network = create_model(name, **{"num_classes": 5, **settings}).eval()
        home = tmp_path_factory.mktemp("kinds") / kind
        write_model(home / "own", network, Preprocess(network.architecture.backbone.image_size), tuple("abcde"))
        for library in ("timm", "transformers"):
            try:
                convert(home / "own", library, home / library)
            except UserError:
                continue
            found.append(home / library)
    return found


def test_there_are_directories_of_both_libraries(folders):
    assert len({folder.parent for folder in folders if folder.name == "timm"}) > 8
    assert len({folder.parent for folder in folders if folder.name == "transformers"}) > 6


ODD = st.sampled_from([None, True, 0, -1, 10**9, 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "x", [], [0, 0]])
ODD |= st.sampled_from([[10**9] * 2, [1] * 1000, {}, {"a": 1}, [[1]]])


@examples(400)
@given(data=st.data())
def test_a_configuration_with_a_part_exchanged_is_read_or_refused_by_name(folders, data):
    folder = data.draw(st.sampled_from(folders))
    paths = [path for name in ("config", "preprocessor_config") if (path := folder / f"{name}.json").exists()]
    path = data.draw(st.sampled_from(paths))
    before = path.read_text()
    whole = json.loads(before)
    here, key = whole, data.draw(st.sampled_from(sorted(whole)))
    while isinstance(here[key], dict) and here[key] and data.draw(st.booleans()):
        here, key = here[key], data.draw(st.sampled_from(sorted(here[key])))
    here[key] = data.draw(ODD | JSON)
    path.write_text(json.dumps(whole))
    try:
        _, refusal = tried(partial(load_bundle, folder))
    finally:
        path.write_text(before)
    assert UNFORESEEN not in refusal, f"{folder}: {key}: {refusal}"


# Memory

MEASURE = """
import sys
from pathlib import Path
from sightline.checkpoints.load import load_bundle
from sightline.network import create_model

def resident(key):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if key in line)

load_bundle(sys.argv[1], num_heads=12)
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
network = load_bundle(sys.argv[2], num_heads=12).network
print((resident("VmHWM") - before) * 1024, sum(p.nbytes for p in network.parameters()))
"""


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """A network of 115 MB, and one of next to nothing, in several formats."""
    home = tmp_path_factory.mktemp("large")
    for name, depth in (("large", 4), ("small", 1)):
        settings = {"embed_dim": 768, "depth": 4} if name == "large" else {"embed_dim": 24, "depth": depth}
        network = create_model("vit_tiny_patch16_224", 3, num_heads=12, activation="gelu_tanh", **settings).eval()
        write_model(home / name, network, Preprocess((224, 224)), tuple("abc"))
        for to, suffix in (("google", ".npz"), ("timm", ".pth")):
            convert(home / name, to, home / f"{name}{suffix}")
        state = torch.load(home / f"{name}.pth", weights_only=True)
        torch.save(state, home / f"{name}.bin", _use_new_zipfile_serialization=False)
    return home


@pytest.mark.parametrize("suffix", [".npz", ".bin"])
def test_a_foreign_file_takes_little_more_memory_than_its_tensors(stored, suffix):
    words = [sys.executable, "-c", MEASURE, stored / f"small{suffix}", stored / f"large{suffix}"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
    peak, tensors = map(int, done.stdout.split())
    assert tensors > 110e6
    assert peak < 1.15 * tensors + 60e6
