"""Collapses of runs without labels are named, by what the journal says, and healthy ones are not."""

import math

import numpy as np
import pytest
import torch

from sightline.reports.charts import line_chart
from sightline.training.chart import Chart
from sightline.training.doctor import Doctor
from sightline.training.schedule import Plan
from sightline.training.settings import Settings
from sightline.training.vitals import spread
from test_doctor import around


class Learner:
    """A doctor of a run without labels, and the journal that it reads."""

    def __init__(self, total: int = 400):
        self.doctor = Doctor(Settings(), 20)
        self.doctor.chart.plan = Plan(total)
        self.step = 0

    def looks(self, *spreads: tuple[float, float]) -> "Learner":
        for deviation, rank in spreads:
            self.doctor.hear({"step": self.step, "feature_std": deviation, "effective_rank": rank})
            self.step += 16
        return self

    def learns(self, losses, **figures: float) -> "Learner":
        for loss in losses:
            self.step += 1
            self.doctor.hear({"step": self.step, "epoch": 0.0, "loss": float(loss), "lr": 1e-3, **figures})
        return self

    def kinds(self) -> list[str]:
        return [finding.kind for finding in self.doctor.findings]


def test_features_that_become_alike_are_named_after_two_looks():
    assert Learner().looks((0.06, 20), (0.05, 18), (0.004, 18), (0.003, 17)).kinds() == ["feature-collapse"]
    assert Learner().looks((0.06, 20), (0.05, 18), (0.004, 18), (0.06, 17)).kinds() == []
    assert Learner().looks((0.9, 20), (0.8, 1.2), (0.8, 1.1)).kinds() == ["feature-collapse"]
    assert Learner().looks((0.06, 2.5), (0.3, 9), (0.9, 30)).kinds() == []


def test_a_teacher_that_says_one_thing_or_nothing_is_named():
    losses = [5.0] * 10
    assert Learner().learns(losses, teacher_entropy=0.02, prototype_perplexity=1.05).kinds() == ["teacher-collapse"]
    assert Learner().learns(losses, teacher_entropy=0.999, prototype_perplexity=250.0).kinds() == ["teacher-collapse"]
    assert Learner().learns(losses, teacher_entropy=0.6, prototype_perplexity=40.0).kinds() == []
    assert Learner().learns(losses[:9], teacher_entropy=0.02, prototype_perplexity=1.0).kinds() == []


def test_a_codebook_of_one_is_named_once_it_is_old_enough():
    young = Learner().learns([0.3] * 49, codebook_perplexity=1.0)
    assert young.kinds() == []
    assert young.learns([0.3], codebook_perplexity=1.0).kinds() == ["codebook-collapse"]
    assert Learner().learns([0.3] * 80, codebook_perplexity=9.0).kinds() == []


def test_a_loss_that_never_leaves_its_baseline_is_named():
    run = Learner().learns(around(0.995, 200), baseline=0.99)
    run.doctor.chart.pace = 20.0
    assert run.learns(around(0.995, 40), baseline=0.99).kinds() == ["loss-at-chance"]
    healthy = Learner()
    healthy.doctor.chart.pace = 20.0
    assert healthy.learns(around(0.8, 240), baseline=0.99).kinds() == []


def test_a_decoder_that_begins_worse_than_none_has_not_diverged():
    falling = np.linspace(1.75, 0.8, 120)
    assert Learner().learns(falling, baseline=0.9).kinds() == []
    assert "divergence" in Learner().learns([*falling, *around(3.0, 40)], baseline=0.9).kinds()


def test_without_labels_the_scale_is_the_baseline():
    chart = Chart(Settings(), 20)
    assert not chart.learnable
    for step in range(1, 31):
        chart.take({"step": step, "loss": 0.5, "baseline": 1.0, "lr": 1e-3})
    assert chart.learnable
    assert chart.scale == (1.0, 0.0)
    assert chart.learned(20).value == pytest.approx(0.5)


def test_the_spread_of_features_by_hand():
    even = torch.eye(4).repeat(3, 1)
    told = spread(even)
    # Centred, the four corners of a simplex span three directions of equal length.
    assert told["effective_rank"] == pytest.approx(3)
    assert told["feature_std"] == pytest.approx(math.sqrt(1 / 4 - 1 / 16) * 2)
    assert spread(torch.ones(5, 7)) == pytest.approx({"feature_std": 0.0, "effective_rank": 1.0}, abs=1e-6)
    line = torch.stack([torch.tensor([1.0, float(i % 2)]) for i in range(6)])
    assert spread(line)["effective_rank"] == pytest.approx(1)


def test_a_loss_below_zero_is_drawn():
    assert "<svg" in line_chart([(0.0, -0.1), (1.0, -0.4)], "epoch", "training loss", zero=True)
