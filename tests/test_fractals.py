"""Pictures by formula: the same everywhere, a class whatever its neighbours, and a set like any other."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from command import TINY, cli, refusal
from sightline.datasets.check import check
from sightline.datasets.fractals import Artist, Numbers, _directions, _turned
from sightline.datasets.image_set import Drawn
from sightline.datasets.loader import TrainLoader
from sightline.datasets.open import open_dataset
from sightline.evaluation.knn import knn_accuracy
from sightline.images.augment import Augment
from sightline.images.preprocess import Preprocess

KINDS = {
    "ifs": "c53214064bab0f9d",
    "ifs3d": "3a55a9c1849621f9",
    "contour": "cb86523a08f04814",
    "one": "9f7bb46dc8dd4c2b",
    "mixed": "90ec09724f2f6e06",
}
"""Digests of the first pictures of each kind. Another one on another machine is a defect."""


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_pixels_on_every_machine(kind):
    artist = Artist(0, kind, 17)
    pictures = [artist((chosen << 32) | instance) for chosen in range(7) for instance in range(3)]
    assert hashlib.sha256(b"".join(picture.tobytes() for picture in pictures)).hexdigest()[:16] == KINDS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_order_changes_no_picture(kind):
    there = [Artist(3, kind, 11)((chosen << 32) | 5) for chosen in range(4)]
    back = [Artist(3, kind, 11)((chosen << 32) | 5) for chosen in reversed(range(4))][::-1]
    assert all(map(np.array_equal, there, back))
    assert not np.array_equal(there[0], Artist(4, kind, 11)(5))
    assert not np.array_equal(there[0], Artist(3, kind, 11)(6))


def test_a_class_is_the_same_in_every_set():
    few = open_dataset("builtin:fractals:classes=3,instances=10,size=16", seed=2)
    many = open_dataset("builtin:fractals:classes=30,instances=40,size=16", seed=2)
    assert (len(few.train), len(few.val), few.train.classes) == (24, 6, ("0", "1", "2"))
    assert np.array_equal(few.train.samples[9].image, many.train.samples[33].image)
    assert (few.train.samples[9].target, few.train.samples[9].name) == (1, "1/1.png")
    digest = {image.tobytes() for part in (few.train, few.val) for image, _, _ in part.samples}
    assert len(digest) == 30


def test_classes_can_be_told_apart():
    splits = open_dataset("builtin:fractals:classes=8,instances=40,size=32")
    parts = []
    for images in (splits.train, splits.val):
        pixels = np.stack([image for image, _, _ in images.samples]).astype(np.float32)
        shapes = np.abs(pixels - np.median(pixels, axis=(1, 2), keepdims=True)).mean(axis=3)  # colours tell nothing
        parts += [torch.from_numpy(shapes.reshape(len(images), -1)), torch.from_numpy(images.targets)]
    assert knn_accuracy(*parts, k=5) > 2 / 8


def test_batches_are_functions_of_their_step():
    images = open_dataset("builtin:fractals:classes=5,instances=20,size=16").train
    transform = Augment(degrees=10.0).bind(Preprocess((16, 16)))
    whole = list(TrainLoader(images, transform, batch_size=8, seed=1, steps=range(5)))
    (late,) = TrainLoader(images, transform, batch_size=8, seed=1, steps=range(4, 5), workers=1)
    assert torch.equal(late.batch.pixels, whole[4].batch.pixels)


def test_a_drawn_set_is_chosen_from_and_joined_without_drawing():
    splits = open_dataset("builtin:fractals:classes=5,instances=20,size=16")
    images = splits.train.samples
    assert isinstance(images.arrays, Drawn)
    chosen, both = splits.train.select(np.array([7, 3])), splits.together()
    assert np.array_equal(chosen.samples[1].image, splits.train.samples[3].image)
    assert np.array_equal(both.samples[len(images)].image, splits.val.samples[0].image)
    assert len({part.fingerprint() for part in (splits.train, splits.val, chosen, both)}) == 4
    assert splits.train.fingerprint() == open_dataset(splits.source).train.fingerprint()
    assert splits.train.fingerprint() != open_dataset(splits.source, seed=1).train.fingerprint()


def test_check_finds_nothing_wrong():
    found = check("builtin:fractals:classes=3,instances=20,size=16")
    assert not [finding for finding in found.findings if finding.severity == "error"]


@given(st.integers(0, 2**64))
def test_directions_and_turns_have_length_one(seed):
    drawn = Numbers(seed)
    x, y = _directions(4 * drawn.uniform(13))
    assert np.allclose(x * x + y * y, 1)
    turns = _turned(2 * drawn.uniform(4, 7) - 1).transpose(2, 0, 1)
    assert np.allclose(turns @ turns.transpose(0, 2, 1), np.eye(3), atol=1e-5)
    assert np.allclose(np.linalg.det(turns), 1, atol=1e-5)


def test_trains_by_command(tmp_path):
    words = ("train", "builtin:fractals:classes=4,instances=20,size=16", "--epochs", 1, *TINY, "--json")
    said = cli(*words, "--out", tmp_path / "run")
    assert said.status == 0, said.err
    assert said.document["counts"] == {"evaluated": 16, "refused": 0}
    judged = cli("evaluate", tmp_path / "run", "builtin:fractals:classes=4,instances=20,size=16", "--json")
    assert judged.document["metrics"]["top1"] == said.document["metrics"]["top1"]


def test_settings_are_read_strictly():
    assert "Did you mean classes?" in refusal("check", "--quiet", "builtin:fractals:klasses=3")
    assert "classes must be at least 2" in refusal("check", "--quiet", "builtin:fractals:classes=1")
    assert "size must lie in" in refusal("check", "--quiet", "builtin:fractals:size=4")
    assert "expected int" in refusal("check", "--quiet", "builtin:fractals:size=large")
    assert "not one of ifs" in refusal("check", "--quiet", "builtin:fractals:kind=julia")
    assert "has no settings" in refusal("check", "--quiet", "builtin:digits:size=4")
