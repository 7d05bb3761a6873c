"""What holds for every set of images: names, classes, order, parts."""

import csv
import os
from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples import examples, tried
from sightline.datasets.folder import read_classes
from sightline.datasets.image_set import ImageSet, Names, Samples
from sightline.datasets.loader import OrderedLoader, TrainLoader
from sightline.datasets.naming import class_names, natural
from sightline.datasets.open import open_dataset
from sightline.datasets.order import rows
from sightline.images.decode import ImageError

WORDS = st.text("abcxyz0189 _-éß", min_size=1, max_size=6).map(str.strip).filter(bool)
LABELS = st.lists(WORDS, min_size=2, max_size=6, unique_by=str.casefold)
BYTE_NAMES = st.binary(min_size=1, max_size=9).filter(lambda name: not set(name) & {0, ord("/")})


def numbered(count: int, classes: int = 2) -> ImageSet:
    pixels = [np.full((1, 1, 3), i % 256, np.uint8) for i in range(count)]
    names = Names(f"{i}.png" for i in range(count))
    return ImageSet(tuple(map(str, range(classes))), Samples(names, np.arange(count) % classes, arrays=pixels))


def refusing(broken: set[int]):
    def read(image: np.ndarray, *_key: int) -> torch.Tensor:
        if int(image[0, 0, 0]) in broken:
            raise ImageError("x", "broken")
        return torch.tensor(image).permute(2, 0, 1).float()

    return read


# Names


@given(st.lists(BYTE_NAMES, max_size=9))
def test_names_of_any_bytes_come_back(encoded):
    names = [os.fsdecode(name) for name in encoded]
    packed = Names(names)
    assert [os.fsencode(name) for name in packed] == encoded
    assert [packed[i] for i in range(len(packed))] == names


@given(st.lists(st.text(max_size=6), max_size=6, unique=True), st.randoms())
def test_class_names_do_not_depend_on_the_order_found(found, chance):
    def ask(names):
        return tried(lambda: list(class_names(names, "here").items()))

    shuffled = list(found)
    chance.shuffle(shuffled)
    assert ask(found) == ask(shuffled)


@given(st.text(max_size=9), st.text(max_size=9))
def test_only_equal_names_share_a_place_in_the_order(one, two):
    assert (natural(one) == natural(two)) == (one == two)


# Sets


@given(LABELS, st.lists(st.integers(0, 5), min_size=1, max_size=20), st.randoms())
def test_every_image_keeps_its_class_when_classes_are_renumbered(labels, targets, chance):
    targets = np.array([t % len(labels) for t in targets])
    images = ImageSet(tuple(labels), Samples(Names(map(str, range(len(targets)))), targets))
    shuffled = list(labels)
    chance.shuffle(shuffled)
    again = images.renumbered(tuple(shuffled))
    assert [again.classes[t] for t in again.targets] == [images.classes[t] for t in images.targets]
    assert again.counts() == images.counts()
    assert list(again.renumbered(images.classes).targets) == list(images.targets)


@given(LABELS, st.data())
def test_the_fingerprint_tells_every_change_of_a_set(labels, data):
    count = data.draw(st.integers(1, 6))
    names = data.draw(st.lists(WORDS, min_size=count, max_size=count, unique=True))
    targets = data.draw(st.lists(st.integers(0, len(labels) - 1), min_size=count, max_size=count))

    def mark(names, targets, labels):
        return ImageSet(
            tuple(labels), Samples(Names(names), np.array(targets, dtype=np.int64), Path("/nowhere"))
        ).fingerprint()

    before = mark(names, targets, labels)
    i = data.draw(st.integers(0, count - 1))
    other = data.draw(st.integers(0, len(labels) - 1).filter(lambda t: t != targets[i]))
    assert mark(names, targets, labels) == before
    assert mark([*names[:i], names[i] + "x", *names[i + 1 :]], targets, labels) != before
    assert mark(names, [*targets[:i], other, *targets[i + 1 :]], labels) != before
    assert mark(names[1:], targets[1:], labels) != before
    assert mark(names, targets, labels[::-1]) != before


