"""Swin Transformers: how windows are cut, shifted and masked, by hand, and what other libraries read of them."""

import math

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin
from transformers import SwinConfig as TransformersConfig
from transformers import SwinForImageClassification

from parity import spread
from parity.swin import of_timm, original_names, with_weights
from sightline.backbones.swin import PatchMerging, Swin, SwinConfig
from sightline.checkpoints.rules import save
from sightline.checkpoints.swin import LAYOUTS
from sightline.errors import UserError
from sightline.layers.attention import Attention
from sightline.layers.windows import Windows
from sightline.layout import Shapes
from sightline.network import Network, create_model, describe
from sightline.registry import variant

SMALL = {"patch_size": 2, "embed_dim": 12, "depths": (2, 3, 2), "num_heads": (2, 3, 4), "window_size": 4}
WAYS = {  # how each library fits windows
    "timm": {"window_fit": "image_size", "padding": "seen_after_shift"},
    "transformers": {"window_fit": "side", "padding": "seen", "full_table": True},
    "torchvision": {"window_fit": "never", "padding": "seen"},
    "original": {"window_fit": "side"},
}


def small(**settings) -> Network:
    settings = {"num_classes": 11, "image_size": (33, 47), **SMALL, **settings}
    return spread(create_model("swin_tiny_patch4_window7_224", **settings))


def test_shifted_windows_by_hand():
    windows = Windows((4, 4), (2, 2), (1, 1))
    cells = torch.arange(16).reshape(1, 4, 4, 1)
    assert windows.cut(cells)[..., 0].tolist() == [[5, 6, 9, 10], [7, 4, 11, 8], [13, 14, 1, 2], [15, 12, 3, 0]]
    mask = windows.mask(torch.device("cpu"))[:, 0]
    o, x = 0.0, -100.0
    assert mask[0].tolist() == [[o, o, o, o]] * 4
    assert mask[1].tolist() == [[o, x, o, x], [x, o, x, o], [o, x, o, x], [x, o, x, o]]
    assert mask[2].tolist() == [[o, o, x, x], [o, o, x, x], [x, x, o, o], [x, x, o, o]]
    assert mask[3].tolist() == [[o, x, x, x], [x, o, x, x], [x, x, o, x], [x, x, x, o]]


def test_padding_is_hidden_or_seen_and_stands_before_or_behind_what_came_round():
    cells = torch.arange(1, 4).reshape(1, 1, 3, 1)
    found = {}
    for padding in ("hidden", "seen", "seen_after_shift"):
        windows = Windows((1, 3), (1, 2), (0, 1), padding)
        found[padding] = windows.cut(cells)[..., 0].tolist()
        assert torch.equal(windows.join(windows.cut(cells)), cells)
    assert found["hidden"] == found["seen"] == [[2, 3], [0, 1]]
    assert found["seen_after_shift"] == [[2, 3], [1, 0]]
    hidden = Windows((1, 3), (1, 2), (0, 1)).mask(torch.device("cpu"))
    assert hidden[1, 0].tolist() == [[-math.inf, -100.0], [-math.inf, 0.0]]
    seen = Windows((1, 3), (1, 2), (0, 1), "seen").mask(torch.device("cpu"))
    assert seen[1, 0].tolist() == [[0.0, -100.0], [-100.0, 0.0]]
    assert Windows((1, 3), (1, 2), padding="seen").mask(torch.device("cpu")) is None


