"""The command `sightline` as a user runs it: what it prints where, its exit status, and what it leaves on disk."""

import csv
import json
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sightline.cli.models
import sightline.cli.predict
from command import TINY, Said, cli, ended, model, photos, pictures, refusal, started, trained  # noqa: F401
from sightline.cli.main import main, verbs
from sightline.datasets.folder import write_images
from sightline.errors import WorkError
from test_checkpoints_refusals import reseal


class TestHelp:
    def test_it_loads_no_torch(self):
        script = (
            "import sys, sightline, sightline.errors, sightline.registry; dir(sightline)\n"
            "from sightline.cli.main import main, verbs\n"
            "for words in ([], *([verb] for verb in verbs())):\n"
            "    try: main([*words, '--help'])\n"
            "    except SystemExit as left: assert not left.code\n"
            "heavy = {'torch', 'torchvision', 'numpy', 'PIL', 'einops', 'rich', 'huggingface_hub'}\n"
            "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("example: sightline ") == 1 + len(verbs())

    @pytest.mark.parametrize("verb", verbs())
    def test_every_verb_has_an_example_that_its_own_parser_takes(self, verb, monkeypatch):
        said = cli(verb, "--help")
        assert said.status == 0
        (example,) = [line for line in said.out.splitlines() if line.startswith("example: ")]
        module = sys.modules[f"sightline.cli.{verbs()[verb]}"]
        taken = []
        monkeypatch.setattr(module, "run", taken.append)
        program, *words = shlex.split(example.removeprefix("example: "))
        assert (program, words[0]) == ("sightline", verb)
        assert cli(*words).status == 0
        assert len(taken) == 1

    def test_version(self):
        assert cli("--version") == (0, f"sightline {sightline.__version__}\n", "")


class TestRequests:
    @pytest.mark.parametrize(
        ("words", "says"),
        [
            ("train photos --epoch 3", "unknown option --epoch. Did you mean --epochs"),
            ("train photos --epoch=3", "unknown option --epoch=3. Did you mean --epochs"),
            ("pedict m x.jpg", "unknown verb 'pedict'. Did you mean predict?"),
            ("models a b", "one argument too many: b."),
            ("predict m", "PATH"),
            ("", "VERB"),
            ("predict m x.jpg --top many", "--top"),
            ("train photos --image-size 12y", "'12y' is not a size like 224 or 160x96"),
            ("train ''", "empty"),
        ],
    )
    def test_nonsense_is_answered_with_what_there_is(self, words, says):
        assert says in (message := refusal(*shlex.split(words)))
        assert "--help` shows what it takes" in message

    def test_an_unknown_task_is_answered_with_those_there_are(self):
        assert "unknown task 'dance'. Known: classify" in refusal("train", "photos", "--task", "dance")

    def test_underscores_are_hyphens(self, monkeypatch):
        taken = []
        monkeypatch.setattr(sightline.cli.predict, "run", taken.append)
        cli("predict", "my_model", "a_b.jpg", "--batch_size", 7, "--csv=a_b.csv")
        (request,) = taken
        assert (request.batch_size, request.csv, request.model, request.paths) == (
            7,
            "a_b.csv",
            "my_model",
            ["a_b.jpg"],
        )

    @pytest.mark.parametrize(
        ("fault", "status", "says"),
        [
            (WorkError("the disk is full"), 1, "sightline: the disk is full\n"),
            (FileExistsError(17, "File exists", "runs/a"), 1, "runs/a: File exists"),
            (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero"),
            (KeyboardInterrupt(), 130, "stopped by SIGINT"),
            (BrokenPipeError(), 0, ""),
        ],
    )
    def test_a_fault_is_one_message_and_a_traceback_only_where_it_is_asked_for(
        self, fault, status, says, monkeypatch, capfd
    ):
        def run(_):
            raise fault

        monkeypatch.setattr(sightline.cli.models, "run", run)
        monkeypatch.setattr(os, "dup2", lambda *_: None)
        with pytest.raises(SystemExit) as left:
            main(["models"])
        out, err = capfd.readouterr()
        assert (left.value.code, out) == (status, "")
        assert says in err
        assert err.count("\n") == (status > 0)
        if status == 1:
            with pytest.raises(type(fault)):
                main(["models", "--debug"])

    def test_sigterm_ends_any_command_as_ctrl_c_does(self, monkeypatch):
        closed = []

        def run(_):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
            finally:
                closed.append(True)

        monkeypatch.setattr(sightline.cli.models, "run", run)
        before = signal.getsignal(signal.SIGTERM)
        said = cli("models")
        assert said.status == 143
        assert "stopped by SIGTERM" in said.err
        assert closed
        assert signal.getsignal(signal.SIGTERM) is before


class TestPredict:
    def test_files_folder_and_glob_in_order(self, model, pictures):
        said = cli("predict", model, pictures / "10.png", pictures, f"{pictures}/*0.png", "--json", "--top", 3)
        assert said.status == 1
        assert said.out.count("\n") == 1
        document = said.document
        assert (document["model"], document["task"]) == (str(model), "classify")
        names = [Path(result["path"]).name for result in document["results"]]
        inside = ["2.png", "10.png", "cut.png", "empty.jpg", "text.jpg", "ünï côdé.jpg"]
        assert names == ["10.png", *inside, "10.png"]
        for result in document["results"]:
            good = Path(result["path"]).name in ("2.png", "10.png", "ünï côdé.jpg")
            assert result.keys() == ({"path", "predictions"} if good else {"path", "error"})
            if good:
                assert [row.keys() for row in result["predictions"]] == [{"label", "index", "score"}] * 3
                scores = [row["score"] for row in result["predictions"]]
                assert scores == sorted(scores, reverse=True)
                assert all(row["label"] == str(row["index"]) for row in result["predictions"])
        same = [result["predictions"] for result in document["results"] if result["path"].endswith("10.png")]
        assert np.allclose([[row["score"] for row in rows] for rows in same], same[0][0]["score"], atol=0.1)

    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("cut.png", "truncated"),
            ("empty.jpg", "empty (0 bytes)"),
            ("text.jpg", "its content is none of JPEG"),
            ("gone.jpg", "No such file"),
            ("nothing*.png", "nothing matches"),
        ],
    )
    def test_one_bad_file_costs_one_answer(self, model, pictures, name, why):
        said = cli("predict", model, pictures / "2.png", pictures / name, pictures / "10.png")
        assert said.status == 1
        assert [line.partition(": ")[0] for line in said.out.splitlines()] == [
            str(pictures / "2.png"),
            str(pictures / "10.png"),
        ]
        assert str(pictures / name) in said.err
        assert why in said.err

    def test_all_good_is_status_0(self, model, pictures, tmp_path):
        paths = (pictures / "2.png", pictures / "10.png")
        said = cli("predict", model, *paths, "--csv", tmp_path / "o.csv", "--top", 2, "--batch-size", 1)
        assert (said.status, said.err) == (0, "")
        with (tmp_path / "o.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["path"] for row in rows] == [str(path) for path in paths for _ in range(2)]
        assert {"label", "index", "score", "error"} < rows[0].keys()

    def test_a_terminal_without_the_letters(self, model, pictures):
        """The whole of it in a process of its own, with another encoding."""
        names = (pictures / "2.png", pictures / "gone\n.png", pictures / "ünï côdé.jpg")
        environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
        said = ended(started("predict", model, *names, env=environment))
        assert said.status == 1
        assert "\\xfcn\\xef c\\xf4d\\xe9.jpg: " in said.out
        assert "gone\\n.png" in said.err

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (("{model}", "x.png", "--top", 0), "number of classes"),
            (("{model}", "x.png", "--batch-size", 0), "batch size"),
            (("{model}", "x.png", "--csv", "{model}"), "cannot write"),
            (("{model}", "x.png", "--device", "abacus"), "no device 'abacus'"),
            (("{pictures}/gone", "x.png"), "no file or folder"),
            (("{pictures}", "x.png"), "no config.json"),
            (("{pictures}/2.png", "x.png"), "2.png"),
            (("hf:someone/something", "x.png"), "downloads are forbidden"),
        ],
    )
    def test_refusals(self, words, says, model, pictures):
        assert says in refusal("predict", *(str(word).format(model=model, pictures=pictures) for word in words))


