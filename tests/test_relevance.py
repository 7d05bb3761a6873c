"""Relevance: gradients of maps that were never made, against those of maps that were, for every kind of network."""

import math

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import Tensor

from sightline.backbones.cait import TalkingHeads
from sightline.errors import UserError, WorkError
from sightline.explanation.explain import explain
from sightline.explanation.grids import Seats
from sightline.explanation.maps import evaluating, laid_out, record
from sightline.explanation.queries import query_row, token_names
from sightline.explanation.relevance import pulls, relevance
from sightline.layers.attention import Attention
from test_explanation_kinds import ATTENTIVE, OTHERS
from test_networks import small


def explicit(kept: list[Tensor]):
    """A forward pass of `Attention` whose maps are made, and kept with their gradients."""

    def forward(self, query, key=None, value=None, *, bias=None):
        maps = self.weights(query, key, value, bias=bias)
        maps.retain_grad()
        kept.append(maps)
        mixing = maps
        if isinstance(self, TalkingHeads):
            mixing = rearrange(self.after(rearrange(maps, "b h n m -> b n m h")), "b n m h -> b h n m")
        values = self.project(query, key, value)[2]
        return self.out(rearrange(mixing @ values, "b h n k -> b n (h k)"))

    return forward


@pytest.mark.parametrize("kind", ATTENTIVE)
def test_gradients_and_relevance_are_those_of_explicit_maps(kind, monkeypatch):
    network, pixels = small(kind), torch.randn(1, 3, 33, 47)
    index, found = pulls(network, pixels, 3)
    assert index == 3
    kept: list[Tensor] = []
    for attention in (Attention, TalkingHeads):
        monkeypatch.setattr(attention, "forward", explicit(kept))
    network(pixels)[0, 3].backward()
    assert len(found) == len(kept)
    for pull, maps in zip(found, kept, strict=True):
        call = pull.layer.call
        ours = call.attention.weights_gradient(pull.gradient, *call.args, **call.kwargs)
        torch.testing.assert_close(ours, maps.grad, atol=1e-5 * float(maps.grad.abs().max()), rtol=1e-3)
    if len({pull.layer.seats for pull in found}) > 1 or not found[0].layer.plain:
        return  # laid out by families; what is laid out is tested above, and how below
    n = kept[0].shape[-1]
    whole = torch.eye(n, dtype=torch.float64)
    for maps in kept:  # arXiv 2103.15679, equations 5 and 6
        whole = whole + (maps.grad * maps.detach()).double().relu().mean(dim=1)[0] @ whole
    final = network.backbone(pixels)
    seats, names = Seats(final.prefix, final.grid), token_names(network.backbone, final.prefix)
    for query in ("mean of patches", *names):
        row = query_row(seats, query, names)
        expected = (row.double() @ whole - row).float()
        ours = relevance(found, row, seats)
        torch.testing.assert_close(ours, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("kind", ATTENTIVE)
def test_numbers_that_are_no_shares_are_laid_out_as_they_are(kind):
    network = small(kind)
    with evaluating(network):
        _, calls = record(network.backbone, torch.randn(1, 3, 33, 47))
        for call in calls:
            layer, maps = laid_out(network.backbone, call, (33, 47)), call.weights()
            shares, plain = layer.laid(maps), layer.laid(maps, shares=False)
            torch.testing.assert_close(layer.laid(3 * maps, shares=False), 3 * plain)
            asked = plain.sum(-1) > 0
            scaled = plain / plain.sum(-1, keepdim=True).clamp_min(1e-20)
            torch.testing.assert_close(scaled[asked], shares[asked])
            assert plain.sum() <= maps.sum() * (1 + 1e-5)  # nothing but padding is left out
            assert kind == "cait" or asked.all()


@pytest.mark.parametrize("kind", ["vit", "swin", "pit", "cait", "dinov2_registers"])
def test_explanations_have_it_where_it_is_asked_for(kind):
    network, pixels = small(kind), torch.randn(3, 33, 47)
    without, view = explain(network, pixels), explain(network, pixels, gradients=True)
    assert without.relevance is without.relevance_class is None
    assert view.relevance.shape == view.grid
    assert (view.relevance >= 0).all()
    assert view.relevance.any()
    with torch.no_grad():
        assert view.relevance_class == int(network(pixels[None]).argmax())
    assert {"relevance", "relevance_class"} <= set(view.arrays())
    other = explain(network, pixels, gradients=True, target=(view.relevance_class + 1) % 5)
    assert not np.allclose(other.relevance, view.relevance)
    assert np.array_equal(other.rollout, view.rollout)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_frozen_and_training_networks_are_left_as_they_were():
    network = small("vit", drop_path_rate=0.5, attn_drop_rate=0.5).train().requires_grad_(False)
    first, second = (explain(network, torch.ones(3, 33, 47), gradients=True).relevance for _ in range(2))
    assert np.array_equal(first, second)
    assert network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_pixels_of_inference_mode_will_do():
    with torch.inference_mode():
        pixels = torch.randn(3, 33, 47)
    assert explain(small("vit"), pixels, gradients=True).relevance.any()


def test_a_class_that_makes_no_difference_has_no_relevance():
    network = small("vit")
    network.head.classifier.weight.data[2] = 0
    assert not explain(network, torch.randn(3, 33, 47), gradients=True, target=2).relevance.any()


@pytest.mark.parametrize("target", [-1, 5])
def test_a_class_that_there_is_not(target):
    for kind in ("vit", "resnet"):
        with pytest.raises(UserError, match=f"no class {target}: the model has 5, counted from 0"):
            explain(small(kind), torch.randn(3, 33, 47), gradients=True, target=target)


def test_gradients_that_are_not_finite():
    network = small("vit")
    network.head.classifier.weight.data[1, 0] = math.nan
    with pytest.raises(WorkError, match=r"gradient at layer .* is not finite"):
        explain(network, torch.randn(3, 33, 47), gradients=True, target=1)


@pytest.mark.parametrize("kind", OTHERS)
def test_networks_without_attention_have_none(kind):
    view = explain(small(kind), torch.randn(3, 33, 47), gradients=True, target=1)
    assert view.relevance is view.relevance_class is None
    assert view.activation_class == 1
