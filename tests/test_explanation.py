"""Attention maps, what is computed from them, and the pictures of it."""

import gc
import json
import math
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from sightline.errors import UserError, WorkError
from sightline.explanation import explain as explain_module
from sightline.explanation.distance import mean_distance, patch_distances
from sightline.explanation.explain import explain
from sightline.explanation.filters import patch_filters, principal_filters
from sightline.explanation.grids import Seats, lattice
from sightline.explanation.maps import Call, evaluating, record
from sightline.explanation.positions import similarity
from sightline.explanation.queries import query_row
from sightline.explanation.rollout import flow, on_grid, rollout, scaled
from sightline.layers.attention import Attention
from sightline.network import Network, create_model
from sightline.types import Tokens

GOLDEN = Path(__file__).parent / "data" / "attention-maps"
SMALL = {"embed_dim": 30, "depth": 3, "num_heads": 5, "patch_size": (7, 5), "image_size": (35, 15), "num_classes": 4}


def small(**changes) -> Network:
    network = create_model("vit_tiny_patch16_224", **{**SMALL, **changes})
    for parameter in network.parameters():  # random everywhere, so that no zero hides an error
        torch.nn.init.normal_(parameter, std=0.3)
    return network.eval()


def close(ours: Tensor | np.ndarray, expected: Tensor, tolerance: float = 1e-5) -> bool:
    ours = torch.as_tensor(ours).double()
    assert ours.shape == expected.shape
    return bool((ours - expected.double()).abs().max() <= tolerance * expected.double().abs().max())


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Tensor], dict]:
    return load_file(GOLDEN / "io.safetensors"), json.loads((GOLDEN / "case.json").read_text())["configuration"]


FUSIONS = st.sampled_from(["mean", "max", "min"])


class TestGolden:
    def test_rollout(self, golden):
        tensors, case = golden
        maps = list(tensors["input.attention"].flip(0))
        whole = rollout(maps, torch.eye(13).expand(2, 13, 13))
        assert close(whole, tensors["output.rollout"])
        row = rollout(
            maps, query_row(Seats(case["prefix_tokens"], tuple(case["grid"])), "class token").expand(2, 1, 13)
        )
        cells = on_grid(row[:, 0], tuple(case["grid"]), case["prefix_tokens"])
        assert close(cells, tensors["output.rollout_map"])
        assert close(scaled(cells), tensors["output.rollout_map_scaled"])

    def test_distance(self, golden):
        tensors, case = golden
        between = patch_distances(tuple(case["grid"]), (float(case["patch_size"]),) * 2)
        ours = [mean_distance(layer, between) for layer in tensors["input.attention"]]
        assert close(torch.stack(ours), tensors["output.distance"])

    def test_positions(self, golden):
        tensors, case = golden
        ours = similarity(tensors["input.position_embedding"], tuple(case["grid"]))
        assert close(ours, tensors["output.position_similarity"])

    def test_filters(self, golden):
        tensors, case = golden
        filters = principal_filters(tensors["input.patch_kernel"], case["components"])
        assert close(filters.directions.reshape(7, -1), tensors["output.filters"])
        assert close(filters.variance, tensors["output.filters_variance"])
        assert close(filters.pictures, tensors["output.filters_pictures"])


