"""The doctor: every fault planted and named with advice, and nothing said of what is healthy."""

import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sightline
from command import TINY, cli
from examples import examples
from sightline.errors import WorkError
from sightline.evaluation.accuracy import Accuracy
from sightline.images.mix import mix
from sightline.network import create_model
from sightline.objectives.supervised import Supervised
from sightline.recipes.train import train
from sightline.training.chart import Labels, Mean
from sightline.training.doctor import Doctor
from sightline.training.journal import read
from sightline.training.schedule import Plan
from sightline.training.settings import Settings
from sightline.training.vitals import kernels, likeness, still_heads, tokens_of, update_ratio
from sightline.types import Batch

QUICK = {"batch_size": 64, "workers": 0, "network": {"embed_dim": 16, "depth": 2, "num_heads": 2}}
EVEN = Labels(("cat", "dog", "eel", "fox"), (50, 50, 50, 50), (25, 25, 25, 25))
SKEWED = Labels(("cat", "dog"), (180, 20), (90, 10))
CHANCE = math.log(4)


class Patient:
    """A doctor at a run whose figures are made up."""

    def __init__(self, labels: Labels | None = EVEN, total: int = 400, **settings):
        self.said: list[str] = []
        self.doctor = Doctor(Settings(warmup=0.0, **settings), 10, labels)
        self.doctor.chart.plan, self.doctor.say = Plan(total), self.said.append
        self.step = 0

    def learns(self, losses, accuracy: float = 0.25) -> "Patient":
        for loss in losses:
            self.step += 1
            rate = self.doctor.chart.settings.lr
            self.doctor.hear({"step": self.step, "loss": float(loss), "accuracy": accuracy, "lr": rate})
        return self

    def moves(self, ratio: float) -> "Patient":
        rate = self.doctor.chart.settings.lr
        self.doctor.hear({"step": self.step, "update_ratio": ratio, "rate": rate, "still_heads": []})
        return self

    def evaluates(
        self, loss: float, top1: float, *, balanced: float | None = None, commonest: float = 0.3
    ) -> "Patient":
        figures = {"val_loss": loss, "val_top1": top1, "val_balanced": top1 if balanced is None else balanced}
        self.doctor.hear({"step": self.step, **figures, "val_commonest": commonest, "val_loss_error": 0.02})
        return self

    @property
    def kinds(self) -> list[str]:
        return [finding.kind for finding in self.doctor.findings]


def around(level: float, count: int, spread: float = 0.02) -> np.ndarray:
    return level + spread * np.random.default_rng(0).standard_normal(count)


# Losses


@examples(30)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=6), st.floats(0, 0.5), st.floats(0, 2), st.floats(0, 2))
def test_chance_is_the_loss_of_the_best_constant_answer_however_labels_are_mixed(counts, smoothing, mixup, cutmix):
    labels = Labels([str(i) for i in range(len(counts))], counts, counts)
    targets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    targets = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))]
    pixels, keys = torch.zeros(len(targets), 3, 4, 4), torch.arange(len(targets))
    alphas = {"mixup_alpha": mixup, "cutmix_alpha": cutmix}
    _, soft = mix(pixels, targets, keys, num_classes=len(counts), smoothing=smoothing, **alphas)
    mean = (1 - smoothing) * torch.tensor(counts) / len(targets) + smoothing / len(counts)
    chance, floor = labels.chance(smoothing)
    # Pairs are mixed both ways, so that mixing leaves the mean label as it is.
    best = nn.functional.cross_entropy(mean.log().expand(len(targets), -1), soft)
    assert chance == pytest.approx(float(best), abs=1e-5)
    assert 0 <= floor <= chance + 1e-9


def test_chance_by_hand():
    assert EVEN.chance(0.0) == pytest.approx((math.log(4), 0))
    assert SKEWED.chance(0.0)[0] == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    assert SKEWED.chance(0.2)[1] == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    uneven = Labels(("a", "b"), (30, 10), (10, 30))
    assert uneven.held_out_chance() == pytest.approx(-0.25 * math.log(0.75) - 0.75 * math.log(0.25))


def test_a_loss_at_chance_is_named_and_one_that_falls_is_not():
    stuck = Patient().learns(around(CHANCE, 60)).moves(0.01).learns(around(CHANCE, 140))
    assert stuck.kinds == ["loss-at-chance"]
    assert "--lr 0.0003" in stuck.doctor.findings[0].advice
    assert "1.386" in stuck.said[0]
    falling = np.linspace(CHANCE, 1.2, 200)
    assert Patient().learns(falling[:60]).moves(0.01).learns(falling[60:]).kinds == []