@given(st.tuples(*[st.integers(1, 11)] * 2), st.tuples(*[st.integers(1, 5)] * 2), st.booleans())
def test_cells_meet_where_they_are_neighbours_in_the_image(grid, side, shifted):
    window, shift = SwinConfig(window_size=side)._fitted(grid, side)
    windows = Windows(grid, window, shift if shifted else (0, 0))
    numbers = torch.arange(1, math.prod(grid) + 1).reshape(1, *grid, 1)
    cut = windows.cut(numbers)
    assert torch.equal(windows.join(cut), numbers)
    assert windows.count == len(cut)
    mask = windows.mask(torch.device("cpu"))
    cell = cut[..., 0] - 1
    real = cell >= 0
    row, column = cell // grid[1], cell % grid[1]
    near = [(at[:, :, None] - at[:, None]).abs() < size for at, size in zip((row, column), window, strict=True)]
    meet = near[0] & near[1] & real[:, :, None] & real[:, None]
    allowed = torch.ones_like(meet) if mask is None else mask[:, 0] == 0
    pairs = real[:, :, None] & real[:, None]
    assert torch.equal(meet[pairs], allowed[pairs])
    assert not allowed[(real[:, :, None] & ~real[:, None])].any()


@pytest.mark.parametrize(
    ("fit", "grid", "window", "shift"),
    [
        ("axis", (9, 4), (7, 4), (3, 0)),
        ("axis", (7, 8), (7, 7), (0, 3)),
        ("image_size", (9, 4), (7, 7), (3, 3)),
        ("side", (9, 4), (4, 4), (0, 0)),
        ("side", (7, 8), (7, 7), (0, 0)),
        ("side", (8, 8), (7, 7), (3, 3)),
        ("never", (9, 4), (7, 7), (3, 0)),
        ("always", (9, 4), (7, 7), (3, 3)),
    ],
)
def test_windows_fit_grids(fit, grid, window, shift):
    config = SwinConfig(window_fit=fit)  # at 224 pixels the first stage has 56×56 tokens
    found = config.windows(0, grid, shifted=True)
    assert (found.window, found.shift) == (window, shift)
    assert config.windows(0, grid, shifted=False) == Windows(grid, window)


def test_tables_are_as_small_as_the_windows_at_the_image_size_or_whole():
    size = {"image_size": (64, 160), "depths": (1, 1, 1), "num_heads": (3, 3, 3)}
    assert [SwinConfig(**size).table(stage) for stage in range(3)] == [(7, 7), (7, 7), (4, 7)]
    assert SwinConfig(**size, window_fit="side").table(2) == (4, 4)
    assert SwinConfig(**size, window_fit="side", full_table=True).table(2) == (7, 7)
    assert SwinConfig(**size, window_fit="never").table(2) == (7, 7)


def test_a_smaller_window_reads_the_middle_of_the_table():
    block = small(image_size=(64, 64)).backbone.layers[0].blocks[0]
    table = block.relative.table.reshape(7, 7, 2)
    bias = block.bias((2, 3))[0].reshape(2, 2, 3, 2, 3)
    for query in ((0, 0), (1, 2), (0, 1)):
        for key in ((1, 0), (0, 2)):
            offset = (query[0] - key[0] + 3, query[1] - key[1] + 3)
            assert torch.equal(bias[:, query[0], query[1], key[0], key[1]], table[offset])


def test_merging_by_hand():
    merging = PatchMerging(1)
    with torch.no_grad():
        merging.reduction.weight.copy_(torch.eye(4)[[1, 2]])
    plane = torch.tensor([[1.0, 2, 9], [3, 4, 5]])
    found = merging(plane.reshape(1, 2, 3, 1))[0]
    assert found.shape == (1, 2, 2)

    def normed(*values: float) -> torch.Tensor:
        return nn.functional.layer_norm(torch.tensor(values, dtype=torch.float32), (4,))

    torch.testing.assert_close(found[0, 0], normed(1, 3, 2, 4)[[1, 2]])  # down first, then right
    torch.testing.assert_close(found[0, 1], normed(9, 5, 0, 0)[[1, 2]])


