"""`sightline train` and `sightline demo` as a user runs them: choices, refusals, signals and what stays."""

import json
import os
import shlex
import shutil
import signal
import time
from pathlib import Path
from threading import Thread

import pytest
from PIL import Image

from command import TINY, Said, cli, ended, model, photos, pictures, refusal, started, trained  # noqa: F401


class TestTrain:
    def test_one_document_and_its_shape(self, trained):
        folder, said = trained
        assert said.status == 0
        assert said.out.count("\n") == 1
        document = said.document
        assert document["model"] == str(folder)
        assert document["task"] == "classify"
        assert 0 < document["metrics"]["top1"] < document["metrics"]["top5"] <= 1
        assert document["counts"] == {"evaluated": 359, "refused": 0}
        assert document["seconds"]["train"] > 0
        assert document["report"] == str(folder / "report.html")

    def test_what_was_chosen_and_how_it_went_is_on_stderr(self, trained):
        err = trained[1].err
        assert "vit_pico_patch4_32 at 24×24 pixels" in err
        assert "because" in err
        assert "val_top1" in err

    def test_what_lies_there_afterwards(self, trained):
        folder, said = trained
        files = {file.name for file in folder.iterdir()}
        expected = {"config.json", "model.safetensors", "README.md", "run.json", "metrics.jsonl", "report.html"}
        assert expected | {"checkpoints"} <= files
        assert any(name.startswith("events.out.tfevents") for name in files)
        record = json.loads((folder / "run.json").read_text())
        assert record["status"] == "finished"
        assert record["metrics"] == said.document["metrics"]

    def test_quiet_is_silent_and_a_person_gets_words(self, photos, tmp_path):
        said = cli("train", photos, "--epochs", 0.1, *TINY, "--out", tmp_path / "run", "--quiet")
        assert (said.status, said.err) == (0, "")
        assert "top-1" in said.out
        assert str(tmp_path / "run" / "report.html") in said.out

    def test_from_the_weights_of_another_run(self, model, photos, tmp_path):
        words = ("--weights", model, "--epochs", 0.1, "--workers", 0, "--json", "--quiet", "--out", tmp_path / "fine")
        assert cli("train", photos, *words).document["counts"]["evaluated"] > 0
        assert json.loads((tmp_path / "fine" / "run.json").read_text())["recipe"]["name"] == "fine-tune-small"

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (("builtin:digit",), "Did you mean digits?"),
            (("{out}/nothing",), "does not exist"),
            (("builtin:digits", "--model", "vit_tiny_patch16_22"), "Did you mean vit_tiny_patch16_224"),
            (("builtin:digits", "--device", "cuda:97"), "no device 'cuda:97' here"),
            (("builtin:digits", "--resume"), "no run to resume"),
            (("builtin:digits", "--epochs", 0), "epochs must be positive"),
            (("builtin:digits", "--epochs", "nan"), "epochs must be positive"),
            (("builtin:digits", "--batch_size", 0), "batch_size must be positive"),
            (("builtin:digits", "--horizontal-flip", 2), "horizontal_flip"),
            (("builtin:digits", "--num-heads", 3), "not a multiple of num_heads 3"),
            (("builtin:digits", "--weights", "{out}/no.safetensors"), "no file or folder"),
            (("builtin:digits", "--recipe", "fine-tune"), "--weights"),
        ],
    )
    def test_refusals(self, words, says, tmp_path):
        out = tmp_path / "run"
        words = [str(word).format(out=tmp_path) for word in words]
        assert says in refusal("train", *words, "--out", out)
        assert not (out / "run.json").exists()
        assert not (out / "model.safetensors").exists()

    @pytest.mark.parametrize(
        ("files", "says"),
        [
            ((), "no images found"),
            (("cats/1.png", "cats/2.png"), "only one class has images ('cats')"),
            (("cats/1.png", "dogs/1.png"), "no class has more than one image"),
        ],
    )
    def test_refused_folders(self, files, says, tmp_path):
        data = tmp_path / "data"
        data.mkdir()
        for file in files:
            (data / file).parent.mkdir(exist_ok=True)
            Image.new("RGB", (8, 8)).save(data / file)
        message = refusal("train", data, "--out", tmp_path / "run")
        assert says in message
        assert str(data) in message

    def test_a_folder_without_permission_is_named(self, photos, tmp_path, monkeypatch):
        locked = tmp_path / "photos" / "3"
        shutil.copytree(photos, tmp_path / "photos")
        locked.chmod(0)
        if os.access(locked, os.R_OK):  # whom no permission binds
            scandir = os.scandir

            def closed(path):
                if str(path).rstrip("/") == str(locked):
                    raise PermissionError(13, "Permission denied", str(path))
                return scandir(path)

            monkeypatch.setattr(os, "scandir", closed)
        message = refusal("train", tmp_path / "photos", "--out", tmp_path / "run")
        locked.chmod(0o700)
        assert str(locked) in message
        assert "Permission denied" in message

    def test_a_folder_with_something_in_it_is_left_alone(self, model, tmp_path):
        before = {file.name: file.stat().st_mtime_ns for file in model.iterdir()}
        assert "is not empty" in (message := refusal("train", "builtin:digits", "--out", model))
        assert "--resume" in message
        assert {file.name: file.stat().st_mtime_ns for file in model.iterdir()} == before

    def test_stopped_twice_and_finished(self, photos, tmp_path):
        out = tmp_path / "a run"

        metrics = out / "metrics.jsonl"

        def begun(lines: int) -> None:
            latest = time.monotonic() + 90
            while not metrics.exists() or metrics.read_bytes().count(b"\n") <= lines:
                assert time.monotonic() < latest
                time.sleep(0.02)

        process = started("train", photos, "--epochs", 25, *TINY, "--out", out)
        begun(0)
        process.terminate()
        first = ended(process)
        assert first.status == 143
        assert first.out == ""
        told = first.err.strip().splitlines()[-1]
        assert "stopped by SIGTERM" in told
        assert f"sightline train {photos} --out '{out}' --resume" in told
        assert list((out / "checkpoints").glob("*.safetensors"))
        assert not (out / "model.safetensors").exists()

        def interrupt() -> None:
            begun(metrics.read_bytes().count(b"\n"))
            os.kill(os.getpid(), signal.SIGINT)

        Thread(target=interrupt).start()
        second = cli("train", photos, "--out", out, "--resume")
        assert second.status == 130
        assert "stopped by SIGINT" in second.err

        words = shlex.split(told.partition("Go on with: sightline ")[2])
        assert cli(*words, "--json").document["counts"] == {"evaluated": 25, "refused": 0}
        assert cli("predict", out, tmp_path).status == 1  # a folder without images


class TestDemo:
    def test_from_training_to_pages_and_again(self, tmp_path):
        out = tmp_path / "demo"
        document = cli("demo", "--out", out, "--epochs", 0.1, "--json", "--quiet").document
        assert document["counts"] == {"evaluated": 359, "refused": 0}
        assert document["report"] == str(out / "report.html")
        assert len(document["results"]) == len(document["explanations"]) == 4
        assert all(Path(page).is_file() for page in document["explanations"])
        assert all(Path(result["path"]).is_file() for result in document["results"])
        for wrong in (("--epochs", 0), ("--device", "abacus"), ("--seed", -1)):
            refusal("demo", "--out", out, *wrong)
        assert (out / "model.safetensors").is_file()
        again = cli("demo", "--out", out, "--epochs", 0.1, "--seed", 1)
        assert again.status == 0
        assert f"model   {out}" in again.out
        assert json.loads((out / "run.json").read_text())["seed"] == 1

    def test_what_is_no_demo_stays(self, photos, tmp_path):
        assert "no earlier demo" in refusal("demo", "--out", photos)
        (tmp_path / "file").touch()
        assert "no earlier demo" in refusal("demo", "--out", tmp_path / "file")
        assert len(list(photos.rglob("*.png"))) == 120