def test_smoothing_and_imbalance_are_taken_into_account():
    level = SKEWED.chance(0.2)[0]
    assert level < math.log(2)
    stuck = Patient(SKEWED, smoothing=0.2).learns(around(level, 60)).moves(0.01).learns(around(level, 140))
    assert stuck.kinds == ["loss-at-chance"]
    learning = Patient(SKEWED, smoothing=0.2).learns(around(level, 60)).moves(0.01).learns(around(0.9 * level, 140))
    assert learning.kinds == []


def test_a_short_run_and_a_long_warm_up_may_stay_at_chance():
    assert Patient(total=45).learns(around(CHANCE, 20)).moves(0.01).learns(around(CHANCE, 25)).kinds == []
    warming = Patient()
    warming.doctor = Doctor(Settings(warmup=0.6), 10, EVEN)
    warming.doctor.chart.plan = Plan(400)
    assert warming.learns(around(CHANCE, 60)).moves(0.01).learns(around(CHANCE, 180)).kinds == []


def test_a_rate_too_low_is_told_from_a_loss_at_chance():
    slow = Patient(lr=1e-7).learns(around(CHANCE, 30)).moves(1e-6).learns(around(CHANCE, 170))
    assert slow.kinds == ["learning-rate-too-low"]
    assert "--lr 1e-3 instead of 1e-07" in slow.said[0]


def test_a_rate_too_high_takes_large_moves_and_no_learning():
    wild = Patient(lr=1.0).learns(around(CHANCE, 10)).moves(0.8).learns(around(1.1 * CHANCE, 25))
    assert wild.kinds == ["learning-rate-too-high"]
    assert "--lr 1e-2 instead of 1" in wild.said[0]
    falling = np.linspace(CHANCE, 0.5, 60)
    assert Patient(lr=1.0).learns(falling[:9]).moves(0.8).learns(falling[9:]).kinds == []


def test_a_loss_that_rises_is_divergence_and_a_spike_is_none():
    falling = np.linspace(CHANCE, 0.4, 60)
    assert Patient().learns(falling).learns(around(0.8 * CHANCE, 25)).kinds == ["divergence"]
    assert Patient().learns(around(CHANCE, 9)).learns(around(2 * CHANCE, 25)).kinds == ["divergence"]
    assert Patient(None).learns(falling).learns(around(3, 25)).kinds == ["divergence"]
    assert Patient().learns(falling).learns(around(3, 3)).learns(around(0.4, 60)).kinds == []


@examples(30)
@given(st.integers(0, 10**6), st.floats(0.02, 0.6), st.floats(0.1, 0.9))
def test_healthy_curves_get_no_finding(seed, noise, end):
    random = np.random.default_rng(seed)
    clean = CHANCE * (end + (1 - end) * np.exp(-np.arange(300) / 60))
    losses = np.abs(clean + noise * random.standard_normal(300))
    patient = Patient().learns(losses[:40]).moves(0.02).learns(losses[40:150]).evaluates(1.0, 0.6)
    assert patient.learns(losses[150:], 0.7).evaluates(0.9, 0.7).kinds == []


# Evaluations


def test_over_fitting_is_a_lasting_rise_while_training_goes_on():
    def run(*held_out: float, train: float = 0.6) -> Patient:
        patient = Patient().learns(around(1.0, 40), 0.6).evaluates(0.8, 0.7)
        for loss in held_out:
            patient.learns(around(train, 20), 0.8).evaluates(loss, 0.68)
        return patient

    rising = run(1.0, 1.2, 1.3)
    assert rising.kinds == ["over-fitting"]
    assert "0.800 at step 40 to 1.300" in rising.said[0]
    assert "--epochs 4" in rising.said[0]
    assert run(1.0, 0.85, 1.0).kinds == []
    assert run(1.0, 1.2, 1.3, train=1.0).kinds == []


def test_what_is_learned_by_heart_and_says_nothing_points_at_the_labels():
    heart = Patient().learns(around(0.1, 40), 0.95).evaluates(2.5, 0.27)
    assert heart.kinds == ["shuffled-labels"]
    few = Labels(EVEN.names, EVEN.train, (2, 2, 2, 2))  # too few to tell bad luck from no knowledge
    assert Patient(few).learns(around(0.1, 40), 0.95).evaluates(2.5, 0.25).kinds == []
    assert Patient().learns(around(0.1, 40), 0.95).evaluates(1.0, 0.6).kinds == []


