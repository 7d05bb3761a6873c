"""Runs without labels, from the command to a model that training goes on from."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sightline
from command import TINY, cli, refusal
from sightline.datasets.digits import digits
from sightline.datasets.folder import write_images
from sightline.datasets.unlabelled import open_images
from sightline.errors import UserError
from sightline.recipes.pretrain import pretrain
from sightline.recipes.pretraining import PUBLISHED, SMALL, chosen
from sightline.recipes.recipe import Facts
from sightline.registry import table
from sightline.training.journal import read
from sightline.training.signals import Interrupted
from sightline.training.update import Updater

QUICK = {"epochs": 1, "batch_size": 32, "workers": 0, "save_seconds": 1e-9}
LITTLE = {"embed_dim": 16, "depth": 1, "num_heads": 2}
BOOK = {"hidden": 4, "vocab_size": 16}
OWN = {
    "mae": {"decoder_dim": 8},
    "dino": {"prototypes": 16, "hidden_dim": 16, "bottleneck_dim": 8, "local_crops": 1, "ibot": 1.0},
    "codebook": {"decoder_input": 8, "decoder_dim": 4},
}


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """160 digits in class folders."""
    folder = tmp_path_factory.mktemp("few")
    write_images(digits().select(np.arange(160)), folder)
    return folder


@pytest.fixture(scope="module")
def loose(tmp_path_factory) -> Path:
    """60 pictures in no order, in two folders that are no classes of theirs."""
    folder = tmp_path_factory.mktemp("loose")
    random = np.random.default_rng(0)
    for i in range(60):
        place = folder / ("deep/er" if i % 3 else "") / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(place)
    return folder


@pytest.fixture(scope="module")
def teacher(few, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "run"
    network = {"tokenizer": "patch", **LITTLE}
    sightline.train(few, out=out, epochs=1, batch_size=32, workers=0, network=network)
    return out


@pytest.fixture(scope="module")
def book(few, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("book") / "run"
    pretrain(few, objective="codebook", out=out, network=BOOK, options=OWN["codebook"], **QUICK)
    return out


def words(name: str, few: Path, teacher: Path, book: Path) -> dict:
    """What a run of an objective is told, small."""
    more = {"distill": {"teacher": str(teacher)}, "beit": {"codebook": str(book)}}
    more["noisy-student"] = {"teacher": str(teacher), "labelled": str(few), "threshold": 0.1}
    network = BOOK if name == "codebook" else {"tokenizer": "patch", **LITTLE}
    return {"objective": name, "options": {**OWN.get(name, {}), **more.get(name, {})}, "network": network, **QUICK}


@pytest.mark.parametrize("name", SMALL)
def test_a_stopped_run_goes_on_to_the_same_bits(name, few, teacher, book, tmp_path, monkeypatch):
    told = words(name, few, teacher, book)
    whole = pretrain(few, out=tmp_path / "whole", **told)
    plain, steps = Updater.__call__, []

    def stopping(self, batch, step, *words):
        steps.append(step)
        if step == 2 and steps.count(2) == 1:
            raise Interrupted(15, step)
        return plain(self, batch, step, *words)

    monkeypatch.setattr(Updater, "__call__", stopping)
    with pytest.raises(Interrupted):
        pretrain(few, out=tmp_path / "parts", **told)
    workers = 2 if name in ("dino", "beit") else 0  # processes of their own read what follows
    again = pretrain("elsewhere", out=tmp_path / "parts", resume=True, workers=workers)
    assert again.metrics == whole.metrics
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    journals = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "parts")]
    assert journals[0] == journals[1]
    states = [
        load_file(max((tmp_path / name / "checkpoints").glob("step-*.safetensors"))) for name in ("whole", "parts")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    record = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert (record["status"], record["task"], record["recipe"]["objective"]) == ("finished", "pretrain", name)


@pytest.mark.parametrize("name", SMALL)
def test_what_memory_does_not_hold_goes_in_parts(name, few, teacher, book, tmp_path, monkeypatch):
    monkeypatch.setattr("sightline.recipes.memory.held", lambda device: 0)
    told = {**words(name, few, teacher, book), "memory": 0.001, "epochs": 0.2}
    done = pretrain(few, out=tmp_path / "run", **told)
    settings = json.loads((done.directory / "run.json").read_text())["recipe"]["settings"]
    assert settings["checkpointing"] or settings["micro_batch"] < settings["batch_size"]
    assert all(np.isfinite(record["loss"]) for record in read(done.directory / "metrics.jsonl") if "loss" in record)


def test_a_plain_folder_suffices_and_training_goes_on_from_it(loose, few, tmp_path):
    out = tmp_path / "features"
    said = cli(
        "pretrain", loose, "--objective", "mae", "--epochs", 1, *TINY, "--out", out, "--decoder-dim", 8, "--json"
    )
    assert said.status == 0, said.err
    document = said.document
    assert document["model"] == str(out)
    assert document["objective"] == "mae"
    assert "knn_top1" not in document["metrics"]
    assert document["metrics"]["effective_rank"] >= 1
    assert document["counts"] == {"evaluated": 3, "refused": 0}
    assert Path(document["report"]).read_text().count("<svg") >= 2
    assert "60 images without labels" in said.err
    assert "lie in no class folder" in said.err
    model = sightline.load(out)
    assert list(model.labels) == []
    assert model.embed([next(loose.glob("*.png"))]).shape == (1, 16)
    assert "image-feature-extraction" in (out / "README.md").read_text()
    tuned = cli("train", few, "--weights", out, "--epochs", 1, "--workers", 0, "--out", tmp_path / "tuned", "--json")
    assert tuned.status == 0, tuned.err
    before, after = load_file(out / "model.safetensors"), load_file(tmp_path / "tuned" / "model.safetensors")
    assert {name for name in after if name not in before} == {"head.classifier.weight", "head.classifier.bias"}


def test_labels_judge_and_do_not_teach(few, tmp_path):
    out = tmp_path / "run"
    said = cli(
        *("pretrain", few, "--objective", "dino", "--epochs", 1, *TINY, "--out", out, "--json"),
        *("--prototypes", 16, "--hidden-dim=16", "--bottleneck-dim", 8, "--local-crops", 1, "--batch-size", 32),
    )
    assert said.status == 0, said.err
    assert 0 <= said.document["metrics"]["knn_top1"] <= 1
    recorded = read(out / "metrics.jsonl")
    assert {"teacher_entropy", "prototype_perplexity", "lr"} <= {key for record in recorded for key in record}
    assert any("val_knn_top1" in record for record in recorded)
    assert any(record["step"] == 0 and "feature_std" in record for record in recorded)
    assert "kNN" in (out / "README.md").read_text() or "neighbours" in (out / "README.md").read_text()


def test_a_codebook_is_learned_first_where_none_is_named(loose, tmp_path):
    out = tmp_path / "beit"
    done = pretrain(loose, objective="beit", out=out, network=LITTLE, **QUICK)
    beside = tmp_path / "beit-codebook"
    assert json.loads((beside / "run.json").read_text())["status"] == "finished"
    assert json.loads((out / "run.json").read_text())["recipe"]["options"]["codebook"] == str(beside)
    assert sightline.load(beside).network.architecture.family == "dvae"
    assert done.metrics["effective_rank"] >= 1


def test_rounds_of_self_training_are_each_other_s_teachers(few, teacher, tmp_path):
    told = words("noisy-student", few, teacher, teacher)
    told["options"]["rounds"] = 2
    done = pretrain(few, out=tmp_path / "student", **told)
    first = json.loads((tmp_path / "student-round-1" / "run.json").read_text())
    last = json.loads((tmp_path / "student" / "run.json").read_text())
    assert first["recipe"]["options"]["teacher"] == str(teacher)
    assert last["recipe"]["options"]["teacher"] == str(tmp_path / "student-round-1")
    assert list(sightline.load(done.directory).labels) == [str(i) for i in range(10)]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--objective", "mea"), "unknown objective 'mea'. Did you mean mae"),
        (("--mask-ration", "0.5"), "unknown option --mask-ration"),
        (("--mask-ratio", "1.5"), "mask_ratio must lie between 0 and 1"),
        (("--objective", "supervised"), "learns from labels"),
        (("--objective", "distill"), "learns from labels"),
        (("--objective", "noisy-student"), "--labelled DATA"),
        (("--objective", "codebook", "--model", "vit_pico_patch4_32"), "family 'dvae'"),
        (("--tokenizer", "convolution"), "--tokenizer patch"),
        (("--recipe", "large"), "There are small, published"),
        (("--patience", "2"), "patience needs labels"),
    ],
)
def test_refusals(options, says, loose, tmp_path):
    assert says in refusal("pretrain", loose, *options, "--out", tmp_path / "none")
    assert not (tmp_path / "none" / "run.json").exists()


def test_each_verb_goes_on_with_its_own_runs(teacher, book):
    assert "sightline train" in refusal("pretrain", "x", "--out", teacher, "--resume")
    assert "sightline pretrain" in refusal("train", "x", "--out", book, "--resume")


@pytest.mark.parametrize("name", SMALL)
def test_every_objective_has_a_recipe(name):
    kind = table("objectives", "OBJECTIVES")[name]
    facts = Facts(900, 5 if kind.labelled else 0, (64, 64))
    recipe = chosen("small", name, facts, None, {})
    assert recipe.objective == name
    assert recipe.from_json(recipe.to_json(), "here").to_json() == recipe.to_json()
    if name in PUBLISHED:
        full = chosen("published", name, facts, None, {})
        assert full.architecture.backbone.image_size == (224, 224)
        assert full.settings.batch_size == 450


@pytest.mark.parametrize("name", ["masked-patch", "simmim"])
def test_patches_that_are_told_from_their_own_tokens_may_be_finer(name):
    def planned(size, **told):
        recipe = chosen("small", name, Facts(900, 0, size), None, told)
        usual = chosen("small", "mae", Facts(900, 0, size), None, told)
        assert recipe.preprocess == usual.preprocess
        return recipe.architecture.backbone.patch_size, usual.architecture.backbone.patch_size

    assert planned((8, 8)) == ((3, 3), (6, 6))  # enlarged three times
    assert planned((8, 14)) == ((6, 6), (6, 6))  # which is nearer to as many patches as are usual
    assert planned((16, 16)) == ((4, 4), (4, 4))
    assert planned((64, 64)) == ((8, 8), (8, 8))
    assert planned((8, 8), patch_size=12) == ((12, 12), (12, 12))


def test_labels_are_not_needed_and_not_lost(few, loose, tmp_path):
    assert len(open_images(few).train.classes) == 10
    plain = open_images(loose, seed=3)
    assert (len(plain.train), len(plain.val), plain.train.classes) == (57, 3, ())
    assert not set(plain.train.samples.names) & set(plain.val.samples.names)
    assert list(open_images(loose, seed=3).val.samples.names) == list(plain.val.samples.names)
    (tmp_path / "one").mkdir()
    with pytest.raises(UserError, match="too few to learn from"):
        open_images(tmp_path / "one")