class TestDamagedModels:
    @pytest.fixture
    def damaged(self, model, tmp_path) -> Path:
        """A copy of the model, to be spoilt."""
        folder = tmp_path / "damaged"
        folder.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(model / name, folder)
        return folder

    def refused(self, source: Path, tmp_path: Path, *more: object) -> str:
        """The one message with which every verb that reads a model answers; none of them writes anything."""
        verbs = [
            ("predict", source, "x.png"),
            ("evaluate", source, "builtin:digits", "--workers", 0),
            ("explain", source, "x.png", "--out", tmp_path / "explained"),
            ("convert", source, "--to", "timm", "--out", tmp_path / "converted"),
        ]
        messages = {refusal(*words, *more) for words in verbs}
        assert not (tmp_path / "explained").exists()
        assert not (tmp_path / "converted").exists()
        (message,) = messages
        return message

    def change(self, folder: Path, change) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        reseal(folder)

    def test_nan(self, damaged, tmp_path):
        self.change(damaged, lambda tensors: tensors["head.classifier.bias"].fill_(torch.nan))
        message = self.refused(damaged, tmp_path)
        assert "head.classifier.bias" in message
        assert str(damaged) in message

    def test_missing(self, damaged, tmp_path):
        self.change(damaged, lambda tensors: tensors.pop("backbone.encoder.blocks.1.norm2.weight"))
        assert "backbone.encoder.blocks.1.norm2.weight" in self.refused(damaged, tmp_path)

    def test_superfluous(self, damaged, tmp_path):
        self.change(damaged, lambda tensors: tensors.update(stowaway=torch.ones(3)))
        assert "stowaway" in self.refused(damaged, tmp_path)

    def test_misshapen(self, damaged, tmp_path):
        self.change(damaged, lambda tensors: tensors.update({"head.classifier.bias": torch.ones(11)}))
        message = self.refused(damaged, tmp_path)
        assert "head.classifier.bias" in message
        assert "11" in message

    def test_truncated(self, damaged, tmp_path):
        file = damaged / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        assert str(file) in self.refused(damaged, tmp_path)

    def test_a_pickle_that_would_run_code(self, tmp_path):
        class Bomb:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "exploded"),)

        file = tmp_path / "bomb.pth"
        file.write_bytes(pickle.dumps({"cls_token": Bomb()}))
        message = self.refused(file, tmp_path)
        assert str(file) in message
        assert "mkdir" in message
        assert not (tmp_path / "exploded").exists()

    def test_another_architecture(self, damaged, tmp_path):
        message = self.refused(damaged, tmp_path, "--architecture", "vit_tiny_patch16_224")
        assert "not a vit_tiny_patch16_224" in message

    def test_a_file_of_something_else(self, tmp_path):
        file = tmp_path / "voice.safetensors"
        save_file({"encoder.conv1.weight": torch.ones(3, 2)}, file)
        assert "encoder.conv1.weight" in self.refused(file, tmp_path)


