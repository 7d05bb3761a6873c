import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from sightline.datasets.image_set import ImageSet, Names, Samples, unlabelled
from sightline.datasets.loader import Loaded, OrderedLoader, TrainLoader
from sightline.datasets.open import open_dataset
from sightline.datasets.order import epoch_order, rows, share, steps_per_epoch
from sightline.errors import UserError
from sightline.images.augment import Augment, sample_key
from sightline.images.preprocess import Preprocess
from sightline.types import Batch

SIZE = (5, 7)
PREPROCESS = Preprocess(size=SIZE)
calm = settings(deadline=None)  # other processes may be at work


def arrays(count: int, classes: int = 3) -> ImageSet:
    generator = np.random.default_rng(0)
    pixels = list(generator.integers(0, 256, (count, *SIZE, 3), dtype=np.uint8))
    named = Names(f"{i}.png" for i in range(count))
    return ImageSet(tuple(map(str, range(classes))), Samples(named, np.arange(count) % classes, arrays=pixels))


def noisy(image: np.ndarray, key: int) -> Tensor:
    noise = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(key))
    return PREPROCESS(image) + noise


def plain(image: np.ndarray, key: int) -> Tensor:
    return torch.tensor(image[:, :, :1].T * (key % 97 / 97))


def folder(root: Path, count: int, broken: tuple[int, ...] = ()) -> ImageSet:
    for i in range(count):
        file = root / str(i % 2) / f"{i:02}.png"
        file.parent.mkdir(exist_ok=True)
        if i in broken:
            file.write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
        else:
            Image.fromarray(np.full((*SIZE, 3), i, np.uint8)).save(file)
    return open_dataset(root, held_out=0.01).train


def tensors(batch: Batch | None) -> list[Tensor]:
    """What a batch of equal sizes is made of."""
    assert batch is None or batch.sizes is None
    return [] if batch is None else [batch.pixels, batch.targets, batch.index, batch.key]


def same(one: Loaded, two: Loaded) -> bool:
    equal = (one.step, one.refused) == (two.step, two.refused) and (one.batch is None) == (two.batch is None)
    return equal and all(map(torch.equal, tensors(one.batch), tensors(two.batch)))


def test_unlike_sizes_are_padded_and_told():
    pictures = [np.full((h, w, 3), 200, dtype=np.uint8) for h, w in ((5, 7), (11, 3), (7, 7))]
    images = ImageSet(("a",), Samples(Names("012"), np.zeros(3, dtype=np.int64), arrays=pictures))
    (loaded,) = OrderedLoader(images, lambda image: torch.ones(3, *image.shape[:2]), batch_size=3)
    assert loaded.batch.sizes.tolist() == [[5, 7], [11, 3], [7, 7]]
    assert loaded.batch.pixels.shape == (3, 3, 11, 7)
    assert loaded.batch.pixels.sum(dim=(1, 2, 3)).tolist() == [3 * 35, 3 * 33, 3 * 49]
    assert loaded.batch.part(1, 3).sizes.tolist() == [[11, 3], [7, 7]]


# Order

counts, seeds, epochs = st.integers(1, 300), st.integers(0, 2**63), st.integers(0, 10**6)


@calm
@given(counts, seeds, epochs)
def test_each_epoch_is_a_permutation(count, seed, epoch):
    order = epoch_order(count, seed, epoch)
    assert sorted(order.tolist()) == list(range(count))
    epoch_order.cache_clear()
    assert (order == epoch_order(count, seed, epoch)).all()


def test_epochs_and_seeds_differ_and_the_order_is_fixed_for_ever():
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert epoch_order(8, 3, 2).tolist() == [2, 3, 6, 4, 1, 7, 5, 0]


@calm
@given(counts, st.integers(1, 64), seeds, st.integers(0, 5))
def test_an_epoch_of_batches_shows_each_sample_at_most_once(count, batch_size, seed, epoch):
    steps = steps_per_epoch(count, batch_size)
    batches = [rows(epoch * steps + turn, count, batch_size, seed) for turn in range(steps)]
    assert {number for number, _ in batches} == {epoch}
    seen = np.concatenate([views for _, views in batches])
    assert len(set(seen.tolist())) == len(seen) == steps * min(batch_size, count)
    assert count - len(seen) < batch_size
    assert 0 <= seen.min() <= seen.max() < count


