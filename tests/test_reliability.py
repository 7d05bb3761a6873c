"""A run and what may befall it: unreadable images, too little memory, full disks, signals at any moment."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from command import TINY, cli, ended, started
from sightline.checkpoints.atomic import PARTIAL
from sightline.errors import UserError, WorkError
from sightline.evaluation.accuracy import accuracy
from sightline.network import create_model
from sightline.objectives.supervised import Supervised, SupervisedConfig
from sightline.recipes.train import train
from sightline.training.distributed import World
from sightline.training.saver import Saver
from sightline.training.schedule import Plan
from sightline.training.settings import Settings
from sightline.training.signals import Interrupted
from sightline.training.state import State, Store
from sightline.training.update import Updater
from sightline.types import Batch

QUICK = {"epochs": 2, "batch_size": 64, "workers": 0, "network": {"embed_dim": 16, "depth": 2, "num_heads": 2}}


def drawn(folder: Path, count: int, broken: tuple[int, ...] = (), parts: tuple[str, ...] = ("train", "val")) -> Path:
    """Pictures of two classes in each part; of the training part the `broken` ones are cut off."""
    noise = np.random.default_rng(0)
    for part in parts:
        for i in range(count):
            file = folder / part / "ab"[i % 2] / f"{i:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
            if part == "train" and i in broken:
                file.write_bytes(file.read_bytes()[:100])
    return folder


# Images that cannot be read


def test_a_run_with_too_many_unreadable_images_stops_and_goes_on_when_told(tmp_path):
    data, out = drawn(tmp_path / "data", 16, broken=(3, 6)), tmp_path / "run"
    words = ("train", data, "--epochs", 4, "--batch-size", 4, *TINY, "--out")
    said = cli(*words, out)
    assert said.status == 1
    assert "of the 16 training images cannot be read" in said.err
    assert "--refused-limit" in said.err
    assert cli("train", data, "--out", out, "--resume").status == 1  # the limit is part of the record
    assert cli("train", data, "--out", out, "--resume", "--refused-limit", 0.125).status == 0
    record = json.loads((out / "run.json").read_text())
    assert [Path(name).name for name, _ in record["refused"]["train"]] == ["06.png", "03.png"]
    assert record["recipe"]["settings"]["refused_limit"] == 0.125
    whole = tmp_path / "whole"
    assert cli(*words, whole, "--refused-limit", 0.125, "--workers", 2).status == 0
    assert (whole / "metrics.jsonl").read_bytes() == (out / "metrics.jsonl").read_bytes()
    assert (whole / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


# Memory


def short_of_memory(monkeypatch, most: int, fault: BaseException) -> list[int]:
    """Ends the memory in the middle of every gradient of parts of more than `most` images; the sizes tried."""
    plain, sizes = Updater._summed, []

    def summed(self, batch, step, size):
        sizes.append(size)
        if size > most:
            plain(self, batch.part(0, 2), step, 2)  # the gradient of these must not stay
            raise fault
        return plain(self, batch, step, size)

    monkeypatch.setattr(Updater, "_summed", summed)
    return sizes


def updates(**settings) -> list[float]:
    """The losses of a few updates of a small network."""
    torch.manual_seed(0)
    network = create_model("vit_tiny_patch16_224", 3, image_size=16, depth=2, embed_dim=8, num_heads=2)
    nn.init.normal_(network.head.classifier.weight, std=0.1)
    objective = Supervised(network, SupervisedConfig(mixup=0.3)).train()
    taught = Settings(**{"optimizer": "sgd", **settings})
    updater = Updater(objective, taught, World(0, 1, torch.device("cpu")), torch.float32)
    index = torch.arange(24)
    batches = [Batch(torch.randn(24, 3, 16, 16), index % 3, index, index + 99 * step) for step in range(8)]
    return [updater(batch, step, 0.05).loss for step, batch in enumerate(batches)]


@pytest.mark.parametrize(
    "fault",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError(),
    ],
    ids=["Python", "PyTorch", "GPU"],
)
def test_too_little_memory_halves_the_parts_and_not_the_batch(fault, monkeypatch):
    whole = updates()
    sizes = short_of_memory(monkeypatch, 7, fault)
    assert updates() == pytest.approx(whole, rel=1e-6)
    assert sizes == [24, 12, *[6] * 8]


def test_where_two_images_are_too_many_the_run_says_so(monkeypatch):
    sizes = short_of_memory(monkeypatch, 1, MemoryError())
    with pytest.raises(WorkError, match="--image-size"):
        updates()
    assert sizes == [24, 12, 6, 4, 2]


def test_a_defect_is_not_taken_for_too_little_memory(monkeypatch):
    sizes = short_of_memory(monkeypatch, 1, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes"):
        updates()
    assert sizes == [24]


def test_the_smaller_parts_are_said_and_remembered(tmp_path, monkeypatch, capsys):
    sizes, plain = short_of_memory(monkeypatch, 32, MemoryError()), Updater.__call__

    def stopping(self, batch, step, *words):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, batch, step, *words)

    monkeypatch.setattr(Updater, "__call__", stopping)
    with pytest.raises(Interrupted):
        train("builtin:digits", out=tmp_path / "run", quiet=False, **QUICK)
    assert "step 0: memory does not suffice; from here on 32 images" in capsys.readouterr().err
    monkeypatch.setattr(Updater, "__call__", plain)
    sizes.clear()
    train("builtin:digits", out=tmp_path / "run", resume=True)
    assert set(sizes) == {32}


def test_too_little_memory_in_an_evaluation_halves_the_batch():
    most, seen = 5, []

    class Network(nn.Module):
        def forward(self, pixels, sizes=None):
            seen.append(len(pixels))
            if len(pixels) > most:
                raise MemoryError
            return pixels.flatten(1)[:, :3]

    index = torch.arange(16)
    batch = Batch(torch.randn(16, 3, 2, 2), index % 3, index, index)
    counts = accuracy(Network(), [(0, batch, []), (1, batch, [])], 3, device=torch.device("cpu"))
    assert seen == [16, 8, *[4] * 8]
    assert counts.evaluated == 32
    most = 0
    with pytest.raises(WorkError, match="one image"):
        accuracy(Network(), [(0, batch, [])], 3, device=torch.device("cpu"))


# Disks


def test_a_disk_without_room_is_named_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("sightline.training.state.free_bytes", lambda folder: 1000)
    with pytest.raises(UserError, match=r"need [\d,]+ bytes in .*checkpoints, and 1,000 are free"):
        train("builtin:digits", out=tmp_path / "run", **QUICK)
    monkeypatch.undo()
    train("builtin:digits", out=tmp_path / "run", **QUICK | {"epochs": 0.1})  # and nothing is in the way afterwards


def test_a_disk_that_is_full_keeps_the_checkpoints_and_the_run_goes_on_later(tmp_path, monkeypatch):
    settings = QUICK | {"save_seconds": 1e-9}
    train("builtin:digits", out=tmp_path / "plain", **settings)
    plain, out = Store.write, tmp_path / "run"

    def full(self, step, state, tensors):
        if step > 20:
            monkeypatch.setattr(os, "fsync", lambda file: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
        plain(self, step, state, tensors)

    monkeypatch.setattr(Store, "write", full)
    with pytest.raises(
        WorkError, match=r"No space left on device \([\d,]+ bytes are needed and [\d,]+ are free\)"
    ) as told:
        train("builtin:digits", out=out, **settings)
    assert "--resume" in str(told.value)
    assert str(out) in str(told.value)
    monkeypatch.undo()
    assert not list(out.rglob(f"{PARTIAL}*"))
    assert Store(out / "checkpoints").newest()[0].step > 0
    with (out / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 21, "lo')  # what a full disk took of a line
    train("builtin:digits", out=out, resume=True)
    assert (out / "metrics.jsonl").read_bytes() == (tmp_path / "plain" / "metrics.jsonl").read_bytes()
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "plain" / "model.safetensors").read_bytes()


def test_what_a_killed_run_left_unfinished_goes(tmp_path):
    out = tmp_path / "run"
    train("builtin:digits", out=out, **QUICK | {"epochs": 0.5})
    for place in (out, out / "checkpoints"):
        (place / f"{PARTIAL}0").mkdir()
        (place / f"{PARTIAL}0" / "model.safetensors").write_bytes(b"half")
    (out / "checkpoints" / "step-000000099.safetensors").touch()
    train("builtin:digits", out=out, resume=True)
    assert not list(out.rglob(f"{PARTIAL}*"))
    assert not (out / "checkpoints" / "step-000000099.safetensors").exists()


def test_a_run_that_was_killed_before_it_began_may_begin(tmp_path):
    out = tmp_path / "run"
    Store(out / "checkpoints").save(State(Plan(9)), {"x": torch.ones(1)})
    train("builtin:digits", out=out, **QUICK | {"epochs": 0.1})
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint to go on from"):
        train("builtin:digits", out=out, resume=True)


# Saving beside the training


def test_what_is_saved_is_what_it_was(tmp_path):
    store, weights, state = Store(tmp_path), torch.zeros(1000), State(Plan(9), step=1)
    saver = Saver(store, first=lambda: time.sleep(0.2))
    saver.start(state, {"w": weights})
    assert saver.busy
    weights += 1  # the training goes on
    state.step, state.metrics["late"] = 2, 1.0
    saver.wait()
    found, tensors, _ = store.newest()
    assert (found.step, found.metrics, tensors["w"].abs().max()) == (1, {}, 0)


def test_a_save_that_fails_is_told_at_the_next_look(tmp_path):
    (tmp_path / "file").touch()
    saver = Saver(Store(tmp_path / "file" / "checkpoints"))
    saver.start(State(Plan(9)), {"w": torch.ones(1)})
    with pytest.raises(WorkError, match="--resume"):
        saver.wait()
    saver.wait()  # it is told once


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from sightline.training.schedule import Plan
from sightline.training.settings import Settings
from sightline.training.state import State, Store

number, count = int(sys.argv[2]), 0

def deadly(plain):
    def call(*words, **names):
        global count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*words, **names)
    return call

for name in ("mkdir", "fsync", "replace", "unlink", "chmod", "rmdir", "open"):
    setattr(os, name, deadly(getattr(os, name)))
Store(Path(sys.argv[1])).save(State(Plan(9), step=4), {"w": torch.full((9,), 4.0)})
os.write(1, str(count).encode())
"""