class TestEvaluate:
    def test_it_finds_what_the_training_found(self, trained):
        folder, said = trained
        document = cli("evaluate", folder, "builtin:digits", "--json").document
        for key in ("model", "task", "metrics", "counts", "report"):
            assert document[key] == said.document[key]
        assert document["seconds"]["evaluate"] > 0
        assert np.sum(document["confusion"]) == 359
        assert np.trace(document["confusion"]) == round(document["metrics"]["top1"] * 359)

    def test_files_give_what_their_pixels_give(self, trained, tmp_path):
        """Folders '0' to '10' on disk are read in another order than the classes have."""
        folder, said = trained
        held_out = cli("evaluate", folder, "builtin:digits", "--json").document
        from sightline.datasets.open import open_dataset

        splits = open_dataset("builtin:digits", seed=0)
        write_images(splits.val, tmp_path / "data" / "val")
        write_images(splits.train.select(np.arange(200)), tmp_path / "data" / "train")
        document = cli("evaluate", folder, tmp_path / "data", "--json", "--workers", 1).document
        assert document["confusion"] == held_out["confusion"]
        assert document["metrics"]["top1"] == said.document["metrics"]["top1"]

    def test_the_order_of_folders_does_not_matter(self, photos, tmp_path):
        """'10' stands before '2' on disk, and behind it in the model; renamed data has its classes elsewhere."""
        data = tmp_path / "data"
        for old, new in (("0", "2"), ("1", "10")):
            shutil.copytree(photos / old, data / new)
        out = tmp_path / "run"
        done = cli("train", data, "--epochs", 40, *TINY, "--lr", 0.01, "--out", out, "--json", "--quiet").document
        assert json.loads((out / "config.json").read_text())["labels"] == ["2", "10"]
        assert done["metrics"]["top1"] > 0.7
        table = tmp_path / "table.csv"  # the classes in the other order of appearance
        rows = [f"data/{label}/{file.name},{label}" for label in ("10", "2") for file in (data / label).iterdir()]
        table.write_text("\n".join(["path,label", *rows]))
        for where in (data, table):
            assert cli("evaluate", out, where, "--json", "--workers", 0).document["metrics"]["top1"] > 0.7

    def test_other_classes_are_refused_by_name(self, model, photos, tmp_path):
        shutil.copytree(photos, tmp_path / "data")
        (tmp_path / "data" / "7").rename(tmp_path / "data" / "seven")
        message = refusal("evaluate", model, tmp_path / "data")
        assert "only the model knows '7'" in message
        assert "has 'seven'" in message

    def test_a_refused_image_counts_and_is_named(self, model, photos, tmp_path):
        for part in ("train", "val"):
            shutil.copytree(photos, tmp_path / "data" / part)
        whole = cli("evaluate", model, tmp_path / "data", "--json", "--workers", 0).document
        assert whole["counts"] == {"evaluated": 120, "refused": 0}
        (tmp_path / "data" / "val" / "4" / "broken.png").write_text("no image")
        said = cli("evaluate", model, tmp_path / "data", "--workers", 0, "--json")
        assert said.status == 0
        assert "val/4/broken.png" in said.err
        document = said.document
        assert document["counts"] == {"evaluated": 120, "refused": 1}
        assert document["metrics"]["top1"] == pytest.approx(whole["metrics"]["top1"] * 120 / 121)
        assert document["refused"][0]["path"] == "val/4/broken.png"
        told = cli("evaluate", model, tmp_path / "data", "--workers", 0, "--quiet")
        assert "1 images could not be read and count as wrong" in told.out

    @pytest.mark.parametrize("wrong", [("--batch-size", 0), ("--workers", -1), ("--device", "cuda:97")])
    def test_refusals(self, model, wrong):
        assert str(wrong[1]) in refusal("evaluate", model, "builtin:digits", *wrong)