def test_labels_that_neighbours_do_not_share_are_suspected_only_at_chance():
    def run(same: float) -> Patient:
        patient = Patient().learns(around(CHANCE, 60)).moves(0.01)
        assert not patient.doctor.suspicious
        patient.learns(around(CHANCE, 140))
        assert patient.doctor.suspicious
        for _ in range(64):
            patient.doctor.hear({"step": patient.step, "likeness": [32, same, 8, 12]})
        assert not patient.doctor.suspicious
        return patient

    assert run(8).kinds == ["loss-at-chance", "shuffled-labels"]
    assert run(14).kinds == ["loss-at-chance"]


def test_every_answer_the_commonest_class():
    collapsed = Patient(SKEWED, total=100).learns(around(SKEWED.chance(0)[0], 60), 0.9)
    collapsed.evaluates(0.33, 0.9, balanced=0.5, commonest=1.0).learns(around(SKEWED.chance(0)[0], 20), 0.9)
    collapsed.evaluates(0.33, 0.9, balanced=0.5, commonest=1.0)
    assert collapsed.kinds == ["majority-collapse"]
    assert "'cat'" in collapsed.said[0]
    learning = Patient(SKEWED, total=100).learns(around(0.1, 80), 0.97)
    learning.evaluates(0.2, 0.95, balanced=0.8, commonest=0.92).evaluates(0.2, 0.95, balanced=0.8, commonest=0.92)
    assert learning.kinds == []


def test_counts_that_the_doctor_reads_by_hand():
    counts, uniform = Accuracy(3), torch.zeros(4, 3)
    counts.add(torch.eye(3)[[0, 0, 1, 1]] * 9, torch.tensor([0, 0, 0, 1]), torch.arange(4))
    assert counts.balanced() == pytest.approx((2 / 3 + 1) / 2)  # the third class has no images
    assert counts.commonest() == 0.5
    other = Accuracy(3)
    other.add(uniform, torch.tensor([0, 1, 2, 0]), torch.arange(4))
    assert other.loss_error() == pytest.approx(0, abs=1e-4)
    losses = nn.functional.cross_entropy(torch.eye(3)[[0, 0, 1, 1]] * 9, torch.tensor([0, 0, 0, 1]), reduction="none")
    both = torch.cat([losses, torch.full((4,), math.log(3))]).double()
    merged = counts.merge([other])
    assert merged.loss_error() == pytest.approx(float(both.std(correction=0) / 8**0.5), rel=1e-5)
    assert Mean.of([1.0, 3.0]) == (2.0, 1.0)


# Before the first step


def test_labels_and_patches_before_training():
    def before(labels: Labels, **settings) -> list[str]:
        doctor, said = Doctor(Settings(), 10, labels), []
        doctor.attend(create_model("vit_tiny_patch16_224", 2, depth=1, **settings), Plan(10), [], said.append)
        assert len(said) == len(doctor.findings)
        return [finding.kind for finding in doctor.findings]

    assert before(EVEN, image_size=64) == []
    assert before(EVEN, image_size=48) == ["patch-too-large"]
    assert before(Labels(("a", "b"), (40, 0), (9, 1)), image_size=64) == ["constant-labels"]
    assert before(Labels(("a", "b"), (40, 40), (9, 0)), image_size=64) == ["constant-labels"]
    assert before(Labels(("a", "b"), (970, 30), (9, 1)), image_size=64) == ["class-imbalance"]
    assert before(Labels(("a", "b"), (90, 10), (9, 1)), image_size=64) == []


def test_the_grid_is_that_of_the_first_layer():
    network = create_model("vit_tiny_patch16_224", 2, image_size=(48, 80), depth=1, drop_path_rate=0.5).train()
    assert tokens_of(network) == (3, 5)
    assert all(module.training for module in network.modules())


# Heads