def test_killed_at_every_call_of_a_save(tmp_path):
    """The same with strace, at every system call: proofs/syscalls.py."""

    def save(folder: Path, number: int) -> int | None:
        """Saves in a forked process that is killed at this call; the number of calls where there are fewer."""
        first, second = os.pipe()
        process = os.fork()
        if not process:
            os.dup2(second, 1)
            sys.argv = ["save", str(folder), str(number)]
            exec(KILLED, {})
            os._exit(0)
        os.close(second)
        _, status = os.waitpid(process, 0)
        with os.fdopen(first) as said:
            return int(said.read()) if status == 0 else None

    number, total = 1, None
    while total is None:
        folder = tmp_path / str(number)
        store = Store(folder)
        for step in (1, 2, 3):
            store.save(State(Plan(9), step=step), {"w": torch.full((9,), float(step))})
        total = save(folder, number)
        state, tensors, passed = store.newest()
        assert passed == []
        assert state.step in (3, 4)
        assert tensors["w"].tolist() == [state.step] * 9
        store.tidy(state.step)
        assert not list(folder.glob(f"{PARTIAL}*"))
        number += 1
    assert total > 10


# Signals


def test_a_signal_in_an_evaluation_ends_it_and_the_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    from sightline.recipes import train as running

    settings = QUICK | {"epochs": 3, "ema": 0.9}
    train("builtin:digits", out=tmp_path / "plain", **settings)
    plain, seen = running.weigh, []

    def interrupted(network, batches, *words, heed, **names):
        def stopping():
            for loaded in batches:
                seen.append(loaded.step)
                if seen.count(0) == 2 and loaded.step == 1:  # in the second evaluation, before its third batch
                    os.kill(os.getpid(), signal.SIGTERM)
                yield loaded

        return plain(network, stopping(), *words, heed=heed, **names)

    monkeypatch.setattr(running, "weigh", interrupted)
    with pytest.raises(Interrupted) as stop:
        train("builtin:digits", out=tmp_path / "run", **settings)
    assert stop.value.status == 143
    assert seen[-1] == 1
    monkeypatch.setattr(running, "weigh", plain)
    assert Store(tmp_path / "run" / "checkpoints").newest()[0].due
    train("builtin:digits", out=tmp_path / "run", resume=True)
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_a_signal_while_the_report_is_written_loses_nothing(tmp_path, monkeypatch):
    from sightline.recipes import train as running

    def stopped(*words, **names):
        raise KeyboardInterrupt(signal.SIGTERM)  # as the command's own handler does

    monkeypatch.setattr(running, "write_model", stopped)
    with pytest.raises(Interrupted, match="everything so far is saved") as stop:
        train("builtin:digits", out=tmp_path / "run", **QUICK)
    assert stop.value.status == 143
    monkeypatch.undo()
    train("builtin:digits", out=tmp_path / "run", resume=True)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


