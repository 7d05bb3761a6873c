"""The weights that come with Sightline: whole, small, in the wheel, and good for something."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sightline
from command import cli, photos, refusal  # noqa: F401  (a fixture)
from sightline.checkpoints.shipped import shipped
from sightline.datasets.digits import digits

ROOT = Path(__file__).parents[1]


def test_shipped_weights_are_small_and_read_as_float32():
    folder = shipped()["tiny"]
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 16e6
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float16}
    model = sightline.load("builtin:tiny")
    assert {p.dtype for p in model.network.parameters()} == {torch.float32}
    assert model.network.architecture.head.num_classes == 0
    assert "builtin:fractals" in (folder / "README.md").read_text()


@pytest.mark.parametrize("size", [40, (48, 80)])
def test_other_image_sizes_resample(size):
    model = sightline.load("builtin:tiny", image_size=size, num_classes=3)
    vectors = model.embed([digits().samples.arrays[0]])
    assert vectors.shape == (1, model.network.backbone.width)
    assert model.preprocess.size == ((size, size) if isinstance(size, int) else size)


def test_features_are_worth_more_than_those_of_random_weights(tmp_path):
    model = sightline.load("builtin:tiny")
    torch.manual_seed(0)
    sightline.Model(model.network.architecture.build(), model.preprocess, ()).save(tmp_path / "random")
    words = ("--protocol", "knn", "--json", "--quiet")
    ours, random = (cli("evaluate", m, "builtin:digits", *words) for m in ("builtin:tiny", tmp_path / "random"))
    assert ours.document["metrics"]["knn_top1"] > random.document["metrics"]["knn_top1"] + 0.05


def test_training_starts_from_them(photos, tmp_path):
    words = ("--weights", "builtin:tiny", "--epochs", 1, "--workers", 0, "--image-size", 40, "--json")
    said = cli("train", photos, *words, "--out", tmp_path / "run")
    assert said.status == 0, said.err
    tuned, start = sightline.load(tmp_path / "run").network, sightline.load("builtin:tiny").network
    assert tuned.architecture.backbone.image_size == (40, 40)
    before, after = (network.backbone.state_dict() for network in (start, tuned))
    name = next(name for name in before if before[name].ndim == 4)
    moved = (after[name] - before[name]).norm() / before[name].norm()
    assert 0 < moved < 0.5


def test_other_names_are_refused():
    message = refusal("evaluate", "builtin:tinny", "builtin:digits", "--protocol", "knn")
    assert "Did you mean tiny?" in message
    assert "builtin:tiny" in message
    assert "--protocol knn" in refusal("evaluate", "builtin:tiny", "builtin:digits")


def test_the_wheel_has_them(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path]
    subprocess.run([str(word) for word in build], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"sightline/checkpoints/weights/tiny/{name}" for name in ("config.json", "model.safetensors")} <= set(names)
