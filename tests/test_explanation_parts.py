"""The parts of an explanation: whose attention, how much of the skip connections, patches as colours, norms, masks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sightline.errors import UserError
from sightline.explanation.explain import explain
from sightline.explanation.features import principal_colours, standing_out, token_norms
from sightline.explanation.files import judge_maps
from sightline.explanation.grids import Seats
from sightline.explanation.queries import query_row, settled, token_names
from sightline.explanation.render import View, veil
from sightline.explanation.segmentation import mass_mask, overlap, pixel_mask
from sightline.explanation.survey import MOST_COLOURED, Survey
from sightline.layers.attention import Attention
from sightline.types import Tokens
from test_explanation import small as of_dull_shape
from test_networks import KINDS, small

PIXELS = torch.linspace(-1, 1, 3 * 33 * 47).sin().reshape(3, 33, 47)


class TestQueries:
    @pytest.mark.parametrize(
        ("kind", "names"),
        [
            ("vit", ["class token"]),
            ("deit_distilled", ["class token", "distillation token"]),
            ("pit", ["class token", "distillation token"]),
            ("cait", ["class token"]),
            ("swin", []),
            ("dinov2_registers", ["class token", *(f"register {n}" for n in (1, 2, 3, 4))]),
        ],
    )
    def test_names_of_the_tokens(self, kind, names):
        backbone = small(kind).backbone
        prefix = backbone(PIXELS[None]).prefix
        assert list(token_names(backbone, prefix)) == names == list(explain(small(kind), PIXELS).prefix_names)

    def test_registers_without_a_class_token(self):
        backbone = small("vit", class_token=False, reg_tokens=2, global_pool="avg").backbone
        assert token_names(backbone, 2) == ("register 1", "register 2")

    def test_words_for_the_same(self):
        names = ("class token", "distillation token", "register 1")
        for words in ("class", "Class token", "class-token", "class_token"):
            assert settled(words, names, (3, 5)) == "class token"
        assert settled("register-1", names, (3, 5)) == "register 1"
        assert settled("patches", names, (3, 5)) == "mean of patches"
        assert settled("class and distillation tokens", names, (3, 5)) == "class and distillation tokens"
        assert settled("3,5", names, (3, 5)) == settled("patch 3, 5", names, (3, 5)) == settled((2, 4), names, (3, 5))

    @pytest.mark.parametrize(
        ("query", "words"),
        [
            ("register 2", r"no token 'register 2'\. Did you mean register 1"),
            ("4,1", "no patch 4,1: the grid has 3 rows and 5 columns, counted from 1"),
            ("0,1", "no patch 0,1"),
            ((0, 5), "no patch 1,6"),
            ("\x1b[31m", r"no token '\\x1b"),
            ("", "no token ''"),
        ],
    )
    def test_what_is_not_there_is_refused(self, query, words):
        with pytest.raises(UserError, match=words):
            settled(query, ("class token", "register 1"), (3, 5))

    def test_rows_by_hand(self):
        seats, names = Seats(3, (2, 4)), ("class token", "distillation token", "register 1")
        assert query_row(seats, "register 1", names)[0, 0].tolist() == [0, 0, 1, *[0] * 8]
        assert query_row(seats, "patch 2,3", names)[0, 0].argmax() == 3 + 4 + 2
        both = query_row(seats, "class and distillation tokens", names)[0, 0]
        assert both.tolist() == [0.5, 0.5, *[0] * 9]
        # of a grid twice as fine, rounded up: the last row covers one row, each column two
        assert query_row(seats, "patch 3,8", names, finest=(3, 8))[0, 0].argmax() == 3 + 4 + 3
        assert query_row(seats, "patch 2,5", names, finest=(3, 8))[0, 0].argmax() == 3 + 0 + 2

    def test_each_token_asks_for_itself(self):
        view = explain(small("dinov2_registers"), PIXELS, residual=0.25)
        for number, name in enumerate(view.prefix_names):
            expected = view.heads[1][:, number, 5:].reshape(3, *view.grid)
            assert np.allclose(view.attended(1, name), expected)
            asked = explain(small("dinov2_registers"), PIXELS, query=name)
            assert asked.query == name
            assert asked.rollout.shape == view.grid
        assert np.allclose(view.attended(-1, (1, 2)), view.heads[1][:, 5 + 6 + 2, 5:].reshape(3, *view.grid))
        assert np.allclose(view.attended(0, "2,3"), view.heads[0][:, 5 + 6 + 2, 5:].reshape(3, *view.grid))

    def test_rollout_from_any_token_agrees_with_the_matrices_multiplied_in_full(self):
        network = of_dull_shape()
        view = explain(network, torch.ones(3, 35, 15), residual=0.2, fusion="max")
        whole = np.eye(16)
        for heads in view.heads:
            mixed = 0.8 * heads.max(0) + 0.2 * np.eye(16)
            whole = mixed / mixed.sum(1, keepdims=True) @ whole
        assert np.allclose(view.rollout, whole[0, 1:].reshape(5, 3), atol=1e-6)
        other = explain(network, torch.ones(3, 35, 15), residual=0.2, fusion="max", query=(4, 1))
        assert other.query == "patch 5,2"
        assert np.allclose(other.rollout, whole[1 + 13, 1:].reshape(5, 3), atol=1e-6)
        assert np.allclose(
            other.attention, view.heads[2].max(0)[1 + 13, 1:].reshape(5, 3) / view.heads[2].max(0)[14].sum()
        )

    def test_a_patch_of_a_pyramid_is_asked_on_every_grid(self):
        view = explain(small("swin"), PIXELS, query=(3, 10))
        for layer, heads in zip(view.layers, view.heads, strict=True):
            rows, columns = view.grids[layer]
            step = view.grid[0] / rows > 1.5
            cell = (3 // 2 if step else 3) * columns + (10 // 2 if step else 10)
            assert np.allclose(view.attended(layer), heads[:, cell].reshape(-1, rows, columns))

    @pytest.mark.parametrize("residual", [-0.1, 1.0, float("nan")])
    def test_weights_of_skip_connections_that_make_no_sense(self, residual):
        with pytest.raises(UserError, match="skip connections"):
            explain(small("vit"), PIXELS, residual=residual)

    def test_layers_that_were_not_kept(self):
        view = explain(small("vit"), PIXELS, layers=[0])
        with pytest.raises(UserError, match=r"maps of layer 1 were not kept \(kept: 0\)"):
            view.attended(1)
        with pytest.raises(UserError, match="none was kept"):
            explain(small("resnet"), PIXELS).masks()

    def test_attention_is_the_last_layers(self):
        view = explain(small("vit"), PIXELS)
        assert np.allclose(view.attention, view.heads[-1].mean(0)[0, 1:].reshape(view.grid), atol=1e-6)
        assert explain(small("swin"), PIXELS).attention.shape == explain(small("swin"), PIXELS).grids[-1]


class TestColours:
    def test_components_by_hand(self):
        # Along one direction patches lie at 0, 1, 2, 3, 4, 5; along another at 0 or 1.
        first, second = np.array([0.6, 0.8, 0.0]), np.array([0.0, 0.0, 1.0])
        at = np.arange(6.0)[:, None] * first + (np.arange(6) % 2)[:, None] * 0.1 * second
        found = principal_colours([at.reshape(2, 3, 3).astype(np.float32)])
        assert np.allclose(found.pictures[0][..., 0].ravel(), np.arange(6) / 5, atol=0.02)
        assert found.variance[0] > 0.99
        assert (found.pictures[0][..., 2] == 0.5).all()  # there is no third

    @given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 40))
    def test_range_and_shares(self, images, rows, columns, width):
        features = [
            np.random.default_rng(i).normal(size=(rows, columns, width)).astype(np.float32) for i in range(images)
        ]
        found = principal_colours(features)
        assert len(found.pictures) == images
        for picture in found.pictures:
            assert picture.shape == (rows, columns, 3)
            assert ((picture >= 0) & (picture <= 1)).all()
        assert 0 <= found.variance.sum() <= 1 + 1e-5
        assert (np.diff(found.variance) <= 1e-6).all()

    def test_many_and_few_patches_agree(self):
        wide = np.random.default_rng(0).normal(size=(3, 5, 31)).astype(np.float32)
        few = principal_colours([wide])
        samples = wide.reshape(15, 31) - wide.reshape(15, 31).mean(0)
        _, deviation, directions = np.linalg.svd(samples, full_matrices=False)
        scores = (
            samples @ (directions[:3] * np.sign(directions[np.arange(3), np.abs(directions[:3]).argmax(1)])[:, None]).T
        )
        expected = (scores - scores.min(0)) / (scores.max(0) - scores.min(0))
        assert np.allclose(few.pictures[0].reshape(15, 3), expected, atol=1e-4)
        assert np.allclose(few.variance, deviation[:3] ** 2 / (deviation**2).sum(), atol=1e-5)

    def test_one_colour_means_one_thing_in_all_images(self):
        low, high = np.zeros((2, 2, 4), np.float32), np.ones((3, 1, 4), np.float32)
        pictures = principal_colours([low, high]).pictures
        assert (pictures[0][..., 0] == 0).all()
        assert (pictures[1][..., 0] == 1).all()

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind_has_them(self, kind):
        network = small(kind)
        view = explain(network, PIXELS)
        final = network.backbone(PIXELS[None])
        assert view.features.shape == (*final.grid, network.backbone.width)
        assert view.colours.shape == (*final.grid, 3)
        assert view.norms.shape == view.outliers.shape == final.grid
        assert len(view.prefix_norms) == final.prefix == len(view.prefix_names)


class TestNorms:
    def test_norms_are_those_before_the_final_norm(self):
        network = small("dinov2_registers")
        view = explain(network, PIXELS)
        last = network.backbone.stages(PIXELS[None])[-1]
        norms = last.x[0].norm(dim=-1).detach().numpy()
        assert np.allclose(view.norms.ravel(), norms[5:], rtol=1e-5)
        assert np.allclose(view.prefix_norms, norms[:5], rtol=1e-5)

    def test_planted_outliers_are_flagged(self):
        network = small("vit")
        norm = network.backbone.encoder.blocks[-1]
        forward = norm.forward

        def louder(*args, **kwargs):
            x = forward(*args, **kwargs).clone()
            x[:, [1 + 7, 1 + 30]] *= 20
            return x

        norm.forward = louder
        view = explain(network, PIXELS)
        assert np.flatnonzero(view.outliers).tolist() == [7, 30]
        norm.forward = forward
        assert not explain(network, PIXELS).outliers.any()

    def test_even_tokens_have_no_outliers(self):
        assert not standing_out(np.ones((3, 5), np.float32)).any()
        assert not standing_out(np.random.default_rng(0).normal(100, 5, (14, 14)).astype(np.float32)).any()

    def test_without_a_norm_the_tokens_are_taken_as_they_are(self):
        x = torch.tensor([[[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]]])
        norms = token_norms([], Tokens(x, (1, 2), 1))
        assert norms.prefix.tolist() == [5]
        assert norms.patches.tolist() == [[2, 1]]


class TestMasks:
    def test_by_hand(self):
        maps = np.array([[[0.1, 0.4], [0.3, 0.2]], [[0.0, 0.0], [0.0, 0.0]], [[0.0, 2.0], [0.0, 0.0]]], np.float32)
        mask = mass_mask(maps, 0.6)
        assert mask[0].tolist() == [[False, True], [True, False]]
        assert not mask[1].any()
        assert mask[2].tolist() == [[False, True], [False, False]]
        assert mass_mask(maps, 0.75)[0].sum() == 3
        assert mass_mask(maps, 1.0)[0].all()

    @given(arrays.arrays(np.float32, (2, 3, 5), elements=st.floats(0, 1, width=32)), st.floats(0.01, 1))
    def test_it_is_the_smallest_that_holds_the_mass(self, maps, mass):
        for cells, mask in zip(maps.astype(np.float64), mass_mask(maps, mass), strict=True):
            total = cells.sum()
            assert cells[mask].sum() >= mass * total * (1 - 1e-6)
            if mask.any():
                assert cells[mask].sum() - cells[mask].min() < mass * total
                assert cells[mask].min() >= cells[~mask].max(initial=0)

    def test_pixels_go_with_their_patch(self):
        cells = np.array([[0.0, 1.0, 0.0]], np.float32)
        mask = pixel_mask(cells, 10, 13, View((0, 0, 13, 10), (5, 13), (5.0, 4.0)))
        assert mask[:, 4:8].all()
        assert mask.sum() == 40  # the last column of pixels was not seen

    def test_overlap(self):
        a, b = np.zeros((3, 7), bool), np.zeros((3, 7), bool)
        assert overlap(a, b) == 1
        a[0, :4] = b[0, 1:] = True
        assert overlap(a, b) == 3 / 7

    def test_heads_of_an_explanation(self):
        view = explain(small("vit"), PIXELS)
        assert np.array_equal(view.masks(0.4), mass_mask(view.head_maps[-1], 0.4))

    def test_veil_dims_what_is_outside(self):
        image = np.full((2, 2, 3), (200, 100, 0), np.uint8)
        veiled = veil(image, np.array([[True, False], [False, False]]))
        assert veiled[0, 0].tolist() == [200, 100, 0]
        assert (veiled[1, 1] == 35).all()


class TestOtherHeads:
    class Decoder(torch.nn.Module):
        """Three queries that read the patches, and among themselves."""

        def __init__(self, width: int):
            super().__init__()
            self.queries = torch.nn.Parameter(torch.randn(1, 3, width))
            self.own, self.cross = Attention(width, 2), Attention(width, 4)

        def forward(self, tokens, area=None):
            x = self.own(self.queries)
            return self.cross(x, tokens.patches)

    def test_such_a_network_is_explained_without_classes(self):
        network = small("vit")
        network.head = self.Decoder(24)
        view = explain(network, PIXELS, gradients=True)
        assert view.query == "mean of patches"
        assert view.relevance is view.activation is None
        assert judge_maps(network, PIXELS, view) == {}


class TestSurvey:
    def test_mean_and_deviation_over_images(self):
        network, survey = small("vit"), Survey()
        views = [explain(network, torch.randn(3, 33, 47)) for _ in range(MOST_COLOURED + 2)]
        for view in views:
            survey.add(view)
        assert survey.images == MOST_COLOURED + 2
        every = np.stack([view.distance for view in views])
        assert np.allclose(survey.distance, every.mean(0), rtol=1e-5)
        assert np.allclose(survey.deviation, every.std(0), atol=1e-4)
        assert len(survey.colours().pictures) == MOST_COLOURED
        assert set(survey.arrays()) == {"images", "distance", "distance_deviation", "colours_variance"}

    def test_layers_without_asking_patches_stay_unknown(self):
        survey = Survey()
        survey.add(explain(small("cait"), PIXELS))
        assert np.isnan(survey.distance).all(axis=1).tolist() == [False, False, True]