class _Addresses(HTMLParser):
    """Everything that a page would fetch."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert tag not in ("script", "iframe", "object", "embed", "link")


class TestExplain:
    def test_pictures_arrays_and_a_page(self, model, pictures, tmp_path):
        said = cli("explain", model, pictures, "--out", tmp_path / "out", "--json")
        assert said.status == 1
        assert said.out.count("\n") == 1
        results = said.document["results"]
        assert ["error" in result for result in results] == [False, False, True, True, True, False]
        for result in results:
            if "error" in result:
                assert f"{result['path']}: {result['error']}" in said.err
                continue
            page = Path(result["page"])
            assert page.parent == tmp_path / "out" / Path(result["path"]).stem
            addresses = _Addresses()
            addresses.feed(page.read_text())
            assert addresses.found
            assert all(address.startswith("data:image/png;base64,") for address in addresses.found)
            assert "url(" not in page.read_text()
            with Image.open(page.parent / "rollout.png") as picture:
                picture.load()
            with np.load(result["arrays"], allow_pickle=False) as arrays:
                assert arrays["rollout"].shape == (4, 4)
                tokens = 16 + int(arrays["prefix"])
                assert arrays["heads"].shape == (2, 2, tokens, tokens)
                assert arrays["distance"].shape == (2, 2)
                assert 0 < arrays["rollout"].sum() <= 1 + 1e-5
            assert result["predictions"][0]["label"] in page.read_text()

    def test_layers_are_counted_from_1(self, model, pictures, tmp_path):
        said = cli("explain", model, pictures / "2.png", "--out", tmp_path / "out", "--layers", 2)
        assert said.status == 0
        assert said.out == f"{pictures / '2.png'}: {tmp_path / 'out' / '2' / 'index.html'}\n"
        assert (tmp_path / "out" / "2" / "heads-layer-02.png").exists()
        assert not (tmp_path / "out" / "2" / "heads-layer-01.png").exists()
        for layer in (0, 3):
            message = refusal("explain", model, pictures / "2.png", "--out", tmp_path / "no", "--layers", layer)
            assert f"no layer {layer}: the model has 2" in message
        assert not (tmp_path / "no").exists()


class TestModels:
    def test_document(self):
        (row,) = cli("models", "vit_tiny_patch16_224", "--json").document["models"]
        assert row["parameters"] == 5_717_416
        assert 1 < row["gmacs"] < 2
        assert (row["image_size"], row["paper"]) == ([224, 224], "arXiv:2010.11929")
        assert "timm" in row["weights"]

    def test_table(self):
        said = cli("models", "vit_*_patch32_224")
        assert len(said.out.splitlines()) == 4
        assert "88,224,232" in said.out

    def test_nothing_matches(self):
        assert "Did you mean '*vit_tiny*'?" in refusal("models", "vit_tiny")
        assert "Did you mean vit_tiny_patch16_224" in refusal("models", "vit_tiny_patch16_226")


class TestConvert:
    def test_there_and_back(self, model, pictures, tmp_path):
        document = cli("convert", model, "--to", "timm", "--out", tmp_path / "timm", "--json").document
        assert document["written"]["percent"] == 100
        assert document["parity"] <= 1e-5
        assert all(Path(file).is_file() for file in document["files"])
        said = cli("convert", tmp_path / "timm", "--to", "sightline", "--out", tmp_path / "back")
        assert said.status == 0
        assert "100 % covered" in said.out
        ours, back = load_file(model / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
        assert ours.keys() == back.keys()
        assert all(torch.equal(ours[name], back[name]) for name in ours)
        answers = [
            cli("predict", source, pictures / "2.png", "--json").document["results"][0]["predictions"]
            for source in (model, tmp_path / "timm", tmp_path / "back")
        ]
        assert answers[1] == answers[2]
        assert answers[0][0]["label"] == answers[1][0]["label"]
        assert answers[0][0]["score"] == pytest.approx(answers[1][0]["score"], abs=1e-3)  # timm's pixels are Pillow's

    def test_refusals(self, model, tmp_path):
        assert "Did you mean timm?" in refusal("convert", model, "--to", "tim", "--out", tmp_path / "x")
        assert "cannot express" in refusal("convert", model, "--to", "google", "--out", tmp_path / "x")
        assert not (tmp_path / "x").exists()