@pytest.mark.parametrize("settings", [{}, {"padding": "seen"}, {"padding": "seen_after_shift"}])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (9, 60)])
def test_a_whole_map_says_what_the_windows_do(settings, size):
    network, calls = small(**settings), {}
    for name, module in network.backbone.named_modules():
        if isinstance(module, Attention):
            module.register_forward_hook(
                lambda module, given, options, out, name=name: calls.__setitem__(
                    name, (given[0], options["bias"], out)
                ),
                with_kwargs=True,
            )
    network(torch.randn(2, 3, *size))
    assert len(calls) == network.backbone.depth
    for name, (tokens, bias, out) in calls.items():
        attention, stage = network.backbone.get_submodule(name), int(name.split(".")[1])
        weights = attention.weights(tokens, bias=bias)
        whole, grid = network.backbone.whole(name, weights, size)
        assert whole.shape == (2, attention.heads, math.prod(grid), math.prod(grid))
        torch.testing.assert_close(whole.sum(dim=-1), torch.ones(whole.shape[:3]))
        windows = network.backbone.config.windows(stage, grid, shifted=int(name.split(".")[3]) % 2 == 1)
        rows, columns = torch.ones(grid).nonzero().unbind(1)
        sides = zip((rows, columns), windows.window, strict=True)
        far = torch.stack([(at[:, None] - at).abs() >= side for at, side in sides]).any(dim=0)
        padded = windows.padded != grid
        if not (padded and windows.padding == "seen_after_shift"):  # timm's cells that came round see the others
            assert not far.any() or whole[..., far].max() < 1e-20
        if padded and windows.padding != "hidden":
            continue  # padding has a part in what comes out
        flat = windows.join(tokens).flatten(1, 2)
        mixed = whole @ attention.project(flat, None, None)[2]
        explicit = attention.out(mixed.transpose(1, 2).flatten(2))
        torch.testing.assert_close(explicit, windows.join(out).flatten(1, 2), atol=1e-5, rtol=1e-4)


def test_tokens_of_different_windows_have_no_weight_at_all():
    whole = Windows((2, 4), (2, 2)).whole(torch.full((2, 1, 4, 4), 0.25))
    assert whole[0, 0, 0].tolist() == [0.25, 0.25, 0, 0, 0.25, 0.25, 0, 0]
    seen = Windows((1, 3), (1, 2), padding="seen").whole(torch.full((2, 1, 2, 2), 0.5))
    assert seen[0, 0].tolist() == [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]


@pytest.mark.parametrize("way", WAYS)
def test_an_image_leaves_nothing_behind_for_the_next(way):
    network = small(**WAYS[way])
    little, large = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 48, 40)
    first = network(large)
    network(little)
    assert torch.equal(network(large), first)


def test_hidden_padding_changes_nothing_of_the_answer():
    network = small(image_size=(40, 40), depths=(1,), num_heads=(2,), partial_patches="drop", window_fit="never")
    pixels = torch.randn(1, 3, 18, 24)  # 9×12 tokens in windows of 4: the last row of windows has one real row
    found = network.backbone(pixels).x.reshape(9, 12, -1)
    alone = network.backbone(pixels[..., 16:, :]).x.reshape(1, 12, -1)
    torch.testing.assert_close(found[8:], alone)


def test_stages_of_unlike_sizes_are_those_of_each_image_alone():
    backbone = small().backbone
    first, second = torch.randn(3, 40, 21), torch.randn(3, 19, 60)
    canvas = torch.full((2, 3, 40, 60), 9.0)
    canvas[0, :, :40, :21], canvas[1, :, :19, :60] = first, second
    together = backbone.stages(canvas, torch.tensor([[40, 21], [19, 60]]))
    for image, pixels in enumerate((first, second)):
        for found, alone in zip(together, backbone.stages(pixels[None]), strict=True):
            torch.testing.assert_close(found.x[image][found.mask[image]], alone.x[0])


def test_timm_keeps_its_windows_whatever_image_comes():
    theirs = with_weights(of_timm((30, 30), strict_img_size=False), spread(of_timm((30, 30))).state_dict())
    ours = small(image_size=(30, 30), mlp_ratio=3.0, **WAYS["timm"])
    read(LAYOUTS["timm/swin"], theirs, ours)
    for size in ((52, 20), (8, 14)):
        pixels = torch.randn(2, 3, *size)
        torch.testing.assert_close(ours(pixels), theirs(pixels), atol=1e-5, rtol=1e-5)


