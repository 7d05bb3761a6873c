"""What explanations keep for every kind of network: pyramids, windows, late class tokens, and no attention at all."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from command import cli
from sightline.checkpoints.directory import write_model
from sightline.datasets.digits import digits
from sightline.errors import UserError
from sightline.evaluation.accuracy import Accuracy
from sightline.explanation.explain import Explanation, explain
from sightline.explanation.files import explain_image
from sightline.explanation.filters import patch_filters
from sightline.explanation.grids import Seats, cover, handed_down, lattice, strides
from sightline.explanation.maps import attention_layers, evaluating, laid_out, record
from sightline.explanation.positions import position_similarity
from sightline.explanation.render import spread
from sightline.images.preprocess import Preprocess
from sightline.layers.attention import Attention
from sightline.network import Network, create_model
from sightline.reports.classes import ClassesReport as Report
from test_networks import KINDS, small

ATTENTIVE = [kind for kind in KINDS if attention_layers(small(kind).backbone)]
OTHERS = [kind for kind in KINDS if kind not in ATTENTIVE]
SIZES = [(33, 47), (64, 32), (17, 96)]


def pieces(view: Explanation) -> list[tuple[int, np.ndarray, np.ndarray]]:
    return list(zip(view.layers, view.heads, view.head_maps, strict=True))


@pytest.mark.parametrize("kind", ATTENTIVE)
class TestEveryKindWithAttention:
    @pytest.mark.parametrize("size", SIZES)
    def test_maps_lie_over_all_tokens_and_are_those_that_were_used(self, kind, size):
        network, outputs = small(kind), []
        for module in network.backbone.modules():
            if isinstance(module, Attention):
                module.register_forward_hook(lambda _module, _args, output: outputs.append(output))
        with evaluating(network):
            _, calls = record(network.backbone, torch.randn(1, 3, *size))
            assert len(calls) == len(outputs) == attention_layers(network.backbone)
            for call, output in zip(calls, outputs, strict=True):
                layer = laid_out(network.backbone, call, size)
                maps = torch.cat(list(layer.maps()), dim=1)
                n = layer.seats.tokens
                assert maps.shape == (1, layer.heads, n, n)
                assert (maps >= 0).all()
                torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:3]), atol=1e-5, rtol=0)
                if type(call.attention) is Attention:
                    given = dict(zip(("query", "key", "value"), call.args, strict=False))
                    values = call.attention.project(*(given.get(name) for name in ("query", "key", "value")))[2]
                    mixed = call.attention.out(rearrange(call.weights() @ values, "b h n k -> b n (h k)"))
                    torch.testing.assert_close(mixed, output, atol=1e-5 * float(output.abs().max()), rtol=1e-4)

    @pytest.mark.parametrize("size", SIZES)
    def test_shapes_sums_and_steps(self, kind, size):
        network = small(kind)
        view = explain(network, torch.randn(3, *size))
        final = network.backbone(torch.randn(1, 3, *size))
        assert view.rollout.shape == view.rollout_raw.shape == view.grid == view.grids[0]
        assert view.grids[-1] == final.grid
        assert (view.prefix, view.size) == (final.prefix, size)
        for cells in (view.rollout, view.rollout_raw):
            assert np.isfinite(cells).all()
            assert (cells >= 0).all()
            assert 0 < cells.sum() <= 1 + 1e-5
            assert final.prefix or cells.sum() == pytest.approx(1, abs=1e-5)
        assert view.stride == view.strides[0]
        reach = np.array(view.grid) * view.stride
        assert (reach > np.array(size) - 2 * np.array(view.stride)).all()
        assert view.layers == tuple(range(len(view.grids)))
        assert len(view.distance) == len(view.grids) == len(view.strides)
        for layer, heads, maps in pieces(view):
            grid = view.grids[layer]
            assert maps.shape == (len(heads), *grid)
            assert maps.any(axis=(1, 2)).all()
            distance = view.distance[layer]
            assert np.isnan(distance[len(heads) :]).all()
            known = distance[: len(heads)]
            assert (np.isnan(known) | ((known >= 0) & (known <= 1.5 * math.hypot(*size)))).all()
        alike = len({heads.shape for heads in view.heads}) == 1
        assert isinstance(view.heads, np.ndarray) == alike == isinstance(view.head_maps, np.ndarray)

    def test_one_layer_kept_changes_nothing_else(self, kind):
        network, pixels = small(kind), torch.randn(3, 33, 47)
        every, last = explain(network, pixels), explain(network, pixels, layers=[-1])
        assert np.array_equal(every.heads[-1], last.heads[0])
        assert np.array_equal(every.rollout, last.rollout)
        assert np.array_equal(every.distance, last.distance, equal_nan=True)
        assert {name for name in last.arrays() if name.startswith("heads")} <= set(every.arrays())


@pytest.mark.parametrize("kind", KINDS)
def test_pages_pictures_and_arrays(kind, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (61, 97, 3), dtype=np.uint8)
    view, page = explain_image(small(kind), Preprocess(size=(33, 47)), image, tmp_path)
    files, text = {path.name for path in tmp_path.iterdir()}, page.read_text()
    assert {"index.html", "explanation.npz", "original.png", "side-by-side.png"} <= files
    assert ("rollout.png" in files) == (kind in ATTENTIVE) == ("no attention" not in text)
    assert ("activation.png" in files) == (view.activation is not None) == ("each place speaks for" in text)
    assert ("positions.png" in files) == (view.position_similarity is not None) == ("no table of positions" not in text)
    assert ("filters.png" in files) == (view.filters is not None) == ("no convolution" not in text)
    assert sum(name.startswith("heads-layer-") for name in files) == len(view.layers)
    assert {"colours.png", "norms.png"} <= files
    for name in ("attention.png", "relevance.png", "masks.png", "distance.png"):
        assert (name in files) == (kind in ATTENTIVE)
    with np.load(tmp_path / "explanation.npz", allow_pickle=False) as saved:
        assert set(saved.files) == set(view.arrays())
        for name, array in view.arrays().items():
            assert np.array_equal(saved[name], array, equal_nan=array.dtype.kind == "f")
    for picture in tmp_path.glob("*.png"):
        with Image.open(picture) as opened:
            opened.load()


class TestPositionsAndFilters:
    @pytest.mark.parametrize("kind", KINDS)
    def test_what_there_is_to_show_is_shown(self, kind):
        backbone = small(kind).backbone
        table = any(name.endswith("positions.table") for name in backbone.state_dict())
        with evaluating(backbone):
            grid = backbone.stages(torch.randn(1, 3, 33, 47))[0].grid
            assert (position_similarity(backbone, grid) is not None) == table
        convolutions = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)]
        assert (patch_filters(backbone) is not None) == bool(convolutions)

    def test_of_other_channels(self):
        assert patch_filters(small("resnet", in_chans=2).backbone).directions.shape[1] == 2


class TestDistilled:
    def test_both_tokens_ask(self):
        network, pixels = small("deit_distilled"), torch.randn(3, 33, 47)
        view = explain(network, pixels)
        assert view.query == "class and distillation tokens"
        whole = np.eye(32)
        for heads in view.heads:
            whole = (heads.mean(0) + np.eye(32)) / 2 @ whole
        assert np.allclose(view.rollout, whole[:2, 2:].mean(0).reshape(5, 6), atol=1e-6)
        assert np.allclose(view.head_maps, view.heads[:, :, :2, 2:].mean(2).reshape(2, 3, 5, 6))


class TestLateClassToken:
    def test_patches_ask_where_the_class_token_does_not_read(self):
        view = explain(small("cait"), torch.randn(3, 33, 47))
        assert np.allclose(view.head_maps[0], view.heads[0][:, 1:, 1:].mean(1).reshape(3, 5, 6))
        assert np.allclose(view.head_maps[-1], view.heads[-1][:, 0, 1:].reshape(3, 5, 6))
        assert np.isnan(view.distance).all(axis=1).tolist() == [False, False, True]

    def test_one_patch(self):
        network = small("cait")
        view = explain(network, torch.randn(3, 8, 8))
        assert np.allclose(view.heads.sum(-1), 1)
        assert np.array_equal(view.heads[0], np.eye(2, dtype=np.float32)[None].repeat(3, axis=0))


class TestActivation:
    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in OTHERS or kind == "swin"])
    def test_its_mean_is_the_logit_less_the_bias(self, kind):
        network, pixels = small(kind), torch.randn(1, 3, 33, 47)
        view = explain(network, pixels)
        with evaluating(network):
            logits = network(pixels)[0]
        assert view.activation_class == int(logits.argmax())
        bias = network.head.classifier.bias.detach()[view.activation_class]
        assert view.activation.mean() + float(bias) == pytest.approx(float(logits.max()), rel=1e-4)

    @pytest.mark.parametrize(
        "settings", [{}, {"global_pool": "avg"}, {"global_pool": "both"}, {"global_pool": "avg", "num_classes": 0}]
    )
    def test_none_where_it_would_not_be_exact(self, settings):
        name, overrides = KINDS["vit"]
        assert explain(create_model(name, **overrides | settings), torch.randn(3, 33, 47)).activation is None

    def test_a_pooling_transformer_without_a_norm_behind_the_pooling(self):
        view = explain(small("vit", global_pool="avg", fc_norm=False), torch.randn(3, 33, 47))
        assert view.activation.shape == view.grid

    @pytest.mark.parametrize("kind", OTHERS)
    def test_networks_without_attention(self, kind):
        network, image = small(kind), np.zeros((66, 94, 3), np.uint8)
        view = explain(network, torch.randn(3, 33, 47))
        assert view.rollout is view.rollout_raw is view.rollout_scaled is None
        assert view.layers == view.heads == view.head_maps == view.grids == ()
        assert np.array_equal(view.shown, view.activation.clip(min=0))
        assert view.overlay(image).max() > 0
        with pytest.raises(UserError, match="no attention"):
            explain(network, torch.randn(3, 33, 47), layers=[0])

    def test_neither_attention_nor_classes(self, tmp_path):
        name, overrides = KINDS["resnet"]
        network, image = create_model(name, **overrides | {"num_classes": 0}), np.zeros((66, 94, 3), np.uint8)
        view, page = explain_image(network, Preprocess(size=(33, 47)), image, tmp_path)
        assert view.shown is None
        assert view.overlay(image) is image
        assert {path.stem for path in tmp_path.glob("*.png")} == {"original", "filters", "colours", "norms"}
        assert "Left out: it is exact only where" in page.read_text()


GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9))


class TestGrids:
    def test_a_last_cell_that_is_not_full(self):
        assert [cover(5, 3), cover(4, 2), cover(7, 4), cover(27, 14), cover(3, 1)] == [2, 2, 2, 2, 3]
        row = torch.tensor([[[0.5, 0.2, 0.3]]])
        down = handed_down(row, Seats(0, (1, 3)), Seats(0, (1, 5)))
        assert torch.allclose(down, torch.tensor([[[0.25, 0.25, 0.1, 0.1, 0.3]]]))

    def test_cells_that_cover_parts_of_cells(self):
        assert cover(3, 2) == 2  # as a pyramid that halves, and rounds up
        assert cover(5, 4) == 1.25
        down = handed_down(torch.tensor([[[0.0, 0.5, 0.0, 0.5]]]), Seats(0, (4, 1)), Seats(0, (5, 1)))
        assert torch.allclose(down, torch.tensor([[[0.0, 0.3, 0.2, 0.1, 0.4]]]))

    def test_prefix_tokens_keep_their_share_while_there_are_such(self):
        row = torch.tensor([[[0.1, 0.2, 0.3, 0.4]]])
        down = handed_down(row, Seats(2, (1, 2)), Seats(1, (1, 4)))
        assert torch.allclose(down, torch.tensor([[[0.1, 0.15, 0.15, 0.2, 0.2]]]))
        more = handed_down(row, Seats(2, (1, 2)), Seats(3, (1, 2)))
        assert torch.allclose(more, torch.tensor([[[0.1, 0.2, 0.0, 0.3, 0.4]]]))

    @given(GRIDS, GRIDS, st.integers(0, 2))
    def test_shares_are_neither_lost_nor_made(self, above, below, prefix):
        rows = torch.rand(1, 2, Seats(prefix, above).tokens)
        down = handed_down(rows, Seats(prefix, above), Seats(prefix, below))
        assert (down >= 0).all()
        assert torch.allclose(down.sum(-1), rows.sum(-1), atol=1e-4)
        assert torch.equal(down[..., :prefix], rows[..., :prefix])

    def test_steps_grow_with_the_cells(self):
        assert strides((4.0, 3.0), [(5, 4), (5, 4), (3, 2), (2, 1)]) == ((4, 3), (4, 3), (8, 6), (16, 12))
        assert strides((4.0, 3.0), []) == ((4, 3),)

    def test_patches_that_overlap_reach_as_far_on_either_side(self):
        network = small("pit")  # patches of 8 pixels, every 4
        assert lattice(network.backbone, (33, 47), (7, 10)) == ((2, 2), (4, 4))
        _, seen = spread(np.ones((7, 10), np.float32), 33, 47, explain(network, torch.randn(3, 33, 47)).view(33, 47))
        rows, columns = seen.any(axis=1), seen.any(axis=0)
        assert rows.tolist() == [True] * 32 + [False]
        assert columns.tolist() == [True] * 44 + [False] * 3

    def test_without_a_known_step_the_grid_covers_the_image(self):
        assert lattice(nn.Identity(), (35, 22), (5, 11)) == ((0, 0), (7, 2))
        view = explain(small("resnet"), torch.randn(3, 64, 32))
        assert np.allclose(np.array(view.grid) * view.stride, (64, 32))


def bright_seeker(kind: str, **settings) -> Network:
    """A network of a kind, made by hand, in which every head of every layer attends to bright patches.

    Channel 0 of every token is the mean brightness of what it was made of, and nothing else is ever written.
    """
    network = small(kind, **settings)
    for parameter in network.parameters():
        parameter.data.zero_()
    for name, module in network.backbone.named_modules():
        if isinstance(module, Attention):
            width, side = module.out.out_features, module.out.out_features // module.heads
            for head in range(module.heads):
                module.qkv.bias.data[side * head] = 8.0 * side**0.5  # every query asks …
                module.qkv.weight.data[width + side * head, 0] = 1.0  # … and brightness answers
        elif isinstance(module, nn.Conv2d):
            module.weight.data[0] = 1 / module.weight[0].numel()
        elif name.endswith(("before", "after")):
            nn.init.eye_(module.weight)  # heads that talk say what they hear
        elif name.endswith("reduction"):
            module.weight.data[0, :: module.in_features // 4] = 0.25
        elif isinstance(module, nn.LayerNorm):
            module.forward = lambda x: x
    return network


PLANTED = {
    "vit": {},
    "deit_distilled": {"patch_size": 4},
    "cait": {"patch_size": 4},
    "swin": {},
    "swin in timm's way": {"window_fit": "always", "padding": "seen_after_shift"},
    "pit": {},
}


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("size", [(64, 96), (52, 77)])
@pytest.mark.parametrize("corner", [(9, 58), (31, 13)])
def test_a_planted_object_is_found_where_it_stands(kind, size, corner):
    network = bright_seeker(kind.split()[0], image_size=(64, 96), **PLANTED[kind])
    pixels = torch.zeros(3, *size)
    rows, columns = slice(corner[0], corner[0] + 12), slice(corner[1], corner[1] + 12)
    pixels[:, rows, columns] = 1.0
    view = explain(network, pixels)
    inside = np.zeros(size, bool)
    inside[rows, columns] = True
    for cells, least in ((view.rollout, 1.5), (view.rollout_raw, 3)):
        heat, seen = spread(cells, *size, view.view(*size))
        assert heat[inside].mean() > least * heat[seen & ~inside].mean()
        found = np.argwhere(seen & (heat > heat.max() / 2)).mean(axis=0) + 0.5
        assert math.dist(found, (corner[0] + 6, corner[1] + 6)) < 4  # a patch at most


class TestCommand:
    @pytest.mark.parametrize("kind", ["swin", "pit", "cait", "bit"])
    def test_explains_a_model_directory(self, kind, tmp_path):
        write_model(tmp_path / "model", small(kind), Preprocess(size=(33, 47)), list("abcde"))
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 97, 3), dtype=np.uint8)).save(tmp_path / "a.png")
        said = cli("explain", tmp_path / "model", tmp_path / "a.png", "--out", tmp_path / "out", "--json")
        assert said.status == 0, said.err
        [result] = said.document["results"]
        with np.load(result["arrays"]) as arrays:
            assert ("rollout" in arrays) == (kind in ATTENTIVE)
            if "activation_class" in arrays:
                assert int(arrays["activation_class"]) == "abcde".index(result["predictions"][0]["label"])
                assert f"speaks for “{result['predictions'][0]['label']}”" in Path(result["page"]).read_text()
        layers = 4 if kind == "pit" else 2
        said = cli("explain", tmp_path / "model", tmp_path / "a.png", "--out", tmp_path / "b", "--layers", layers)
        assert (said.status == 0) == (kind in ATTENTIVE)
        assert kind in ATTENTIVE or "no layer 2: the model has no attention" in said.err
        assert len(list((tmp_path / "b").glob("a/heads-*"))) == (kind in ATTENTIVE)


@pytest.mark.parametrize("kind", ["resnet", "swin", "pit"])
def test_reports_show_where_the_network_looked(kind, tmp_path):
    network, images = small(kind), digits()
    counts = Accuracy(10, mistakes=[(0.9, 3, 5), (0.8, 7, 1)])
    report = Report(tmp_path, network, Preprocess(size=(33, 47)), list(images.classes), images, counts, {})
    assert report._mistakes().count("data:image/png") == 4
