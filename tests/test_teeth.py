"""Guards that only something rare would show: a power cut, a pipe in place of a file, another seed."""

import io
import json
import os
import pickle
import signal
import stat
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from sightline.checkpoints import pickles
from sightline.checkpoints.atomic import write_atomic
from sightline.checkpoints.directory import write_model
from sightline.checkpoints.files import read_tensors
from sightline.checkpoints.load import load_bundle
from sightline.checkpoints.sealed import parse_json
from sightline.datasets.image_set import ImageSet, Names, Samples
from sightline.datasets.open import open_dataset
from sightline.datasets.split import hold_out
from sightline.errors import UserError
from sightline.evaluation.accuracy import accuracy
from sightline.images.decode import ImageError, decode
from sightline.images.preprocess import Preprocess
from sightline.network import create_model
from sightline.recipes.evaluate import evaluate
from sightline.recipes.train import train
from sightline.schema import from_json
from sightline.training.run import RunFolder
from sightline.training.saver import Saver
from sightline.training.schedule import Plan
from sightline.training.settings import Settings
from sightline.training.state import State, Store
from sightline.types import Batch
from test_checkpoints_refusals import reseal


@pytest.fixture
def events(monkeypatch) -> list[tuple[str, str | int]]:
    """What is asked of the disk, in order: ("sync", inode or "folder"), ("rename", name), ("remove", name)."""
    seen: list[tuple[str, str | int]] = []
    sync, rename, remove = os.fsync, os.replace, os.unlink

    def synced(handle):
        status = os.fstat(handle)
        seen.append(("sync", "folder" if stat.S_ISDIR(status.st_mode) else status.st_ino))
        sync(handle)

    def renamed(source, target, **options):
        seen.append(("rename", Path(target).name))
        rename(source, target, **options)

    def removed(path, **options):
        if Path(path).exists():
            seen.append(("remove", Path(path).name))
        remove(path, **options)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    monkeypatch.setattr(os, "unlink", removed)
    return seen


def saved(store: Store, step: int) -> None:
    store.save(State(Plan(9), step=step), {"w": torch.ones(3)})


# Writing


def test_a_file_survives_a_power_cut_at_any_moment(tmp_path, events):
    file = tmp_path / "x.bin"
    file.write_bytes(b"old")
    write_atomic(file, b"new")
    assert events == [("sync", file.stat().st_ino), ("rename", "x.bin"), ("sync", "folder")]
    assert file.read_bytes() == b"new"


def test_tensors_are_safe_before_the_manifest_speaks_of_them(tmp_path, events):
    saved(Store(tmp_path), 7)
    tensors, manifest = (tmp_path / f"step-000000007.{kind}" for kind in ("safetensors", "json"))
    assert events == [
        step
        for file in (tensors, manifest)
        for step in (("sync", file.stat().st_ino), ("rename", file.name), ("sync", "folder"))
    ]


def test_a_checkpoint_loses_its_manifest_before_its_tensors(tmp_path, events):
    store = Store(tmp_path)
    for step in range(4):
        saved(store, step)
    removed = [name for what, name in events if what == "remove"]
    assert removed == ["step-000000000.json", "step-000000000.safetensors"]


def test_figures_are_safe_before_the_state_that_counts_them(tmp_path, events):
    saver = Saver(Store(tmp_path), first=lambda: events.append(("sync", "figures")))
    saver.save(State(Plan(9)), {"w": torch.ones(3)})
    assert events[0] == ("sync", "figures")
    assert ("rename", "step-000000000.json") in events


# Reading


def test_a_record_without_its_seal_is_not_believed(tmp_path):
    folder = RunFolder(tmp_path)
    record = {"seed": 1, "data": {"source": "x", "fingerprint": {}}, "recipe": {}}
    folder.write(record)
    assert folder.read() == record
    folder.record_file.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"run\.json"):
        folder.read()


def test_weights_are_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(UserError, match="not a regular file"):
        read_tensors(tmp_path / "pipe.safetensors")


def test_a_name_that_stands_twice_in_an_object():
    with pytest.raises(UserError, match="appears twice"):
        parse_json(b'{"a": 1, "a": 2}', "here")