def read(layout, theirs: nn.Module, ours: Network) -> None:
    tensors, shapes = theirs.state_dict(), ours.state_dict()
    rules = layout.rules(ours.backbone.config, ours.head.config)
    state = {name: t for rule in rules for name, t in zip(rule.ours, rule.load(*(tensors[n] for n in rule.theirs)))}  # noqa: B905
    assert state.keys() == shapes.keys()
    ours.load_state_dict(state)


def written(ours: Network, key: str) -> dict[str, torch.Tensor]:
    """A checkpoint of another library, from which it computes what `ours` does."""
    layout, config, head = LAYOUTS[key], ours.backbone.config, ours.head.config
    assert layout.refusals(config, head) == []
    tensors = save(layout.rules(config, head), ours.state_dict())
    assert not tensors.keys() & layout.extras(config, head).keys()
    return tensors | layout.extras(config, head)


class TestWriting:
    """What is written loads strictly in the other library, and computes the same there."""

    size = (32, 64)  # 16×32, 8×16 and 4×8 tokens: windows of 4 divide them, and the last are shifted along one axis

    def test_timm(self):
        ours = small(image_size=self.size)
        name, arguments = LAYOUTS["timm/swin"].arguments(ours.backbone.config, ours.head.config)
        assert variant(name).family == "swin"
        theirs = of_timm(self.size, **arguments)
        theirs.load_state_dict(written(ours, "timm/swin"))
        self.same(ours, theirs)
        assert LAYOUTS["timm/swin"].told(arguments, "x") | {"window_fit": "axis"} == {
            **{name: getattr(ours.backbone.config, name) for name in arguments if hasattr(ours.backbone.config, name)},
            "drop_rate": 0.0,
            "window_fit": "axis",
        }

    @pytest.mark.parametrize("classes", [11, 0])
    def test_transformers(self, tmp_path, classes):
        from safetensors.torch import save_file

        ours = small(
            image_size=self.size, window_fit="side", num_classes=classes, norm_eps=1e-3, activation="gelu_tanh"
        )
        layout, config = LAYOUTS["transformers/swin"], ours.backbone.config
        told = TransformersConfig(**layout.config(config, ours.head.config), num_labels=classes)
        told.save_pretrained(tmp_path)
        tensors = written(ours, "transformers/swin")
        base = layout.base + "."
        save_file(
            {n if n.startswith("classifier") else base + n: t for n, t in tensors.items()},
            tmp_path / "model.safetensors",
        )
        theirs, loaded = SwinForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(loaded[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        self.same(ours, lambda pixels: theirs.eval()(pixels).logits)
        shapes = Shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, "x")
        settings = layout.measure(shapes, None) | layout.told({**layout.defaults, **told.to_dict()}, shapes)
        again = describe("swin_tiny_patch4_window7_224", **settings)
        assert again.backbone == Swin.Config(**{**vars(config), "padding": "seen", "full_table": True})

    def test_torchvision(self):
        ours = small(image_size=self.size, window_fit="never")
        theirs = TorchvisionSwin([2, 2], 12, [2, 3, 2], [2, 3, 4], [4, 4], num_classes=11).eval()
        tensors, buffers = written(ours, "torchvision/swin"), dict(theirs.named_buffers())
        assert buffers.keys() == LAYOUTS["torchvision/swin"].extras(ours.backbone.config, ours.head.config).keys()
        assert all(torch.equal(tensors[name], index) for name, index in buffers.items())
        theirs.load_state_dict(tensors)
        self.same(ours, theirs)

    def test_original(self):
        ours = small(image_size=(32, 48), depths=(2, 2), num_heads=(2, 3), window_fit="side")
        theirs = of_timm((32, 48), depths=(2, 2), num_heads=(2, 3), mlp_ratio=4.0)
        tensors = written(ours, "original/swin")
        expected = original_names(theirs)
        assert tensors.keys() == expected.keys()
        for name in expected:
            if name.endswith(("attn_mask", "relative_position_index")):
                assert torch.equal(tensors[name], expected[name])
        self.same(ours, with_weights(theirs, tensors))

    def same(self, ours: Network, theirs) -> None:
        pixels = torch.randn(2, 3, *ours.backbone.config.image_size)
        torch.testing.assert_close(theirs(pixels), ours(pixels), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("key", "settings", "words"),
    [
        ("timm", {"image_size": (30, 30)}, ["padding='hidden'"]),
        ("timm", {"image_size": (30, 30), "padding": "seen"}, ["padding='seen'"]),
        ("timm", {"image_size": (30, 30), "padding": "seen_after_shift"}, []),
        ("timm", {"image_size": (33, 32), "padding": "seen_after_shift"}, ["partial_patches='pad'"]),
        ("timm", {"image_size": (32, 64), "window_fit": "side"}, ["window_fit='side'"]),
        ("timm", {"image_size": (16, 16), "full_table": True}, ["full_table=True"]),
        ("timm", {"window_fit": "always", "image_size": (16, 16), "padding": "seen_after_shift"}, []),
        ("timm", {"image_size": 32, "norm_eps": 1e-6, "activation": "relu"}, ["activation='relu'", "norm_eps=1e-06"]),
        ("transformers", {"image_size": (32, 64)}, ["window_fit='axis'"]),
        ("transformers", {"image_size": (30, 30), "padding": "seen"}, []),
        ("transformers", {"image_size": (16, 16)}, ["full_table=False", "windows that are larger"]),
        ("transformers", {"image_size": (64, 64), "window_size": (4, 2)}, ["window_size=(4, 2)"]),
        ("torchvision", {"image_size": (16, 16)}, ["window_fit='axis'"]),
        ("torchvision", {"image_size": 32, "in_chans": 1, "num_classes": 0}, ["in_chans=1", "num_classes=0"]),
        ("torchvision", {"image_size": 32, "qkv_bias": False}, ["qkv_bias=False"]),
        ("original", {"image_size": (30, 30)}, ["do not divide", "odd rows"]),
        ("original", {"image_size": 32, "global_pool": "avg", "fc_norm": True}, ["a head other"]),
    ],
)
def test_what_a_library_cannot_express_is_named(key, settings, words):
    architecture = describe("swin_tiny_patch4_window7_224", **{"num_classes": 11, **SMALL, **settings})
    refused = LAYOUTS[f"{key}/swin"].refusals(architecture.backbone, architecture.head)
    assert bool(refused) == bool(words), refused
    for word in words:
        assert any(word in phrase for phrase in refused), refused


def test_other_sizes_than_its_own_are_remarked_on():
    plain = describe("swin_tiny_patch4_window7_224")
    assert "224×224" in LAYOUTS["timm/swin"].remarks(plain.backbone, plain.head)[0]
    as_theirs = describe("swin_t")
    assert LAYOUTS["torchvision/swin"].remarks(as_theirs.backbone, as_theirs.head) == []


def shapes_of(key: str, **settings) -> tuple[Shapes, SwinConfig]:
    architecture = describe("swin_tiny_patch4_window7_224", 11, **(SMALL | WAYS[key] | settings))
    tensors = save(
        LAYOUTS[f"{key}/swin"].rules(architecture.backbone, architecture.head), architecture.lay_out().state_dict()
    )
    return Shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, "file"), architecture.backbone


