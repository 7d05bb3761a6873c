"""Pooled features that have to tell every patch: the arithmetic, and what it changes in each objective with masks."""

import pytest
import torch
import torch.nn.functional as F

from objectives import batch, objective
from sightline.errors import UserError
from sightline.network import create_model
from sightline.objectives.simmim import SimMIM, SimMIMConfig
from sightline.objectives.summary import Summary, joined
from sightline.recipes.pretraining import PUBLISHED, SMALL
from sightline.types import Batch

MASKED = ["mae", "masked-patch", "simmim", "beit"]


def test_every_patch_is_told_from_the_features_through_its_own_gate():
    summary = Summary(3, 5, 2, hidden=7)
    features = torch.randn(11, 3)
    told = summary(features)
    assert told.shape == (11, 5, 2)
    inner = F.gelu(features[4] @ summary.inner.weight.T + summary.inner.bias)
    wanted = summary.answer.weight @ (inner * summary.gates[3]) + summary.answer.bias
    torch.testing.assert_close(told[4, 3], wanted)


def test_the_baseline_is_that_of_both_losses():
    figures = {"baseline": torch.tensor(3.0)}
    assert float(joined(torch.tensor(2.0), torch.tensor(5.0), 0.5, figures)) == 4.5
    assert {name: float(value) for name, value in figures.items()} == {"baseline": 4.5, "summary_loss": 5.0}


@pytest.mark.parametrize("name", MASKED)
def test_the_summary_adds_its_loss_and_teaches_what_is_embedded(name):
    torch.manual_seed(0)
    taught = objective(name, summary=2.0)
    given = batch(taught, name)
    step = taught(given)
    assert torch.isfinite(step.loss)
    taught.config = type(taught.config)(**{**vars(taught.config), "summary": 0.0})
    torch.testing.assert_close(taught(given).loss + 2 * step.metrics["summary_loss"], step.loss)
    step.loss.backward()
    for part in (taught.summary.gates, taught.summary.inner.weight, next(taught.network.backbone.parameters())):
        assert float(part.grad.abs().sum()) > 0
    assert "summary_loss" not in objective(name)(given).metrics


@pytest.mark.parametrize("name", MASKED)
def test_published_runs_have_no_summary_and_small_ones_have(name):
    assert "summary" not in PUBLISHED.get(name, SMALL["dino"]).options
    assert SMALL[name].options["summary"] > 0
    with pytest.raises(UserError, match="summary must not be negative"):
        objective(name, summary=-1.0)


def test_a_pyramid_tells_areas_of_its_last_stage():
    size = {"image_size": (32, 48), "embed_dim": 24, "depths": (2, 2), "num_heads": (3, 6), "window_size": 4}
    network = create_model("swin_tiny_patch4_window7_224", 0, **size)
    taught = SimMIM(network, SimMIMConfig(0.5, summary=1.0)).train()
    assert taught.summary(torch.zeros(1, 48)).shape == (1, 24, 8 * 8 * 3)
    index = torch.arange(2)
    taught(Batch(torch.randn(2, 3, 32, 48), index, index, index)).loss.backward()
    assert taught.summary.gates.grad.all(dim=1).all()
