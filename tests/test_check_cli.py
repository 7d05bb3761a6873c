"""`sightline check` as users run it."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command import cli, ended, refusal, started
from sightline.images.preprocess import Preprocess
from sightline.model import Model
from sightline.network import create_model
from test_check import encoded, scene, sound, write
from test_datasets import tree


def test_a_sound_set_is_fit(tmp_path):
    said = cli("check", sound(tmp_path), "--quiet")
    assert said.status == 0
    assert said.err == ""
    assert "24 images of 2 classes (12 to 12 each)" in said.out
    assert "0 errors, 0 warnings, 0 notes: nothing that would make training wrong" in said.out


def test_a_leak_is_not(tmp_path):
    root = sound(tmp_path / "set")
    write(root / "val/a/leak.png", (root / "train/a/000.png").read_bytes())
    before = tree(root)
    page = tmp_path / "page.html"
    said = ended(started("check", root, "--html", page))
    assert said.status == 2
    assert "the same image in train and val: 'train/a/000.png', 'val/a/leak.png'" in said.out
    assert "1 error, 0 warnings, 0 notes: training on it would be wrong" in said.out
    assert "reading 31 images" in said.err
    assert tree(root) == before  # nothing was written or changed
    assert page.read_text().count("<img") == 2


def test_json_is_one_document(tmp_path):
    root = sound(tmp_path)
    write(root / "train/a/\udcffé\n.png", b"")
    said = cli("check", root, "--json", "--workers", 0)
    assert said.status == 2  # 1 of 25 is more than 1 %
    document = said.document
    assert document["fit"] is False
    assert document["counts"] == {"images": 31, "readable": 30, "error": 1, "warning": 1, "note": 0}
    assert document["kinds"] == {"refused-share": 1, "empty-file": 1}
    assert document["findings"][1] == {
        "kind": "empty-file",
        "severity": "warning",
        "reason": "the file is empty (0 bytes)",
        "remedy": "copy them again, or remove them",
        "files": ["train/a/\udcffé\n.png"],  # byte for byte
        "classes": ["a"],
    }


def test_names_are_escaped_wherever_they_are_printed(tmp_path):
    root = sound(tmp_path / "set", classes=("a", "<b>bold</b>".replace("/", "")))
    name = "<img src=x onerror=alert(1)>\x1b[31m.png"
    for part in ("train", "val"):
        write(root / part / "a" / name, encoded(scene(77)))
    page = tmp_path / "page.html"
    said = cli("check", root, "--html", page)
    assert said.status == 2
    assert "\x1b" not in said.out
    text = page.read_text()
    assert "<img src=x" not in text
    assert "<script" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;\\x1b[31m.png" in text
    assert "\x1b" not in text


def test_a_model_tells_suspicious_labels(tmp_path):
    network = create_model("vit_tiny_patch16_224", 2, 32, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    model = Model(network, Preprocess(size=(32, 32)), ["bright", "dark"]).save(tmp_path / "model")
    data = tmp_path / "data"
    for i in range(40):  # two kinds that any network tells apart; one of each bears the other's name
        bright = i % 2
        grey = np.random.default_rng(i).normal(200 if bright else 50, 20, (8, 8)).clip(0, 255).astype(np.uint8)
        label = "bright" if bright != (i in (4, 7)) else "dark"
        write(data / label / f"{i:02}.png", encoded(Image.fromarray(grey)))
    said = cli("check", data, "--model", model, "--json", "--quiet", "--workers", 0)
    assert said.status == 0
    found = [f["files"] for f in said.document["findings"] if f["kind"] == "suspicious-label"]
    assert sorted(found) == [["bright/04.png"], ["dark/07.png"]]


def test_requests_that_cannot_be_met(tmp_path):
    root = sound(tmp_path)
    assert "leave out --quick or --model" in refusal("check", root, "--quick", "--model", "x")
    assert "workers must not be negative" in refusal("check", root, "--workers", "-1")
    assert "is a folder" in refusal("check", root, "--html", tmp_path)
    assert "does not exist" in refusal("check", tmp_path / "nowhere", "--quiet")


@pytest.mark.parametrize("seconds", [0, 0.5])  # while the processes are started, and while they are at work
def test_ctrl_c_ends_it_with_all_its_processes(seconds, tmp_path):
    root = sound(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    first = write(root / "train/a/big.png", encoded(Image.fromarray(noise), compress_level=1))
    for i in range(400):
        os.link(first, root / f"train/a/big{i}.png")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background may ignore it
    process = started("check", root, "--workers", 2, start_new_session=True)
    signal.signal(signal.SIGINT, before)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until = time.monotonic() + 60
    while len(workers := children.read_text().split()) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert len(workers) == 2
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    said = ended(process)
    assert said.status == 130
    assert said.out == ""
    assert "stopped by SIGINT" in said.err.splitlines()[-1]
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_help_has_an_example():
    said = cli("check", "--help")
    assert said.status == 0
    assert "example: sightline check" in said.out