@pytest.mark.parametrize("key", WAYS)
@pytest.mark.parametrize("settings", [{}, {"mlp_ratio": 2.7, "qkv_bias": False, "in_chans": 1, "window_size": 3}])
def test_shapes_tell_the_network(key, settings):
    shapes, config = shapes_of(key, image_size=(32, 32), **settings)
    recognised = [name for name, layout in LAYOUTS.items() if layout.recognises(shapes)]
    assert recognised == [f"{key}/swin"]
    found = describe("swin_tiny_patch4_window7_224", **LAYOUTS[f"{key}/swin"].measure(shapes, (32, 32))).backbone
    widths = config.widths
    assert [int(w * found.mlp_ratio) for w in widths] == [int(w * config.mlp_ratio) for w in widths]
    for name in ("in_chans", "patch_size", "embed_dim", "depths", "num_heads", "qkv_bias", "window_size", "window_fit"):
        assert getattr(found, name) == getattr(config, name)


def test_shapes_tell_the_size_at_which_windows_have_shrunk():
    layout = LAYOUTS["timm/swin"]
    shapes, _ = shapes_of("timm", image_size=(24, 24), window_size=7)  # 12, 6 and 3 tokens
    for known in (None, (64, 64)):
        measured = layout.measure(shapes, known)
        assert (measured["window_size"], measured["image_size"]) == ((7, 7), (24, 24))
    oblong, _ = shapes_of("timm", image_size=(24, 40), window_size=7)
    assert layout.measure(oblong, (24, 40))["window_size"] == (7, 7)
    # The smallest windows that make such tables: larger ones would cover the same tokens.
    shapes, _ = shapes_of("timm", image_size=(8, 8), window_size=7)
    assert layout.measure(shapes, (8, 8))["window_size"] == (4, 4)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"window_size": [[7, 7], [7, 7]]}, {"window_size": (7, 7)}),
        ({"window_size": [7, 5], "always_partition": True}, {"window_size": (7, 5), "window_fit": "always"}),
        ({"window_size": 7, "always_partition": False}, {"window_size": 7, "window_fit": "image_size"}),
        ({"strict_img_size": False, "depths": [2, 2]}, {"depths": (2, 2)}),
    ],
)
def test_arguments_of_timm_are_understood(arguments, told):
    assert LAYOUTS["timm/swin"].told(arguments, "config.json") == told


