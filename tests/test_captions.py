"""Images with captions: files that are read and refused, and the task through the commands."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command import cli, ended, started
from sightline.datasets.captions import has_captions, read_captions
from sightline.errors import UserError

NET = ("--model", "vit_femto_patch4_32", "--image-size", 16, "--batch-size", 16, "--workers", 0, "--lr", 0.002)
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 60, 220), "white": (240, 240, 240)}


def pictures(folder: Path, count: int) -> list[tuple[str, str]]:
    """Squares of four colours, above or below, with what is said of them."""
    draw, rows = np.random.default_rng(0), []
    for i in range(count):
        colour = list(COLOURS)[i % 4]
        canvas = draw.integers(90, 110, (16, 16, 3)).astype(np.uint8)
        top = 1 if i // 4 % 2 else 9
        left = int(draw.integers(1, 9))
        canvas[top : top + 6, left : left + 6] = COLOURS[colour]
        Image.fromarray(canvas).save(folder / f"{i:03}.png")
        rows.append((f"{i:03}.png", f"a {colour} square {'above' if i // 4 % 2 else 'below'}"))
    return rows


def table(folder: Path, rows: list[tuple[str, ...]], head: str = "path,caption") -> Path:
    path = folder / "captions.csv"
    path.write_text("\n".join([head, *(",".join(row) for row in rows)]) + "\n")
    return path


def lines(folder: Path, rows: list[dict]) -> Path:
    path = folder / "captions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_both_forms_say_the_same(tmp_path: Path) -> None:
    rows = [*pictures(tmp_path, 10), ("003.png", "another word for it"), ("003.png", "another word for it")]
    one = read_captions(table(tmp_path, rows), 3, 0.2)
    other = read_captions(lines(tmp_path, [{"path": p, "caption": c} for p, c in rows]), 3, 0.2)
    assert one.train.fingerprint() == other.train.fingerprint()
    assert one.val.fingerprint() == other.val.fingerprint()
    assert (len(one.train), len(one.val)) == (8, 2)
    both = {s.name: s.target.captions for part in (one.train, one.val) for s in part.samples}
    assert both["003.png"] == ("a white square below", "another word for it")
    assert any("left out: 1" in note for note in one.notes)
    assert read_captions(tmp_path, 3, 0.2).source.endswith("captions.jsonl")


def test_the_split_follows_from_seed_and_name_or_from_the_file(tmp_path: Path) -> None:
    rows = pictures(tmp_path, 12)
    held = [set(read_captions(table(tmp_path, rows), seed, 0.25).val.samples.names) for seed in (0, 0, 1)]
    assert held[0] == held[1] != held[2]
    shuffled = read_captions(table(tmp_path, rows[::-1]), 0, 0.25)
    assert set(shuffled.val.samples.names) == held[0]
    told = [(*row, "val" if i < 5 else "train") for i, row in enumerate(rows)]
    assert len(read_captions(table(tmp_path, told, "path,caption,split"), 0, 0.25).val) == 5


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"path,caption\n000.png,\n", "line 2: the caption is empty"),
        (b"path,caption\n000.png,r\xe9sum\n", "line 2: the caption is not UTF-8"),
        (b"path,caption\nnone.png,x\n", "line 2: there is no such file"),
        (b"path,caption\n../000.png,x\n", "lies outside"),
        (b"path,caption\n,x\n", "the path is missing"),
        (b"path,caption\n000.png,x,y\n", "more cells"),
        (b"path,caption,split\n000.png,x,train\n000.png,y,val\n", "another part in line 2"),
        (b"path,caption,split\n000.png,x,somewhere\n", "the split is"),
        (b"path,caption\n000.png," + b"x" * 10_001 + b"\n", "longer than any"),
        (b"path,caption\n000.png,x\n", "1 images have captions"),
        (b"path,caption,split\n000.png,x,val\n001.png,y,val\n", "never says 'train'"),
        (b"path,caption\n" + b"y" * 2**20, "characters"),
    ],
)
def test_rows_that_cannot_be_meant_are_refused(tmp_path: Path, content: bytes, fault: str) -> None:
    pictures(tmp_path, 2)
    (tmp_path / "captions.csv").write_bytes(content)
    with pytest.raises(UserError, match=fault):
        read_captions(tmp_path / "captions.csv", 0, 0.2)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "line 2: it is not JSON"),
        ("[1]", "path and caption is expected"),
        ('{"path": "000.png", "caption": 3}', "path and caption is expected"),
        ('{"path": "000.png", "caption": "\\ud800"}', "not UTF-8"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_lines_that_cannot_be_meant_are_refused(tmp_path: Path, line: str, fault: str) -> None:
    pictures(tmp_path, 2)
    path = tmp_path / "captions.jsonl"
    path.write_text('{"path": "000.png", "caption": "x"}\n' + line)
    with pytest.raises(UserError, match=fault):
        read_captions(path, 0, 0.2)


def test_what_has_no_captions_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("path,label\n")
    assert not has_captions(tmp_path / "labels.csv")
    assert not has_captions(tmp_path)
    with pytest.raises(UserError, match="path,caption"):
        read_captions(tmp_path / "labels.csv", 0, 0.2)
    with pytest.raises(UserError, match="does not exist"):
        read_captions(tmp_path / "none.csv", 0, 0.2)


def test_check_names_every_fault(tmp_path: Path) -> None:
    rows = pictures(tmp_path, 8)
    content = "path,caption\n" + "\n".join(",".join(row) for row in rows) + "\n001.png,\nnone.png,x\n002.png,r"
    (tmp_path / "captions.csv").write_bytes(content.encode() + b"\xe9\n")
    done = cli("check", tmp_path / "captions.csv", "--json", "--quiet", "--workers", 0)
    assert done.status == 2
    found = [(f["kind"], f["reason"].split(": ")[-1]) for f in done.document["findings"]]
    assert ("caption", "the caption is empty") in found
    assert ("row", "'none.png'") in found
    assert any(kind == "caption" and "not UTF-8" in reason for kind, reason in found)
    (tmp_path / "captions.csv").write_text(content.split("\n001.png,\n")[0] + "\n")
    done = cli("check", tmp_path / "captions.csv", "--json", "--quiet", "--workers", 0)
    assert "caption" not in [f["kind"] for f in done.document["findings"]]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict]:
    """A model that learned four colours from captions."""
    folder = tmp_path_factory.mktemp("captions")
    (folder / "data").mkdir()
    data = table(folder / "data", pictures(folder / "data", 64))
    done = cli("train", data, "--task", "clip", *NET, "--epochs", "40", "--json", "--quiet", "--out", folder / "run")
    assert done.status == 0, done.err
    return folder, done.document


def test_it_learns_and_says_so(run) -> None:
    folder, told = run
    assert told["task"] == "clip"
    assert told["metrics"]["image_to_text_r1"] >= 0.75  # one in eight by chance
    page = (folder / "run" / "report.html").read_text()
    assert "recall@1" in page
    assert "a red square" in page or "a blue square" in page
    assert "top-1" not in (folder / "run" / "README.md").read_text()


def test_its_captions_are_found_again(run) -> None:
    folder, told = run
    done = cli("evaluate", str(folder / "run"), str(folder / "data" / "captions.csv"), "--json")
    found = done.document
    assert found["metrics"] == pytest.approx(told["metrics"], abs=1e-6)


def test_classes_that_it_never_saw_as_classes(run) -> None:
    folder, _ = run
    for i, name in enumerate(pictures(folder / "data", 64)):
        colour = name[1].split()[1]
        target = folder / "classes" / colour / f"{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((folder / "data" / name[0]).read_bytes())
    prompts = "a {} square above|a {} square below"
    done = cli("evaluate", str(folder / "run"), str(folder / "classes"), "--prompts", prompts, "--json")
    assert done.status == 0, done.err
    assert done.document["metrics"]["zero_shot_top1"] >= 0.75
    asked = ("--labels", "red,blue", "--prompts", prompts, "--json")
    done = cli("predict", str(folder / "run"), str(folder / "data" / "000.png"), *asked)
    (result,) = done.document["results"]
    assert result["predictions"][0]["label"] == "red"
    refused = cli("predict", str(folder / "run"), str(folder / "data" / "000.png"))
    assert (refused.status, "name labels" in refused.err) == (2, True)


def test_classes_alone_are_nothing_to_learn_texts_from(run, tmp_path: Path) -> None:
    folder, _ = run
    done = cli("train", str(folder / "classes"), "--task", "clip", "--out", str(tmp_path / "run"))
    assert done.status == 2
    assert "captions" in done.err


def test_a_run_that_was_stopped_ends_with_the_same_bits(run, tmp_path: Path) -> None:
    folder, _ = run
    out, data = tmp_path / "run", folder / "data" / "captions.csv"
    words = ("--task", "clip", *NET, "--epochs", "40", "--out", out, "--save-seconds", "0.1", "--quiet")
    process = started("train", data, *words)
    until = time.monotonic() + 60
    while not any("000000000" not in file.name for file in out.glob("checkpoints/step-*")) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    stopped = ended(process)
    assert stopped.status in (0, 143)
    if stopped.status:
        assert cli("train", data, "--out", out, "--resume").status == 0
    assert (out / "model.safetensors").read_bytes() == (folder / "run" / "model.safetensors").read_bytes()
    assert (out / "vocabulary.json").read_bytes() == (folder / "run" / "vocabulary.json").read_bytes()


def test_the_objective_by_its_own_name_runs_the_task(run, tmp_path) -> None:
    folder, _ = run
    words = (*NET, "--epochs", "1", "--json", "--quiet", "--out", tmp_path / "run")
    said = cli("pretrain", folder / "data" / "captions.csv", "--objective", "clip", *words)
    assert said.status == 0, said.err
    assert said.document["task"] == "clip"
    assert "image_to_text_r1" in said.document["metrics"]