@examples(15)
@given(LABELS, st.randoms(), st.data())
def test_a_folder_reads_the_same_whenever_its_parts_were_made(tmp_path_factory, labels, chance, data):
    counts = [data.draw(st.integers(1, 3)) for _ in labels]
    files = [f"{label}/{i}.png" for label, count in zip(labels, counts, strict=True) for i in range(count)]
    seen = []
    for _ in range(2):
        chance.shuffle(files)
        root = tmp_path_factory.mktemp("made")
        for file in files:
            (root / file).parent.mkdir(exist_ok=True)
            (root / file).touch()
        images, _notes = read_classes(root)
        seen.append((images.classes, list(images.samples.names), images.targets.tolist()))
    assert seen[0] == seen[1]
    assert seen[0][0] == tuple(class_names(labels, "here").values())
    places = {label: i for i, label in enumerate(class_names(labels, "here"))}
    assert seen[0][2] == [places[name.split("/")[0]] for name in seen[0][1]]


@examples(30)
@given(LABELS, st.lists(st.tuples(WORDS, st.integers(0, 5)), min_size=2, max_size=8, unique_by=lambda row: row[0]))
def test_a_table_comes_back_as_it_was_written(tmp_path_factory, labels, entries):
    root = tmp_path_factory.mktemp("table")
    wanted = {f"{name}.png": labels[i % len(labels)] for name, i in entries}
    with (root / "t.csv").open("w", newline="", encoding="utf-8") as text:
        csv.writer(text).writerows([("path", "label"), *wanted.items()])
    for name in wanted:
        (root / name).touch()
    splits, refusal = tried(lambda: open_dataset(root / "t.csv"))
    if refusal:
        assert len(set(wanted.values())) in (1, len(wanted)), refusal
        return
    images = splits.together()
    found = {name: images.classes[t] for name, t in zip(images.samples.names, images.targets, strict=True)}
    assert found == {name: class_names([label], "")[label] for name, label in wanted.items()}


@given(st.binary(max_size=60) | st.binary(max_size=60).map(lambda rest: b"path,label\n" + rest))
def test_any_bytes_are_a_table_or_refused(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.csv"
    file.write_bytes(content)
    assert "any.csv" in tried(lambda: open_dataset(file))[1]  # there is no image that it could name


# Batches


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 99), st.integers(0, 20), st.sets(st.integers(0, 39)))
def test_what_cannot_be_read_is_left_out_and_never_replaced(count, batch_size, seed, step, broken):
    images = numbered(count)
    (loaded,) = TrainLoader(images, refusing(broken), batch_size=batch_size, seed=seed, steps=range(step, step + 1))
    planned = rows(step, count, batch_size, seed)[1].tolist()
    read = [] if loaded.batch is None else loaded.batch.index.tolist()
    assert read == [i for i in planned if i not in broken]
    assert [name for name, _ in loaded.refused] == [f"{i}.png" for i in planned if i in broken]
    if loaded.batch is not None:
        assert loaded.batch.pixels[:, 0, 0, 0].tolist() == read
        assert loaded.batch.targets.tolist() == [i % 2 for i in read]


@given(st.integers(0, 30), st.integers(1, 7), st.integers(1, 5), st.sets(st.integers(0, 29)))
def test_shares_of_an_evaluation_hold_each_image_once(count, batch_size, world, broken):
    images, read, refused = numbered(count), [], []
    for rank in range(world):
        for loaded in OrderedLoader(images, refusing(broken), batch_size=batch_size, rank=rank, world=world):
            assert len(loaded.refused) + (0 if loaded.batch is None else len(loaded.batch.index)) <= batch_size
            read += [] if loaded.batch is None else loaded.batch.index.tolist()
            refused += [name for name, _ in loaded.refused]
    assert read == [i for i in range(count) if i not in broken]
    assert refused == [f"{i}.png" for i in range(count) if i in broken]


@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 999), st.integers(0, 200), st.integers(1, 5))
def test_a_step_is_the_same_whatever_was_asked_before(count, batch_size, seed, step, repeats):
    first = rows(step, count, batch_size, seed, repeats)
    for other in (step + 1, 0, step + 57):
        rows(other, count, batch_size, seed + 1, repeats)
    again = rows(step, count, batch_size, seed, repeats)
    assert first[0] == again[0]
    assert first[1].tolist() == again[1].tolist()
