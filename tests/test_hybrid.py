"""Hybrids: the feature map, patches cut from it, and what differs between the original and timm."""

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from parity.hybrid import SMALL as THEIRS
from parity.hybrid import drawn, golden, with_stages
from sightline.checkpoints.hybrid import LAYOUTS
from sightline.checkpoints.load import load_bundle
from sightline.checkpoints.measure import Facts, stored_architecture
from sightline.checkpoints.rules import Found, load, save
from sightline.checkpoints.scheme import Request
from sightline.errors import UserError
from sightline.layout import Shapes
from sightline.network import Architecture, create_model, describe
from sightline.tokenizers.hybrid import HybridEmbedding

OPTIONS = {"layers": [1, 1], "width_factor": 0.5}
SMALL = {"image_size": (32, 48), "tokenizer_options": OPTIONS, "embed_dim": 24, "depth": 2, "num_heads": 3}


def test_the_stem_alone_with_patches_of_eight_reads_thirty_two_pixels():
    backbone = describe("vit_tiny_r_s16_p8_224").lay_out().backbone
    assert backbone.grid == (7, 7)  # its name says 16
    assert backbone.place.positions.table.shape == (1, 50, 192)


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("vit_base_r50_s16_224", 14),
        ("vit_base_r50_s16_384", 24),
        ("vit_small_r26_s32_384", 12),
        ("vit_large_r50_s32_224", 7),
    ],
)
def test_published_grids(name, cells):
    assert describe(name).lay_out().backbone.grid == (cells, cells)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 75),
    st.integers(1, 75),
    st.sampled_from([[], [1], [1, 1, 1]]),
    st.sampled_from([(1, 1), (2, 3)]),
    st.sampled_from(["pad", "drop"]),
)
def test_the_grid_is_that_of_the_tokens(height, width, layers, patch, partial):
    tokenizer = HybridEmbedding(4, patch_size=patch, partial=partial, layers=layers, width_factor=0.5)
    rows, columns = tokenizer.grid((height, width))
    tokens = tokenizer(torch.randn(1, 3, height, width))
    assert tokens.grid == (rows, columns)
    assert tokens.x.shape == (1, rows * columns, 4)


def test_the_stride_is_seen_in_the_grid_of_a_huge_image():
    tokenizer = HybridEmbedding(4, patch_size=(2, 1), layers=[1, 1, 1], width_factor=0.5)
    assert tokenizer.grid((2**20, 2**20)) == (2**15, 2**16)


def test_a_feature_map_that_patches_do_not_divide_is_filled_or_cut():
    filled = HybridEmbedding(4, patch_size=(4, 4), layers=[], width_factor=0.5)
    cut = HybridEmbedding(4, patch_size=(4, 4), partial="drop", layers=[], width_factor=0.5)
    cut.load_state_dict(filled.state_dict())
    pixels = torch.randn(1, 3, 40, 24)  # a map of 10 by 6
    assert filled(pixels).grid == (3, 2)
    assert cut(pixels).grid == (2, 1)
    torch.testing.assert_close(cut(pixels).x, filled(pixels).x[:, [0, 2]])


def test_settings_survive_json():
    parts = describe("vit_base_r50_s16_224", 5, **SMALL)
    assert Architecture.from_json(json.loads(json.dumps(parts.to_json()))) == parts


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": [1, -1]}, "layers must be positive"),
        ({"layers": [100, 100]}, "at most 128 in all"),
        ({"layers": [], "width_factor": 0.3}, "width_factor"),
        ({"layers": [], "weight_eps": -1.0}, "weight_eps"),
        ({"layers": [], "norm_eps": 2.0}, "norm_eps"),
    ],
)
def test_nonsense_is_refused_by_name(options, words):
    with pytest.raises(UserError, match=words):
        create_model("vit_base_r50_s16_224", 5, **(SMALL | {"tokenizer_options": options}))


def original(**options) -> nn.Module:
    eps = {"weight_eps": 1e-5, "weight_eps_to": "deviation", "norm_eps": 1e-6}
    return create_model(
        "vit_base_r50_s16_224",
        5,
        64,
        embed_dim=40,
        depth=1,
        num_heads=4,
        mlp_dim=44,
        activation="gelu_tanh",
        tokenizer_options={**OPTIONS, **eps, **options},
    ).eval()


def filled(network: nn.Module) -> nn.Module:
    """The network with the weights of the golden."""
    parts, layout = network.architecture, LAYOUTS["google/hybrid"]
    tensors = {name: torch.from_numpy(array) for name, array in drawn().items()}
    rules = layout.rules(parts.backbone, parts.head)
    state = load(rules, Found("golden", tensors), parts.shapes())
    network.load_state_dict(state)
    back = save(rules, state)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert back.keys() == tensors.keys()
    return network


