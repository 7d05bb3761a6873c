"""Processes that read images: killed, stopped and crashed ones are replaced, and every sample comes exactly once."""

import faulthandler
import os
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sightline.datasets import readers
from sightline.datasets.image_set import ImageSet, Names, Samples
from sightline.datasets.loader import Loaded, OrderedLoader, TrainLoader
from sightline.errors import WorkError
from sightline.images.preprocess import Preprocess

SIZE, COUNT, BATCH = (5, 7), 24, 4
HERE = os.getpid()


def images(count: int = COUNT) -> ImageSet:
    pixels = list(np.random.default_rng(0).integers(0, 256, (count, *SIZE, 3), dtype=np.uint8))
    return ImageSet(("a",), Samples(Names(map(str, range(count))), np.zeros(count, dtype=np.int64), arrays=pixels))


def plain(image: np.ndarray, key: int) -> Tensor:
    time.sleep(0.005)
    return torch.tensor(image[:, :, :1].T * (key % 97 / 97))


class Crashing:
    """A decoder that ends its process at some images, as a fault in a C library would."""

    def __init__(self, fatal: set[int]):
        self.fatal = {images().samples[i].image.tobytes() for i in fatal}

    def __call__(self, image: np.ndarray, key: int = 0) -> Tensor:
        if image.tobytes() in self.fatal and os.getpid() != HERE:
            faulthandler.disable()
            os.abort()
        return plain(image, key)


def loader(transform=plain, workers: int = 2, say=lambda line: None, steps: range = range(18)) -> TrainLoader:
    return TrainLoader(images(), transform, batch_size=BATCH, seed=3, steps=steps, workers=workers, say=say)


def same(one: Loaded, two: Loaded) -> bool:
    return one.step == two.step and one.refused == two.refused and all(map(torch.equal, one.batch[:4], two.batch[:4]))


@pytest.fixture
def hasty(monkeypatch) -> None:
    monkeypatch.setattr(readers, "LOOK", 0.05)
    monkeypatch.setattr(readers, "STOPPED", 3)
    monkeypatch.setattr(readers, "SILENT", 20)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_lost_process_is_replaced_and_no_sample_is(number, workers, hasty):
    said: list[str] = []
    whole, interrupted = list(loader(workers=0)), []
    reading = loader(workers=workers, say=said.append)
    for loaded in reading:
        if loaded.step in (3, 9):
            lost = reading.readers.readers[loaded.step % workers].process
            os.kill(lost.pid, number)
        interrupted.append(loaded)
    assert all(map(same, whole, interrupted))
    assert len(whole) == len(interrupted)
    assert len(said) == 2
    assert all(("SIGKILL" if number == signal.SIGKILL else "was stopped") in line for line in said)
    assert lost.exitcode == -signal.SIGKILL  # also the one that was only stopped


def test_processes_killed_at_random_moments(hasty):
    random, index = np.random.default_rng(0), Counter()
    reading = loader(steps=range(30))
    for loaded in reading:
        index.update(loaded.batch.index.tolist())
        for reader in reading.readers.readers:
            if random.random() < 0.4:
                time.sleep(random.uniform(0, 0.02))
                reader.process.kill()
    assert index == dict.fromkeys(range(COUNT), 5)


def test_a_crash_of_a_decoder_costs_one_image(hasty):
    said: list[str] = []
    loaded = list(loader(Crashing({5, 11}), say=said.append))
    refused = [image for part in loaded for image in part.refused]
    assert Counter(name for name, _ in refused) == {"5": 3, "11": 3}
    assert all("was ended by SIGABRT" in reason for _, reason in refused)
    # A process may end before it says at which image; but not as many again as in another epoch of crashes.
    assert 2 * readers.BLAMED <= len(said) < 4 * readers.BLAMED
    index = Counter(i for part in loaded for i in part.batch.index.tolist())
    assert index == {i: 3 for i in range(COUNT) if i not in (5, 11)}


def test_where_everything_crashes_the_run_ends_with_a_remedy(hasty):
    with pytest.raises(WorkError, match="--workers 0"):
        list(loader(Crashing(set(range(COUNT)))))


def test_an_image_that_never_ends_is_left_out(hasty):
    slow = images().samples[5].image.tobytes()

    def endless(image: np.ndarray) -> Tensor:
        if image.tobytes() == slow:
            time.sleep(60)
        return plain(image, 1)

    loaded = list(OrderedLoader(images(8), endless, batch_size=4, workers=1))
    assert [image.name for part in loaded for image in part.refused] == ["5"]
    assert "did not finish" in loaded[1].refused[0].reason


def test_a_slow_process_is_not_taken_for_a_hung_one(hasty):
    said: list[str] = []

    def slow(image: np.ndarray, key: int) -> Tensor:
        time.sleep(0.4)  # an image takes 8 looks, of 20 without one that are allowed
        return plain(image, key)

    assert len(list(loader(slow, steps=range(2), say=said.append))) == 2
    assert said == []


def test_an_iteration_that_is_broken_off_leaves_nothing_behind(hasty):
    reading = OrderedLoader(images(), Preprocess(size=SIZE), batch_size=BATCH, workers=2)
    for loaded in reading:
        if loaded.step == 2:
            break
    assert [loaded.step for loaded in reading] == list(range(6))
    processes = [reader.process.pid for reader in reading.readers.readers]
    assert len(processes) == 2
    del reading
    assert not any(Path(f"/proc/{process}").exists() for process in processes)


def test_memory_that_a_batch_lies_in_may_be_written(hasty):
    (loaded,) = loader(steps=range(1))
    loaded.batch.pixels.mul_(0)
    assert not loaded.batch.pixels.any()


def test_processes_end_with_the_one_that_was_killed():
    first, second = os.pipe()
    child = os.fork()
    if not child:
        reading = loader()
        for _ in reading:
            os.write(second, " ".join(str(r.process.pid) for r in reading.readers.readers).encode())
            time.sleep(60)
    processes = [int(number) for number in os.read(first, 100).split()]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    latest = time.monotonic() + 10
    while any(Path(f"/proc/{number}").exists() for number in processes):
        assert time.monotonic() < latest
        time.sleep(0.05)
    assert len(processes) == 2