def test_a_whole_number_larger_than_any_float():
    with pytest.raises(UserError, match="mean has to be three numbers"):
        Preprocess.from_json({"size": [8, 8], "mean": [10**400, 0, 0]})
    with pytest.raises(UserError, match="lr: expected"):
        from_json(Settings, {"lr": 10**400}, "here")


def test_a_pickle_of_odd_or_endless_instructions(monkeypatch):
    with pytest.raises(UserError, match="an instruction that no state dict needs"):
        pickles.read_pickle(io.BytesIO(b"\x80\x02\x82\x01."), "here")  # an object by a number
    monkeypatch.setattr(pickles, "_MOST_STEPS", 10)
    with pytest.raises(UserError, match="longer than that of any state dict"):
        pickles.read_pickle(io.BytesIO(b"\x80\x02" + b"N0" * 10 + b"N."), "here")


@pytest.mark.parametrize(
    ("offset", "size", "stride"), [(-4, (2,), (1,)), (0, (2.0,), (1,)), (0, (2,), (-1,)), (0, (2,), (1, 1)), (0, 2, 1)]
)
def test_a_tensor_is_described_in_whole_numbers(tmp_path, offset, size, stride):
    numbers = object()

    class Odd:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (numbers, offset, size, stride, False, {})

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if value is numbers else None

    program = io.BytesIO()
    Pickler(program, 2).dump({"w": Odd()})
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", program.getvalue())
        archive.writestr("x/data/0", bytes(16))
    with pytest.raises(UserError, match="'w' is described in an unknown way"):
        read_tensors(tmp_path / "x.pth")


def test_a_table_that_is_computed_is_bounded_before_its_tokens_are(tmp_path):
    size = {"image_size": 8, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 1, "positions": "relative"}
    write_model(tmp_path, create_model("vit_tiny_patch16_224", 2, **size), Preprocess((8, 8)), "ab")
    architecture = json.loads((tmp_path / "config.json").read_text())["architecture"]
    architecture["backbone"]["image_size"] = [4800, 4800]  # 360,000 tokens, which a network may have
    reseal(tmp_path, architecture=architecture)
    with pytest.raises(UserError, match=r"makes too many patches$"):
        load_bundle(tmp_path)


def test_an_old_file_ends_with_its_last_tensor(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert read_tensors(tmp_path / "x.pth").tensors["w"].tolist() == [1, 1, 1]
    with (tmp_path / "x.pth").open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match="4 bytes behind its last tensor"):
        read_tensors(tmp_path / "x.pth")


def test_what_is_no_file_is_not_even_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "x.png")
    opened: list[str] = []
    monkeypatch.setattr(os, "open", lambda path, *_: opened.append(str(path)))
    with pytest.raises(ImageError, match="not a regular file"):
        decode(tmp_path / "x.png")
    assert opened == []


def test_whatever_a_decoder_raises_is_damage(tmp_path, monkeypatch):
    def odd(self):
        raise ZeroDivisionError("an odd table")

    Image.new("RGB", (5, 3)).save(tmp_path / "x.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", odd)
    with pytest.raises(ImageError, match=r"damaged \(an odd table\)"):
        decode(tmp_path / "x.png")


def test_an_enlarged_sliver_is_never_computed_whole(monkeypatch):
    def bounded(batch, size, **options):
        assert size[0] * size[1] <= 2**22
        return enlarged(batch, size=size, **options)

    enlarged = torch.nn.functional.interpolate
    monkeypatch.setattr(torch.nn.functional, "interpolate", bounded)
    assert Preprocess((224, 224)).pixels(np.zeros((1, 4000, 3), dtype=np.uint8)).shape == (3, 224, 224)