LONG = """
import time
from hashlib import pbkdf2_hmac
from sightline.training.signals import listening

with listening() as request:
    print("ready", flush=True)
    while not request.number:
        time.sleep(0.01)
    print("heard", flush=True)
    pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # like those of a network: long, and no handler of Python's runs in it
"""


def test_a_second_signal_does_not_wait_for_the_operation_at_work():
    with subprocess.Popen([sys.executable, "-c", LONG], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.terminate()
            assert process.stdout.readline() == "heard\n"
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            began = time.monotonic()
            assert process.wait(timeout=60) == 130
            assert time.monotonic() - began < 5
        finally:
            process.kill()


def test_random_kills_of_the_command(tmp_path):
    """A few; proofs/kills.py makes hundreds."""
    data = drawn(tmp_path / "data", 24, broken=(5,))
    words = ("train", data, "--epochs", 30, "--batch-size", 8, *TINY[:-1], 2, "--ema", 0.9, "--mixup", 0.2)
    words += ("--drop-path-rate", 0.2, "--refused-limit", 0.1, "--save-seconds", 0.05, "--quiet", "--out")
    began = time.monotonic()
    assert ended(started(*words, tmp_path / "plain")).status == 0
    life, moments = time.monotonic() - began, random.Random(1)
    for _ in range(2):
        resume = ["--resume"] if (tmp_path / "run" / "run.json").exists() else []
        process = started(*words, tmp_path / "run", *resume, start_new_session=True)
        time.sleep(moments.uniform(0.4, 0.9) * life)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    resume = ["--resume"] if (tmp_path / "run" / "run.json").exists() else []
    assert ended(started(*words, tmp_path / "run", *resume)).status == 0
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