def test_heads_that_stopped_working_are_told_apart():
    network = create_model("vit_tiny_patch16_224", 2, image_size=64, depth=2, embed_dim=24, num_heads=3).train()
    batch = Batch(torch.randn(11, 3, 64, 64), torch.zeros(11).long(), torch.arange(11), torch.arange(11))
    before, state = [p.clone() for p in network.parameters()], torch.get_rng_state()
    assert still_heads(network, batch) == []
    first, second = (block.attention for block in network.backbone.encoder.blocks)
    with torch.no_grad():
        of = [rearrange(part.qkv.weight, "(three h k) d -> three h k d", three=3, h=3) for part in (first, second)]
        of[0][:2, 1] = 0  # queries and keys
        of[1][2, 0] = 0  # values
        of[1][:2, 2] *= 100
    network.eval()
    found = {(head.layer, head.number, head.fault) for head in still_heads(network, batch)}
    network.train()
    layers = ("encoder.blocks.0.attention", "encoder.blocks.1.attention")
    assert (layers[0], 1, "uniform") in found
    assert (layers[1], 0, "silent") in found
    assert {head[:2] for head in found} <= {(layers[0], 1), (layers[1], 0), (layers[1], 2)}
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True)) == 2


def test_a_head_that_sees_one_token():
    network = create_model("vit_tiny_patch16_224", 2, image_size=64, depth=1, embed_dim=24, num_heads=3)
    attention = network.backbone.encoder.blocks[0].attention
    with torch.no_grad():
        attention.qkv.weight[:8] = 0  # queries of the first head: the same for all tokens
        attention.qkv.bias[:8] = 1e4
    batch = Batch(torch.randn(2, 3, 64, 64), torch.zeros(2).long(), torch.arange(2), torch.arange(2))
    assert [(head.number, head.fault) for head in still_heads(network, batch)] == [(0, "collapsed")]


def test_heads_are_named_when_found_twice():
    patient, heads = Patient(), [["blocks.3", 2, "collapsed"], ["blocks.0", 1, "silent"]]
    patient.doctor.hear({"step": 8, "still_heads": heads})
    assert patient.kinds == []
    patient.doctor.hear({"step": 16, "still_heads": heads[:1]})
    assert patient.kinds == ["collapsed-heads"]
    assert "blocks.3 head 2" in patient.said[0]
    patient.doctor.hear({"step": 32, "still_heads": heads})
    patient.doctor.hear({"step": 64, "still_heads": heads})
    assert patient.kinds == ["collapsed-heads", "dead-heads"]


# What is measured


def test_an_update_is_measured_by_the_middle_kernel():
    network = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    for layer, size in zip(network, (1.0, 2.0, 4.0), strict=True):
        nn.init.constant_(layer.weight, size)
    before = kernels(network)
    with torch.no_grad():
        for layer in network:
            layer.weight += 0.5
            layer.bias += 100
    assert update_ratio(before, kernels(network)) == pytest.approx(0.25)
    assert update_ratio([torch.zeros(2, 2)], [torch.ones(2, 2)]) == 0