def test_a_file_that_becomes_a_pipe_is_still_refused(tmp_path, monkeypatch):
    def late(number, frame):
        raise TimeoutError("it waited for the other end of a pipe")

    os.mkfifo(tmp_path / "x.png")
    (tmp_path / "regular").write_bytes(b"x")
    regular = (tmp_path / "regular").stat()
    monkeypatch.setattr(Path, "stat", lambda path, **options: regular)  # what it was a moment ago
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 5)
    try:
        with pytest.raises(ImageError, match="not a regular file"):
            decode(tmp_path / "x.png")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_header_of_names_is_bounded(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes((100).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="its header does not fit into it"):
        read_tensors(tmp_path / "cut.safetensors")
    file = tmp_path / "x.safetensors"
    file.write_bytes((17 * 2**20).to_bytes(8, "little"))
    os.truncate(file, 18 * 2**20)
    with pytest.raises(UserError, match="larger than any model needs"):
        read_tensors(file)


# Data


def test_members_of_a_zip_share_no_bytes(tmp_path):
    inner, outer = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("b/1.png", bytes(50))
    content = inner.getvalue()
    member, entry = content[: content.index(b"PK\1\2")], content[content.index(b"PK\1\2") : -22]
    with zipfile.ZipFile(outer, "w") as archive:
        archive.writestr("a/1.png", member)  # one member is the content of another, and the list names both
    data = outer.getvalue()
    entry = entry[:42] + struct.pack("<L", data.index(member)) + entry[46:]
    length, start = struct.unpack("<LL", data[-10:-2])
    end = b"PK\5\6" + struct.pack("<HHHHLLH", 0, 0, 2, 2, length + len(entry), start, 0)
    (tmp_path / "x.zip").write_bytes(data[:-22] + entry + end)
    with pytest.raises(UserError, match=r"'a/1\.png' is damaged: it reaches into what follows it"):
        open_dataset(tmp_path / "x.zip")


def test_another_seed_holds_out_other_images():
    images = ImageSet(("a", "b"), Samples(Names(map(str, range(60))), np.arange(60) % 2))
    held = {tuple(hold_out(images, "here", seed=seed, share=0.2).val.samples.names) for seed in range(5)}
    assert len(held) == 5


def test_a_run_goes_on_with_the_images_it_began_with(tmp_path):
    data, out = tmp_path / "data", tmp_path / "run"
    for i in range(12):
        file = data / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(file)
    tiny = {"embed_dim": 8, "depth": 1, "num_heads": 1}
    train(data, out=out, image_size=8, network=tiny, epochs=1, workers=0)
    Image.fromarray(np.full((9, 9, 3), 7, np.uint8)).save(data / "a/0.png")
    with pytest.raises(UserError, match="have changed"):
        train(data, out=out, resume=True)


def test_an_evaluation_counts_what_it_could_not_read():
    targets = torch.tensor([0, 1])
    batch = Batch(torch.eye(2)[:, :, None, None], targets, torch.arange(2), torch.zeros(2, dtype=torch.int64))
    broken = [("2.png", "cut"), ("3.png", "empty")]

    class Sure(torch.nn.Module):
        def forward(self, pixels, sizes=None):
            return pixels.flatten(1)

    counts = accuracy(Sure(), [(0, batch, broken[:1]), (1, None, broken[1:])], 2, device=torch.device("cpu"))
    assert counts.refused == broken
    assert counts.metrics()["top1"] == 0.5


def test_a_model_is_judged_on_its_own_classes_by_name(tmp_path):
    network = create_model("vit_tiny_patch16_224", 2, image_size=8, patch_size=8, embed_dim=4, depth=1, num_heads=1)
    network.head.classifier.bias.data[0] = 9.0  # whatever it sees, it says 'b'
    write_model(tmp_path / "model", network, Preprocess((8, 8)), ("b", "a"))
    for name in ("a/1", "a/2", "a/3", "b/1"):
        file = tmp_path / "data" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), ord(name[2]), np.uint8)).save(file)
    found = evaluate(tmp_path / "model", tmp_path / "data", workers=0)
    assert found.metrics["top1"] == 0.25
    assert [(row["label"], row["images"], row["recall"]) for row in found.details["per_class"]] == [
        ("b", 1, 1.0),
        ("a", 3, 0.0),
    ]
    (tmp_path / "data/b").rename(tmp_path / "data/c")
    with pytest.raises(UserError, match="only the model knows 'b'"):
        evaluate(tmp_path / "model", tmp_path / "data", workers=0)