@calm
@given(counts, st.integers(1, 64), seeds, st.integers(0, 50), st.integers(1, 5))
def test_repeated_augmentation(count, batch_size, seed, step, repeats):
    epoch, views = rows(step, count, batch_size, seed, repeats)
    assert epoch == step // steps_per_epoch(count, batch_size)
    assert len(views) == len(set(views.tolist())) == min(batch_size, count)
    assert views.max() < count * repeats
    index, times = views % count, np.unique(views % count, return_counts=True)[1]
    assert len(times) == -(-len(views) // repeats)
    assert times.max() <= repeats
    if len(views) % repeats == 0:
        assert set(times.tolist()) == {repeats}
    if len(times) > 1:
        assert (index[1:] != index[:-1]).all()  # neighbours are mixed with each other
    if step % steps_per_epoch(count, batch_size):
        assert not set(index.tolist()) & set((rows(step - 1, count, batch_size, seed, repeats)[1] % count).tolist())


@calm
@given(st.integers(1, 200), st.integers(1, 9))
def test_shares_of_processes_are_disjoint_and_complete(length, world):
    if length < world:
        with pytest.raises(AssertionError):
            share(length, 0, world)
        return
    parts = [range(length)[share(length, rank, world)] for rank in range(world)]
    assert [i for part in parts for i in part] == list(range(length))
    assert all(parts)
    if length >= 2 * world:
        assert all(part.start % 2 == 0 for part in parts)
    if length % (2 * world) == 0:
        assert {len(part) for part in parts} == {length // world}


# Batches


def test_a_batch_by_hand():
    images = arrays(11)
    steps = list(TrainLoader(images, noisy, batch_size=4, seed=6, steps=range(1, 5)))
    assert [loaded.step for loaded in steps] == [1, 2, 3, 4]
    for step, batch, refused in steps:
        epoch, turn = divmod(step, 2)
        index = epoch_order(11, 6, epoch)[4 * turn : 4 * turn + 4].tolist()
        assert refused == []
        assert batch.index.tolist() == index
        assert batch.targets.tolist() == [i % 3 for i in index]
        assert batch.key.tolist() == [sample_key(6, epoch, i) for i in index]
        expected = [noisy(images.samples[i].image, key) for i, key in zip(index, batch.key.tolist(), strict=True)]
        assert torch.equal(batch.pixels, torch.stack(expected))
        assert batch.index.dtype == batch.targets.dtype == batch.key.dtype == torch.int64


@settings(calm, max_examples=20)
@given(st.integers(1, 13), st.integers(1, 7), st.integers(0, 9), st.integers(1, 3), st.integers(0, 6))
def test_resuming_gives_the_same_tail(count, batch_size, seed, repeats, start):
    images = arrays(count)

    def load(steps: range) -> list[Loaded]:
        return list(TrainLoader(images, plain, batch_size=batch_size, seed=seed, steps=steps, repeats=repeats))

    whole, tail = load(range(6)), load(range(start, 6))
    assert len(tail) == 6 - start
    assert all(map(same, whole[start:], tail))


def test_an_endless_range_of_steps():
    loader = TrainLoader(arrays(7), noisy, batch_size=3, seed=0, steps=range(10**9, 2**62))
    assert next(iter(loader)).step == 10**9


@pytest.mark.parametrize("augment", [Augment(crop="resized", horizontal_flip=0.5), Augment(degrees=20.0, erasing=0.5)])
def test_workers_and_processes_change_no_bit(augment):
    images, transform = arrays(23), augment.bind(PREPROCESS)

    def load(workers: int, rank: int = 0, world: int = 1) -> list[Loaded]:
        steps = range(2, 7)
        return list(
            TrainLoader(images, transform, batch_size=8, seed=1, steps=steps, rank=rank, world=world, workers=workers)
        )

    alone = load(0)
    for workers in (1, 2):
        assert all(map(same, alone, load(workers)))
    for world in (2, 3):
        parts = [load(workers=rank % 2, rank=rank, world=world) for rank in range(world)]
        for whole, *pieces in zip(alone, *parts, strict=True):
            joined = [torch.cat(field) for field in zip(*(tensors(piece.batch) for piece in pieces), strict=True)]
            assert all(map(torch.equal, tensors(whole.batch), joined))


def test_more_processes_than_images():
    with pytest.raises(UserError, match="3 processes cannot share batches of 2 images"):
        TrainLoader(arrays(2), noisy, batch_size=8, seed=0, steps=range(1), rank=0, world=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_random_state_of_the_run_is_untouched(workers):
    before = torch.get_rng_state()
    list(TrainLoader(arrays(9), noisy, batch_size=4, seed=0, steps=range(3), workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_is_named_once_per_epoch_and_counts_are_exact(tmp_path, workers):
    images = folder(tmp_path, 14, broken=(4, 9))
    count, broken = len(images), {name for name in images.samples.names if name[-6:-4] in ("04", "09")}
    assert broken
    batch_size, passes = 3, 4
    assert count % batch_size == 0
    steps = range(passes * count // batch_size)
    transform = Augment(horizontal_flip=0.5).bind(PREPROCESS)
    loader = TrainLoader(images, transform, batch_size=batch_size, seed=2, steps=steps, workers=workers)
    loaded = list(loader)
    for epoch in range(passes):
        part = loaded[epoch * count // batch_size : (epoch + 1) * count // batch_size]
        index = [i for _, batch, _ in part if batch is not None for i in batch.index.tolist()]
        refused = [name for _, _, names in part for name, _ in names]
        assert sorted(refused) == sorted(broken)
        assert sorted(index) == [i for i in range(count) if images.samples[i].name not in broken]
    for _, batch, refused in loaded:
        assert (0 if batch is None else len(batch.pixels)) + len(refused) == batch_size
        assert all("truncated" in reason or "damaged" in reason for _, reason in refused)
    assert [step for step, _, _ in loaded] == list(steps)
    assert all(map(same, loaded, loader))  # a second pass over the same loader


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_of_refusals_has_no_pixels(tmp_path, workers):
    images = folder(tmp_path, 6, broken=tuple(range(6)))
    loader = TrainLoader(images, noisy, batch_size=2, seed=0, steps=range(1), workers=workers)
    ((step, batch, refused),) = loader
    assert (step, batch, len(refused)) == (0, None, 2)


@pytest.mark.parametrize(("workers", "world"), [(0, 1), (2, 1), (0, 3), (1, 2)])
def test_ordered_batches_hold_each_image_once(tmp_path, workers, world):
    images = folder(tmp_path, 17, broken=(3,))
    index, refused, pixels = [], [], []
    for rank in range(world):
        loader = OrderedLoader(images, PREPROCESS, batch_size=4, rank=rank, world=world, workers=workers)
        for _ in range(2):  # evaluations come again and again
            parts = list(loader)
            assert [step for step, _, _ in parts] == list(range(len(loader)))
        for _, batch, names in parts:
            refused += names
            if batch is not None:
                index += batch.index.tolist()
                pixels += list(batch.pixels)
    good = [i for i in range(len(images)) if not images.samples[i].name.endswith("03.png")]
    assert index == good
    assert [name for name, _ in refused] == [n for n in images.samples.names if n.endswith("03.png")]
    for i, image in zip(index, pixels, strict=True):
        assert torch.equal(image, PREPROCESS(images.samples[i].image))


def test_more_processes_than_images_to_evaluate():
    parts = [list(OrderedLoader(arrays(2), PREPROCESS, batch_size=4, rank=rank, world=5)) for rank in range(5)]
    assert [i for part in parts for loaded in part for i in loaded.batch.index.tolist()] == [0, 1]


def test_unlabelled_files_and_the_missing_among_them(tmp_path):
    images = folder(tmp_path, 6)
    files = [images.samples[i].image for i in (3, 1)]
    ((_, batch, refused),) = OrderedLoader(unlabelled([files[0], tmp_path / "no", files[1]]), PREPROCESS, batch_size=4)
    assert (batch.index.tolist(), batch.targets.tolist()) == ([0, 2], [-1, -1])
    assert torch.equal(batch.pixels, torch.stack([PREPROCESS(file) for file in files]))
    assert refused == [(str(tmp_path / "no"), "No such file or directory")]


def test_a_defect_in_a_transform_is_not_taken_for_a_broken_file():
    def defect(image: np.ndarray, key: int) -> Tensor:
        raise RuntimeError("a defect")

    for workers in (0, 1):
        with pytest.raises(RuntimeError, match="a defect"):
            list(TrainLoader(arrays(4), defect, batch_size=2, seed=0, steps=range(2), workers=workers))


SPAWNED = """
import numpy as np
import torch
from sightline.datasets.image_set import ImageSet, Names, Samples
from sightline.datasets.loader import OrderedLoader
from sightline.images.preprocess import Preprocess
from sightline.types import Batch

if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn")
    pixels = [np.full((8, 8, 3), i, dtype=np.uint8) for i in range(9)]
    images = ImageSet(("a",), Samples(Names(map(str, range(9))), np.zeros(9, dtype=np.int64), arrays=pixels))
    alone, helped = (
        [b.batch for b in OrderedLoader(images, Preprocess(size=(8, 8)), batch_size=4, workers=n)] for n in (0, 1)
    )
    assert all(torch.equal(a, b) for one, two in zip(alone, helped, strict=True) for a, b in zip(one[:4], two[:4]))
    print("same")
"""


def test_processes_may_be_spawned(tmp_path):
    (tmp_path / "spawned.py").write_text(SPAWNED)
    done = subprocess.run([sys.executable, tmp_path / "spawned.py"], capture_output=True, text=True, timeout=120)
    assert done.stdout == "same\n", done.stderr
