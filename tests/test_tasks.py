"""Detection and segmentation through the commands: from files to a model directory, an evaluation, answers, pages."""

import json
import signal
import time

import numpy as np
import pytest
from PIL import Image

import sightline
from command import cli, ended, refusal, started
from marked_sets import write_coco, write_masks

NET = ("--embed-dim", 16, "--depth", 1, "--num-heads", 2, "--workers", 0, "--batch-size", 8)
SETS = {"detect": write_coco, "segment": write_masks}
EXTRA = {"detect": ("--hidden-dim=16", "--decoder-layers=1", "--decoder-heads=2", "--decoder-mlp=16"), "segment": ()}
METRICS = {"detect": {"ap", "ap50", "ap75"}, "segment": {"miou", "pixel_accuracy"}}


@pytest.fixture(scope="module", params=["detect", "segment"])
def run(request, tmp_path_factory):
    """A task, its data and a small model of it, with what its training said."""
    task, folder = request.param, tmp_path_factory.mktemp(request.param)
    data = SETS[task](folder / "data")
    words = ("train", data, "--task", task, *NET, *EXTRA[task], "--epochs", 2, "--out", folder / "model", "--json")
    return task, data, folder / "model", cli(*words)


def test_training_says_what_it_reached(run):
    task, _, model, said = run
    assert said.status == 0, said.err
    assert said.document["task"] == task
    assert said.document["metrics"].keys() >= METRICS[task]
    assert all(0 <= said.document["metrics"][name] <= 1 for name in METRICS[task])
    record = json.loads((model / "run.json").read_text())
    assert record["task"] == task
    report = (model / "report.html").read_text()
    assert "Worst images" in report
    assert report.count("data:image/png") >= 2
    assert f"# {model.name}" in (model / "README.md").read_text()
    assert json.loads((model / "config.json").read_text())["task"] == task


def test_an_evaluation_finds_the_same(run):
    _, data, model, said = run
    again = cli("evaluate", model, data, "--workers", 0, "--json")
    assert again.status == 0, again.err
    assert again.document["metrics"] == pytest.approx(said.document["metrics"])
    assert len(again.document["per_class"]) == len(again.document["labels"])
    plain = cli("evaluate", model, data, "--workers", 0)
    assert "circle" in plain.out


def test_answers_have_the_form_that_is_promised(run, tmp_path):
    task, data, model, _ = run
    Image.new("RGB", (50, 34), (90, 80, 70)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    said = cli("predict", model, tmp_path / "a.png", tmp_path / "b.png", data / "images" / "0001.png",
               "--out", tmp_path / "out", "--json", "--csv", tmp_path / "t.csv")  # fmt: skip
    assert said.status == 1
    first, broken, second = said.document["results"]
    assert "cannot decode" in broken["error"]
    assert said.document["task"] == task
    if task == "segment":
        mask = np.asarray(Image.open(first["mask"]))
        assert mask.shape == (34, 50)
        assert sum(row["fraction"] for row in first["classes"]) == pytest.approx(1)
        assert {row["index"] for row in first["classes"]} == set(np.unique(mask).tolist())
        assert np.asarray(Image.open(second["mask"])).shape == (64, 64)
    else:
        for row in (*first["detections"], *second["detections"]):
            assert row.keys() == {"label", "index", "score", "box"}
            assert 0 <= row["box"][0] <= row["box"][2] <= 64
    assert cli("predict", model, tmp_path / "a.png", "--out", tmp_path / "out").status == 0


def test_an_explanation_shows_the_answer(run, tmp_path):
    task, data, model, _ = run
    said = cli("explain", model, data / "images" / "0002.png", "--out", tmp_path, "--json")
    assert said.status == 0, said.err
    (result,) = said.document["results"]
    pictures = {path.name for path in (tmp_path / "0002").iterdir()}
    assert {"answer.png", "rollout.png", "index.html"} <= pictures
    with np.load(result["arrays"]) as arrays:
        assert ("gaze" in arrays) == (task == "detect")  # the small segmenter has a linear decoder
        if task == "detect":
            assert arrays["gaze"].shape[1:] == (8, 8)


def test_python_gives_boxes_and_masks(run):
    task, data, model, _ = run
    loaded = sightline.load(model)
    (answer,) = loaded.predict([data / "images" / "0003.png"])
    assert loaded.task == task
    if task == "segment":
        assert answer.mask.shape == (64, 64)
    else:
        assert all(0 <= found.score <= 1 for found in answer.boxes)


def test_a_run_that_was_stopped_ends_with_the_same_bits(run, tmp_path):
    task, data, model, _ = run
    words = ("train", data, "--task", task, *NET, *EXTRA[task], "--epochs", 2, "--out", tmp_path / "model")
    process = started(*words, "--save-seconds", 0.01)
    until, places = time.monotonic() + 60, tmp_path / "model" / "checkpoints"
    while not [p for p in places.glob("step-*") if "000000000" not in p.name] and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    stopped = ended(process)
    assert stopped.status in (0, 143)  # it may have been quicker
    if stopped.status:
        assert "--resume" in stopped.err
        assert cli("train", data, "--out", tmp_path / "model", "--resume").status == 0
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_bad_files_cost_themselves_alone(run, tmp_path):
    task, *_ = run
    data = SETS[task](tmp_path / "data")
    (data / "images" / "0001.png").write_bytes(b"")
    words = ("train", data, "--task", task, *NET, *EXTRA[task], "--epochs", 1, "--refused-limit", 0.2)
    said = cli(*words, "--out", tmp_path / "model")
    assert said.status == 0, said.err
    assert "0001.png" in said.err


def test_a_backbone_that_has_learned_can_take_up_another_task(run, tmp_path):
    task, _, model, _ = run
    other = "segment" if task == "detect" else "detect"
    there = SETS[other](tmp_path / "data")
    words = ("train", there, "--task", other, "--weights", model, *EXTRA[other], "--workers", 0, "--epochs", 1)
    said = cli(*words, "--out", tmp_path / "tuned", "--json")
    assert said.status == 0, said.err
    assert said.document["metrics"].keys() >= METRICS[other]


def test_what_mixes_labels_is_refused(run, tmp_path):
    task, data, *_ = run
    assert "mixup is for images with one class" in refusal(
        "train", data, "--task", task, "--mixup", 0.2, "--out", tmp_path / "m"
    )


def test_requests_that_make_no_sense_are_refused(tmp_path):
    assert "Did you mean segment" in refusal("train", tmp_path, "--task", "segmnt", "--out", tmp_path / "m")
    assert "--task detect" in refusal("train", "builtin:scenes", "--out", tmp_path / "m")
    assert "expected annotations" in refusal("train", tmp_path, "--task", "detect", "--out", tmp_path / "m")
    assert "classes.txt" in refusal("train", tmp_path, "--task", "segment", "--out", tmp_path / "m")