def test_the_original_adds_epsilon_to_the_deviation(tmp_path):
    made = golden(tmp_path)
    with torch.no_grad():
        ours, otherwise = (filled(original(**options))(made.pixels) for options in ({}, {"weight_eps_to": "variance"}))
    scale = made.expected.abs().max()
    assert (ours - made.expected).abs().max() <= 1e-5 * scale
    assert (otherwise - made.expected).abs().max() > 5e-5 * scale


def test_a_named_network_keeps_the_epsilons_of_its_source():
    measured = {"layers": [1, 1], "width_factor": 0.5}
    measured |= {"weight_eps": 1e-5, "weight_eps_to": "deviation", "norm_eps": 1e-6}
    shapes = Shapes({name: array.shape for name, array in drawn().items()}, "file")
    assert LAYOUTS["google/hybrid"].measure(shapes, None)["tokenizer_options"] == measured
    # Named rows say how many blocks there are, and nothing of epsilons.
    facts = Facts("file", 500, LAYOUTS["google/hybrid"], {"tokenizer_options": measured})
    named = stored_architecture(facts, Request("vit_base_r50_s16_224", None, None, None, {}))
    assert named.backbone.tokenizer_options == measured | {"layers": [3, 4, 9]}


def test_symmetric_padding_would_be_seen(tmp_path):
    made, network = golden(tmp_path), filled(original())
    network.backbone.tokenizer.conv.same = False
    network.backbone.tokenizer.conv.padding = (3, 3)
    with torch.no_grad():
        assert (network(made.pixels) - made.expected).abs().max() > 1e-2 * made.expected.abs().max()


def test_timm_misses_nothing():
    shape = {**SMALL, "image_size": (48, 80), "embed_dim": 36, "tokenizer_options": {**OPTIONS, "layers": [1, 2, 1]}}
    network = create_model("vit_base_r50_s16_224", THEIRS["num_classes"], **shape, partial_patches="drop")
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    parts, layout, theirs = network.architecture, LAYOUTS["timm/hybrid"], with_stages((48, 80))
    theirs.load_state_dict(save(layout.rules(parts.backbone, parts.head), network.state_dict()))
    pixels = torch.randn(2, 3, 48, 80)
    torch.testing.assert_close(theirs.eval()(pixels), network.eval()(pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "vit_small_r26_s32_224", "vit_base_r50_s16_384"])
def test_published_tensors_are_those_of_timm(name):
    parts, layout = describe(name), LAYOUTS["timm/hybrid"]
    with torch.device("meta"):
        told, arguments = layout.arguments(parts.backbone, parts.head)
        theirs = timm.create_model(told, **arguments).state_dict()
    meta = {key: torch.empty(shape, device="meta") for key, shape in parts.shapes().items()}
    ours = save(layout.rules(parts.backbone, parts.head), meta)
    assert {key: t.shape for key, t in ours.items()} == {key: t.shape for key, t in theirs.items()}
    assert layout.unwritten(parts.backbone, parts.head) == []


def test_what_timm_cannot_express_is_refused():
    layout = LAYOUTS["timm/hybrid"]
    parts = describe("vit_base_r50_s16_224", 5, **SMALL)
    assert layout.refusals(parts.backbone, parts.head) == []
    assert "residual network" in layout.unwritten(parts.backbone, parts.head)[0]
    other = replace(parts.backbone, tokenizer_options={**OPTIONS, "norm_eps": 1e-6})
    assert any("epsilons" in phrase for phrase in layout.refusals(other, parts.head))
    uneven = replace(parts.backbone, patch_size=(3, 3))
    assert any("feature map" in phrase for phrase in layout.refusals(uneven, parts.head))


def test_old_files_have_norms_of_four_axes(tmp_path):
    made = golden(tmp_path)
    with np.load(made.path) as file:
        arrays = {name: file[name] for name in file.files}
    old = {n: a.reshape(1, 1, 1, -1) if "gn" in n else a for n, a in arrays.items()}
    assert sum(array.ndim == 4 and array.shape[0] == 1 for array in old.values()) > 4
    np.savez(made.path, **old)
    with torch.no_grad():
        answer = load_bundle(made.path).network(made.pixels)
    assert (answer - made.expected).abs().max() <= 1e-5 * made.expected.abs().max()
    np.savez(made.path, **{**old, "gn_root/scale": old["gn_root/scale"].reshape(1, 1, 2, -1)})
    with pytest.raises(UserError, match="gn_root/scale"):
        load_bundle(made.path)
