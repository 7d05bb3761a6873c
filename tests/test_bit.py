"""Big Transfer: standardised kernels, the zeros before the pooling, and the originals' layouts."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import StdConv2d
from torch import nn

from parity.bit import from_timm, from_transformers, google_names, original_names
from sightline.checkpoints.bit import LAYOUTS
from sightline.checkpoints.rules import Found, load, save
from sightline.errors import UserError
from sightline.layers.resnet import GroupNorm, PreactivatedBottleneck, StandardizedConv
from sightline.layout import Shapes
from sightline.network import create_model, describe

SMALL = {"image_size": (32, 48), "layers": (1, 2, 1), "channels": (128, 128, 256), "stem_chs": 32}


def small(**settings):
    network = create_model("resnetv2_50x1_bit", 5, **(SMALL | settings))
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1 or "classifier" in name:
            nn.init.normal_(parameter, std=0.3)
    return network.eval()


def test_a_kernel_is_standardised_by_hand():
    layer = StandardizedConv(1, 1, 2, eps=0.5)
    layer.weight.data = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])  # mean 3, variance (4 + 1 + 0 + 9) / 4
    torch.testing.assert_close(layer.standardized()[0, 0, 1, 1], torch.tensor(3 / (3.5 + 0.5) ** 0.5))
    layer.eps_to = "deviation"
    torch.testing.assert_close(layer.standardized()[0, 0, 1, 1], torch.tensor(3 / (3.5**0.5 + 0.5)))


def test_a_standardised_convolution_is_timms():
    ours, theirs = StandardizedConv(5, 7, 3, 2, eps=1e-4), StdConv2d(5, 7, 3, 2, eps=1e-4)
    theirs.weight.data = ours.weight.data * 0.01
    ours.weight.data = theirs.weight.data
    x = torch.randn(2, 5, 9, 12)
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_border_of_zeros_counts_in_the_pooling():
    backbone = small().backbone
    pixels = torch.randn(1, 3, 20, 20)
    features = backbone.conv(pixels)
    corner = features[..., :2, :2].amax(dim=(-1, -2)).clamp(min=0)
    torch.testing.assert_close(backbone.stem(pixels)[..., 0, 0], corner)
    assert (F.max_pool2d(features, 3, 2, padding=1)[..., 0, 0] != corner).any(), "no corner was negative"


def test_the_shortcut_reads_the_input_after_norm_and_relu():
    block = PreactivatedBottleneck(32, 128, convolve=StandardizedConv, normalise=GroupNorm)
    nn.init.zeros_(block.norm3.weight)  # closes the branch
    x = torch.randn(2, 32, 5, 5)
    torch.testing.assert_close(block(x), block.shortcut(F.relu(block.norm1(x))))


def test_the_end_is_norm_and_relu_which_stages_are_without():
    network = small()
    pixels = torch.randn(2, 3, 40, 33)
    last, tokens = network.backbone.stages(pixels)[-1], network.backbone(pixels)
    plane = last.x.transpose(1, 2).unflatten(2, last.grid)
    torch.testing.assert_close(F.relu(network.backbone.norm(plane)).flatten(2).transpose(1, 2), tokens.x)
    assert (last.x < 0).any()


def test_layers_are_blocks_and_the_norm_comes_after_them():
    backbone = small().backbone
    layers = {backbone.layer_of(name) for name, _ in backbone.named_parameters()}
    assert layers == set(range(backbone.depth + 2))


def test_a_traced_network_answers_alike():
    network = small()
    pixels = torch.randn(2, 3, 37, 50)
    torch.testing.assert_close(torch.export.export(network, (pixels,)).module()(pixels), network(pixels))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"channels": (128, 100, 256)}, "multiples of 32"),
        ({"stem_chs": 16}, "multiples of 32"),
        ({"width_factor": 0}, "width_factor must be positive"),
        ({"weight_eps": -1.0}, "weight_eps"),
        ({"layers": ()}, "one number for every stage"),
    ],
)
def test_nonsense_is_refused_by_name(settings, words):
    with pytest.raises(UserError, match=words):
        describe("resnetv2_50x1_bit", 5, **(SMALL | settings))


def read(layout: str, tensors: dict) -> tuple[dict, dict]:
    """The settings that a layout measures, and our parameters."""
    entry = LAYOUTS[layout]
    tensors = {entry.current(name): torch.as_tensor(tensor) for name, tensor in tensors.items()}
    shapes = Shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, "file")
    assert [name for name, other in LAYOUTS.items() if other.recognises(shapes)] == [layout]
    settings = entry.measure(shapes, None)
    parts = describe("resnetv2_50x1_bit", **settings)
    state = load(entry.rules(parts.backbone, parts.head), Found("file", tensors), parts.shapes())
    back = save(entry.rules(parts.backbone, parts.head), state)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    return settings, state


def test_numbered_names_of_an_npz_are_those_without_a_number():
    plain = google_names(from_timm().state_dict())
    numbered = {
        name.replace("standardized_conv2d/", "standardized_conv2d_7/").replace("group_norm/", "group_norm_12/"): array
        for name, array in plain.items()
    }
    assert numbered.keys() != plain.keys()
    (_, first), (_, second) = read("google/bit", plain), read("google/bit", numbered)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_each_layout_knows_its_own_and_writes_what_it_read():
    state = from_timm().state_dict()
    timm, _ = read("timm/bit", state)
    original, _ = read("original/bit", original_names(state))
    google, _ = read("google/bit", google_names(state))
    assert timm.pop("weight_eps") == 1e-8
    assert original.pop("weight_eps") == google.pop("weight_eps") == 1e-10
    assert timm == original == google
    theirs = {name.removeprefix("bit."): tensor for name, tensor in from_transformers().state_dict().items()}
    assert read("transformers/bit", theirs)[0]["layers"] == (2, 1, 2)


@pytest.mark.parametrize("name", ["resnetv2_50x3_bit", "resnetv2_152x2_bit"])
def test_published_networks_are_known_again_by_their_shapes(name):
    parts = describe(name)
    layout = LAYOUTS["google/bit"]
    rules = layout.rules(parts.backbone, parts.head)
    meta = {key: torch.empty(shape, device="meta") for key, shape in parts.shapes().items()}
    shapes = Shapes({key: tuple(tensor.shape) for key, tensor in save(rules, meta).items()}, "file")
    settings = layout.measure(shapes, None)
    for key in ("layers", "width_factor", "channels", "stem_chs"):
        assert settings[key] == getattr(parts.backbone, key)


def test_timm_is_told_a_network_by_a_name_with_as_many_layers():
    layout = LAYOUTS["timm/bit"]
    parts = describe("resnetv2_152x4_bit", image_size=64)
    name, arguments = layout.arguments(parts.backbone, parts.head)
    assert name == "resnetv2_152x4_bit"
    assert (arguments["channels"], arguments["stem_chs"]) == ([256, 512, 1024, 2048], 64)
    parts = describe("resnetv2_152x2_bit", width_factor=1)
    name, arguments = layout.arguments(parts.backbone, parts.head)
    assert (name, arguments["channels"]) == ("resnetv2_152x2_bit", [128, 256, 512, 1024])
    parts = describe("resnetv2_50x1_bit", layers=(1, 1, 1, 1))
    assert layout.unwritten(parts.backbone, parts.head)


def test_another_epsilon_is_refused_with_the_way_out():
    parts = describe("resnetv2_50x1_bit", weight_eps=1e-10)
    for name in ("timm/bit", "transformers/bit"):
        assert any("weight_eps=1e-08 accepts it" in r for r in LAYOUTS[name].refusals(parts.backbone, parts.head))
    assert LAYOUTS["google/bit"].refusals(parts.backbone, parts.head) == []