class TestRollout:
    first = torch.tensor([[[[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]]])
    last = torch.tensor([[[[0.2, 0.8, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]]])

    def test_two_layers_by_hand_without_residual(self):
        # Row 0 of last·first: 0.2·[.5 .25 .25] + 0.8·[0 1 0]
        row = rollout([self.last, self.first], query_row(Seats(1, (1, 2)), "class token"), residual=0.0)
        assert torch.allclose(row, torch.tensor([[[0.1, 0.85, 0.05]]]))

    def test_two_layers_by_hand_with_residual(self):
        # Rows of (A + I)/2: last 0: [.6 .4 0]; first 0: [.75 .125 .125], first 1: [0 1 0]
        row = rollout([self.last, self.first], query_row(Seats(1, (1, 2)), "class token"))
        assert torch.allclose(row, torch.tensor([[[0.45, 0.475, 0.075]]]))

    def test_mean_of_patches_asks_every_patch_alike(self):
        row = rollout([self.last], query_row(Seats(1, (1, 2)), "mean of patches"), residual=0.0)
        assert torch.allclose(row, torch.tensor([[[0.5, 0.0, 0.5]]]))

    def test_fusion_of_heads_by_hand(self):
        heads = torch.tensor([[[[0.25, 0.75], [0.5, 0.5]], [[0.75, 0.25], [0.5, 0.5]]]])
        assert torch.allclose(flow(heads, residual=0.0, fusion="max")[0, 0], torch.tensor([0.5, 0.5]))
        # the larger of the heads plus the identity, [1.75 0.75], scaled to sum 1
        assert torch.allclose(flow(heads, fusion="max")[0, 0], torch.tensor([0.7, 0.3]))
        assert torch.allclose(flow(heads, fusion="min")[0, 0], torch.tensor([5 / 6, 1 / 6]))

    @given(st.integers(1, 5), st.integers(1, 3), st.integers(2, 7), st.floats(0, 0.9), FUSIONS)
    def test_shares_sum_to_one(self, depth, heads, tokens, residual, fusion):
        maps = [torch.randn(2, heads, tokens, tokens).softmax(-1) for _ in range(depth)]
        rows = rollout(maps, torch.eye(tokens).expand(2, tokens, tokens), residual=residual, fusion=fusion)
        assert (rows >= 0).all()
        assert torch.allclose(rows.sum(-1), torch.ones(2, tokens), atol=1e-5)


class TestDistance:
    def test_by_hand(self):
        # Grid 1×3, step 7 to the right; each patch keeps half for itself and gives half to the first patch.
        weights = torch.zeros(1, 2, 4, 4)
        weights[:, 0, 1:, 1:] = 0.5 * torch.eye(3)
        weights[:, 0, 1:, 1] += 0.5
        weights[:, 1, 1:, 0] = 1.0  # all to the class token: no distance
        between = patch_distances((1, 3), (5.0, 7.0))
        assert torch.allclose(mean_distance(weights, between), torch.tensor([0.5 * (0 + 7 + 14) / 3, 0.0]))

    def test_rows_and_columns_have_their_own_step(self):
        weights = torch.zeros(1, 1, 4, 4)
        weights[0, 0, :, 0] = 1.0  # everyone looks at the upper left of a 2×2 grid
        expected = (0 + 11 + 5 + math.hypot(5, 11)) / 4
        assert torch.allclose(mean_distance(weights, patch_distances((2, 2), (5.0, 11.0))), torch.tensor([expected]))

    @pytest.mark.parametrize("partial", ["pad", "drop"])
    @pytest.mark.parametrize("patch", [(7, 5), (16, 14), (1, 32)])
    def test_step_of_patches_that_do_not_divide_the_image(self, patch, partial):
        backbone = small(patch_size=patch, partial_patches=partial, image_size=(37, 33)).backbone
        assert lattice(backbone, (37, 33), backbone.grid) == ((0, 0), patch)


KINDS = {
    "class token": {},
    "pooled": {"class_token": False, "global_pool": "avg"},
    "relative": {"positions": "relative"},
    "fixed": {"positions": "sincos2d", "embed_dim": 20},
    "no positions, post-norm": {"positions": "none", "norm": "post", "activation": "relu"},
    "partial patches": {"image_size": (33, 13)},
}


class TestMaps:
    @pytest.mark.parametrize("kind", KINDS)
    def test_maps_are_those_that_the_forward_pass_used(self, kind):
        network = small(**KINDS[kind])
        outputs = []
        hooks = [
            module.register_forward_hook(lambda _module, _args, output: outputs.append(output))
            for module in network.modules()
            if isinstance(module, Attention)
        ]
        with evaluating(network):
            tokens, calls = record(network.backbone, torch.randn(2, 3, *network.backbone.config.image_size))
            assert len(calls) == 3 == len(outputs)
            for call, output in zip(calls, outputs, strict=True):
                weights = call.weights()
                assert call.shape == tuple(weights.shape) == (2, 5, tokens.x.shape[1], tokens.x.shape[1])
                assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
                values = call.attention.project(call.args[0], None, None)[2]
                mixed = call.attention.out(rearrange(weights @ values, "b h n k -> b n (h k)"))
                assert torch.allclose(mixed, output, atol=1e-5 * float(output.abs().max()))
        for hook in hooks:
            hook.remove()

    def test_padding_gets_no_attention(self):
        network = small()
        sizes = torch.tensor([[35, 15], [21, 10]])
        with evaluating(network):
            calls = []
            hook = network.backbone.encoder.blocks[1].attention.register_forward_pre_hook(
                lambda module, args, kwargs: calls.append(Call("", module, args, kwargs)), with_kwargs=True
            )
            tokens = network.backbone(torch.randn(2, 3, 35, 15), sizes)
            hook.remove()
            weights = calls[0].weights()
        assert (weights[1, :, :, ~tokens.mask[1]] == 0).all()
        assert (weights[0] > 0).all()

    def test_cross_attention_and_keywords(self):
        class Reader(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = Attention(6, 3)

            def forward(self, pixels):
                x = self.attention(pixels[:, 0, :2, :], key=pixels[:, 1], bias=torch.zeros(1, 1, 2, 5))
                return Tokens(x, (1, 2))

        _, [call] = record(Reader(), torch.randn(2, 3, 5, 6))
        assert call.name == "attention"
        assert call.shape == tuple(call.weights().shape) == (2, 3, 2, 5)

    def test_hooks_and_modes_are_as_before_even_after_a_failure(self):
        network = small()
        network.train()
        network.backbone.norm.eval()
        network.backbone.norm.register_forward_pre_hook(lambda *_: 1 / 0)
        modes = [module.training for module in network.modules()]
        with pytest.raises(ZeroDivisionError):
            explain(network, torch.randn(3, 35, 15))
        assert [module.training for module in network.modules()] == modes
        assert not any(m._forward_pre_hooks for m in network.modules() if isinstance(m, Attention))

    def test_dropout_plays_no_part(self):
        network = small(attn_drop_rate=0.5, proj_drop_rate=0.5, drop_path_rate=0.5).train()
        pixels = torch.randn(3, 35, 15)
        first, second = explain(network, pixels), explain(network, pixels)
        assert np.array_equal(first.heads, second.heads)

    def test_damaged_weights(self):
        network = small()
        network.backbone.encoder.blocks[2].attention.qkv.weight.data[0, 0] = math.nan
        with pytest.raises(WorkError, match=r"blocks\.2\.attention.*not finite"):
            explain(network, torch.randn(3, 35, 15))

    def test_one_map_at_a_time(self, monkeypatch):
        alive: list[weakref.ref] = []
        most = 0
        original = Call.weights

        def counted(call: Call) -> Tensor:
            nonlocal most
            weights = original(call)
            alive.append(weakref.ref(weights))
            gc.collect()
            most = max(most, sum(ref() is not None for ref in alive))
            return weights

        monkeypatch.setattr(Call, "weights", counted)
        explain(small(depth=6), torch.randn(3, 35, 15), layers=[0])
        assert len(alive) == 6
        assert most == 1


class TestExplain:
    @pytest.mark.parametrize("kind", KINDS)
    def test_shapes_and_sums(self, kind):
        network = small(**KINDS[kind])
        size = network.backbone.config.image_size
        view = explain(network, torch.randn(1, 3, *size))
        prefix = int(kind != "pooled")
        assert view.rollout.shape == view.rollout_raw.shape == view.grid == (5, 3)
        assert view.heads.shape == (3, 5, 15 + prefix, 15 + prefix)
        assert view.head_maps.shape == (3, 5, 5, 3)
        assert view.distance.shape == (3, 5)
        assert view.stride == (7, 5)
        assert (view.prefix, view.size, view.layers) == (prefix, size, (0, 1, 2))
        assert view.query == ("class token" if prefix else "mean of patches")
        assert 0 < view.rollout.sum() <= 1 + 1e-5
        assert view.rollout_scaled.max() == 1
        has_table = kind not in ("relative", "no positions, post-norm")
        assert (view.position_similarity is not None) == has_table
        assert view.filters is not None
        assert all(a.dtype == np.float32 for a in (view.rollout, view.heads, view.distance, view.filters.directions))

    def test_agrees_with_the_matrices_multiplied_in_full(self):
        view = explain(small(), torch.randn(3, 35, 15))
        whole = np.eye(16)
        for heads in view.heads:
            mixed = heads.mean(0) + np.eye(16)
            whole = mixed / mixed.sum(1, keepdims=True) @ whole
        assert np.allclose(view.rollout, whole[0, 1:].reshape(5, 3), atol=1e-6)
        assert np.allclose(view.head_maps[2, 4], view.heads[2, 4, 0, 1:].reshape(5, 3))

    def test_a_pooling_head_asks_the_patches_although_there_is_a_class_token(self):
        assert explain(small(global_pool="avg"), torch.randn(3, 35, 15)).query == "mean of patches"

    def test_another_image_size_than_the_models_own(self):
        view = explain(small(), torch.randn(3, 14, 55))
        assert view.rollout.shape == (2, 11)
        assert view.position_similarity.shape == (2, 11, 2, 11)

    def test_layers_from_either_end(self):
        network, pixels = small(), torch.randn(3, 35, 15)
        every, some = explain(network, pixels), explain(network, pixels, layers=[-1, 0, 2])
        assert some.layers == (0, 2)
        assert np.array_equal(some.heads, every.heads[[0, 2]])
        assert np.array_equal(some.distance, every.distance)
        none = explain(network, pixels, layers=[])
        assert none.layers == none.heads == none.head_maps == ()
        assert np.array_equal(none.rollout, every.rollout)
        for wrong in (3, -4):
            with pytest.raises(UserError, match=f"no layer {wrong}: the model has 3, counted from 0"):
                explain(network, pixels, layers=[wrong])

    def test_only_the_last_layer_is_kept_where_all_would_be_too_much(self, monkeypatch):
        monkeypatch.setattr(explain_module, "HEADS_BYTES", 3 * 5 * 16 * 16 * 4 - 1)
        view = explain(small(), torch.randn(3, 35, 15))
        assert view.layers == (2,)
        assert view.distance.shape == (3, 5)

    def test_one_image_only(self):
        with pytest.raises(UserError, match="one image"):
            explain(small(), torch.randn(2, 3, 35, 15))

    def test_half_precision_networks(self):
        view = explain(small().to(torch.bfloat16), torch.randn(3, 35, 15))
        assert view.rollout.dtype == np.float32

    def test_windows_are_refused(self):
        class Windows(torch.nn.Module):
            def __init__(self, network):
                super().__init__()
                self.backbone, self.head = network.backbone, network.head
                place = self.backbone.place.forward
                self.backbone.place.forward = lambda *a: (lambda t: t._replace(x=t.x.reshape(2, -1, 30)))(place(*a))

        with pytest.raises(UserError, match="whole image"):
            explain(Windows(small()), torch.randn(3, 35, 15))

    def test_saved_arrays(self, tmp_path):
        view = explain(small(), torch.randn(3, 35, 15))
        view.save(tmp_path / "view.npz")
        with np.load(tmp_path / "view.npz", allow_pickle=False) as saved:
            arrays = view.arrays()
            assert set(saved.files) == set(arrays) >= {"rollout", "rollout_scaled", "rollout_raw", "heads", "distance"}
            for name, array in arrays.items():
                assert np.array_equal(saved[name], array)
                assert saved[name].dtype == array.dtype
        assert [p.name for p in tmp_path.iterdir()] == ["view.npz"]

    def test_a_failed_save_leaves_what_was_there(self, tmp_path, monkeypatch):
        path = tmp_path / "view.npz"
        path.write_bytes(b"before")
        monkeypatch.setattr(np, "savez", lambda file, **_: (Path(file).write_bytes(b"half"), 1 / 0))
        with pytest.raises(ZeroDivisionError):
            explain(small(), torch.randn(3, 35, 15)).save(path)
        assert path.read_bytes() == b"before"
        assert list(tmp_path.iterdir()) == [path]


class TestFilters:
    def test_no_convolution(self):
        assert patch_filters(torch.nn.Linear(3, 4)) is None

    def test_no_more_components_than_there_are(self):
        assert principal_filters(torch.randn(5, 3, 7, 2)).directions.shape == (4, 3, 7, 2)

    def test_equal_filters_do_not_divide_by_zero(self):
        filters = principal_filters(torch.ones(5, 1, 2, 2))
        assert np.isfinite(filters.pictures).all()
        assert np.allclose(filters.variance, 0)