def test_settings_without_a_counterpart_are_refused():
    with pytest.raises(UserError, match="from stage to stage"):
        LAYOUTS["timm/swin"].told({"window_size": [7, 7, 14, 7]}, "config.json")
    with pytest.raises(UserError, match="head_dim=16"):
        LAYOUTS["timm/swin"].told({"head_dim": 16}, "config.json")
    layout, nothing = LAYOUTS["transformers/swin"], Shapes({}, "config.json")
    for key, value in (("use_absolute_embeddings", True), ("hidden_act", "mish"), ("hidden_act", ["gelu"])):
        with pytest.raises(UserError, match=key):
            layout.told({**layout.defaults, key: value}, nothing)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_heads": (2, 3)}, "one number each"),
        ({"num_heads": (2, 3, 5)}, "multiple of its num_heads"),
        ({"depths": ()}, "depths must be positive"),
        ({"depths": (2, 2000, 2)}, "1024 layers"),
        ({"window_size": (40, 40)}, "1024 tokens"),
        ({"window_size": (4, 3), "window_fit": "side"}, "square windows"),
        ({"position_resample": "nearest"}, "position_resample"),
        ({"window_fit": "sometimes"}, "sometimes"),
        ({"image_size": 1, "partial_patches": "drop"}, "do not fit"),
    ],
)
def test_nonsense_is_refused_by_name(settings, words):
    with pytest.raises(UserError, match=words):
        small(**settings)


@pytest.mark.parametrize("name", ["swin_t", "swin_s", "swin_b"])
def test_torchvision_names_mean_what_they_mean_there(name):
    weights = torchvision.models.get_model_weights(name).DEFAULT
    row, transforms = variant(name), weights.transforms()
    assert row.parameters == weights.meta["num_params"]
    assert [math.floor(224 / row.preprocess["crop_pct"])] == transforms.resize_size
    assert [row.preprocess["mean"], row.preprocess["std"]] == [tuple(transforms.mean), tuple(transforms.std)]
    assert row.preprocess["interpolation"] == transforms.interpolation.value