def test_neighbours_by_hand():
    shade = torch.arange(16).float() // 2  # pairs of like pictures
    pixels = shade[:, None, None, None].expand(16, 3, 9, 9)
    targets, index = torch.arange(16) // 2 % 2, torch.arange(16)
    images, same, expected, variance = likeness(pixels, targets, index)
    assert (images, same) == (16, 16)
    assert expected == pytest.approx(16 * 7 / 15)
    assert variance == pytest.approx(2 * 16 * 7 / 15 * 8 / 15)
    assert likeness(pixels, torch.arange(16) % 2, index).same == 0
    assert likeness(pixels, targets, index // 2).same < 16  # other views of one image do not count
    assert likeness(torch.ones_like(pixels), targets, index).images == 0


def test_where_measurements_stand_follows_from_the_plan():
    doctor = Doctor(Settings(), 10)
    doctor.chart.plan = Plan(3200)
    places = [step for step in range(3200) if doctor.measures(step)]
    assert {8, 16, 1024, 2048} <= set(places)
    assert len(places) < 48
    assert max(b - a for a, b in pairwise(places)) <= 112
    doctor.chart.plan = Plan(64)
    assert sum(doctor.measures(step) for step in range(64)) <= 5


def test_reading_that_is_slower_than_computing():
    def run(waited: float, worked: float, steps: int) -> Patient:
        patient = Patient(workers=2)
        for step in range(steps):
            patient.doctor.time(step, waited, worked)
        return patient

    slow = run(0.2, 0.01, 60)
    assert slow.kinds == ["slow-input"]
    assert "--workers 4" in slow.said[0]
    assert run(0.2, 0.1, 200).kinds == []  # ten seconds lost in half a minute
    assert run(0.2, 0.1, 700).kinds == ["slow-input"]
    assert run(0.01, 0.1, 5000).kinds == []
    assert run(20.0, 0.1, 3).kinds == []  # a disk may hold its breath


# Whole runs


def planted(tmp_path: Path, name: str, **settings) -> list[dict]:
    train("builtin:digits", out=tmp_path / name, **{**QUICK, **settings})
    return json.loads((tmp_path / name / "run.json").read_text())["findings"]


def test_a_run_with_a_fault_and_one_without(tmp_path, capsys):
    found = planted(tmp_path, "high", lr=3.0, epochs=2, quiet=False)
    assert "learning-rate-too-high" in [finding["kind"] for finding in found]
    said = capsys.readouterr().err
    assert "doctor: step" in said
    assert "--lr" in said
    page = (tmp_path / "high" / "report.html").read_text()
    assert found[0]["kind"] in page
    assert found[0]["kind"] not in (tmp_path / "high" / "metrics.jsonl").read_text()
    assert planted(tmp_path, "healthy", epochs=2, quiet=False) == []
    assert "doctor: nothing stood out" in capsys.readouterr().err
    assert "Nothing stood out" in (tmp_path / "healthy" / "report.html").read_text()


def test_the_command_tells_findings(tmp_path):
    said = cli("train", "builtin:digits", "--epochs", 1, *TINY, "--patch-size", 12, "--json", "--out", tmp_path / "run")
    assert [finding["kind"] for finding in said.document["findings"]] == ["patch-too-large"]
    assert set(said.document["findings"][0]) == {"kind", "step", "severity", "words", "advice"}
    assert "doctor: 1 finding: patch-too-large" in said.err


def test_a_gradient_that_is_not_finite_is_a_finding_with_its_images(tmp_path, monkeypatch):
    plain = Supervised.forward
    monkeypatch.setattr(
        Supervised, "forward", lambda self, batch: (s := plain(self, batch))._replace(loss=s.loss * float("nan"))
    )
    with pytest.raises(WorkError):
        train("builtin:digits", out=tmp_path / "nan", epochs=1, **QUICK)
    (finding,) = json.loads((tmp_path / "nan" / "run.json").read_text())["findings"]
    assert (finding["kind"], finding["step"]) == ("not-finite", 1)
    assert ".png" in finding["words"]


def test_the_doctor_changes_no_bit_and_resuming_repeats_nothing(tmp_path, monkeypatch, capsys):
    from sightline.training.loop import Loop
    from sightline.training.signals import Interrupted

    settings = {**QUICK, "lr": 3.0, "epochs": 2, "save_seconds": 1e-9, "mixup": 0.2}
    settings["network"] = {**QUICK["network"], "drop_path_rate": 0.2}
    whole = sightline.train("builtin:digits", out=tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(Doctor, "measures", lambda self, step: False)
        unwatched = sightline.train("builtin:digits", out=tmp_path / "unwatched", **settings)
    files = [run.directory / "model.safetensors" for run in (whole, unwatched)]
    assert files[0].read_bytes() == files[1].read_bytes()

    record = Loop._record

    def stopping(self, update, batch, step, progress):
        record(self, update, batch, step, progress)
        if step == 38:
            raise Interrupted(15, step)

    capsys.readouterr()
    monkeypatch.setattr(Loop, "_record", stopping)
    with pytest.raises(Interrupted):
        sightline.train("builtin:digits", out=tmp_path / "stopped", **settings, quiet=False)
    monkeypatch.undo()
    first = capsys.readouterr().err
    again = sightline.train("builtin:digits", out=tmp_path / "stopped", resume=True, quiet=False)
    second = capsys.readouterr().err
    lasting = [finding for finding in again.findings if finding.kind != "slow-input"]
    assert lasting == [finding for finding in whole.findings if finding.kind != "slow-input"]
    assert "learning-rate-too-high" in [finding.kind for finding in lasting]
    for finding in lasting:
        assert (first + second).count(f"{finding.kind}: ") == 1
    assert read(tmp_path / "stopped" / "metrics.jsonl") == read(tmp_path / "whole" / "metrics.jsonl")


def test_a_fault_of_the_proof(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "proofs")
    import doctor as proof

    kind, run = proof.faults(tmp_path)["a head without values"]
    assert kind in [finding["kind"] for finding in run(tmp_path / "run")["findings"]]
    del sys.modules["doctor"]
