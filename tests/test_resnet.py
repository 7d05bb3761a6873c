"""Residual networks: batch norm, padding, and how other libraries' counters are treated."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers.padding import pad_same
from torch import nn
from torchvision.models.resnet import ResNet as TheirResNet

from parity.resnet import from_timm, from_torchvision, from_transformers
from sightline.checkpoints.resnet import LAYOUTS
from sightline.checkpoints.rules import save
from sightline.errors import UserError
from sightline.layers.resnet import BasicBlock, BatchNorm, Bottleneck, GroupNorm, padded, same, stages
from sightline.network import create_model, describe

SMALL = {"image_size": (32, 48), "layers": (1, 2, 1), "channels": (8, 12, 16), "stem_chs": 16}


def small(**settings):
    network = create_model("resnet50", 5, **(SMALL | settings))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def test_same_padding_by_hand():
    assert same(224, 7, 2) == (2, 3)
    assert same(112, 3, 2) == (0, 1)
    assert same(225, 7, 2) == (3, 3)
    assert same(7, 3, 1) == (1, 1)
    assert same(8, 1, 2) == (0, 0)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([(7, 2), (3, 2), (3, 1), (1, 2)]))
def test_same_padding_is_that_of_tensorflow(rows, columns, window):
    kernel, stride = window
    x = torch.rand(1, 1, rows, columns)
    ours = padded(x, kernel, stride, 7.0)
    assert torch.equal(ours, pad_same(x, [kernel] * 2, [stride] * 2, value=7.0))
    assert (ours.shape[-2] - kernel) // stride + 1 == -(-rows // stride)


class TestBatchNorm:
    def test_computes_and_remembers_what_the_framework_does(self):
        ours, theirs = BatchNorm(6), nn.BatchNorm2d(6)
        for _ in range(3):
            x = 2 + 3 * torch.randn(4, 6, 5, 7)
            torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        torch.testing.assert_close(ours.running_var, theirs.running_var)
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))

    def test_averages_are_part_of_a_checkpoint_and_no_counter_is(self):
        assert set(BatchNorm(3).state_dict()) == {"weight", "bias", "running_mean", "running_var"}

    def test_a_single_value_is_normed_by_what_is_remembered(self):
        norm = BatchNorm(3)
        norm.running_mean += 2
        torch.testing.assert_close(
            norm(torch.full((1, 3, 1, 1), 5.0)), torch.full((1, 3, 1, 1), 3.0), atol=1e-4, rtol=0
        )
        assert torch.equal(norm.running_mean, torch.full((3,), 2.0))

    def test_recomputed_activations_are_averaged_once(self):
        plain, saving = small().train(), small().train()
        saving.load_state_dict(plain.state_dict())
        for part in saving.modules():
            part.checkpointing = True
        pixels = torch.randn(3, 3, 32, 48)
        for network in (plain, saving):
            network(pixels).square().sum().backward()
        for (name, ours), theirs in zip(plain.named_buffers(), saving.buffers(), strict=True):
            assert torch.equal(ours, theirs), name
        for (name, ours), theirs in zip(plain.named_parameters(), saving.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_group_norm_of_one_place_and_one_channel_each_is_the_bias():
    norm = GroupNorm(32)
    nn.init.normal_(norm.bias)
    torch.testing.assert_close(norm(torch.randn(1, 32, 1, 1))[0, :, 0, 0], norm.bias, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_a_new_block_passes_on_its_input(kind):
    x = torch.rand(2, 16, 6, 9)
    assert torch.equal(kind(16, 16)(x), x)


def test_the_stride_is_on_the_three_by_three_convolution():
    block = Bottleneck(8, 16, 2)
    assert block.conv1.stride == (1, 1)
    assert block.conv2.stride == (2, 2)
    assert block.shortcut.conv.stride == (2, 2)


def test_only_later_stages_halve_and_drop_path_grows():
    built = stages(8, (8, 12), (2, 3), BasicBlock, 0.4)
    rates = [block.drop_path.rate for stage in built for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert isinstance(built[0].blocks[0].shortcut, nn.Identity)
    assert built[0](torch.rand(1, 8, 9, 5)).shape == (1, 8, 9, 5)
    assert built[1](torch.rand(1, 8, 9, 5)).shape == (1, 12, 5, 3)


def test_stages_have_one_entry_for_each_resolution():
    network = small().eval()
    grids = [tokens.grid for tokens in network.backbone.stages(torch.randn(2, 3, 45, 71))]
    assert grids == [(12, 18), (6, 9), (3, 5)]
    widths = [tokens.x.shape[2] for tokens in network.backbone.stages(torch.randn(2, 3, 45, 71))]
    assert widths == [32, 48, 64]


def test_stages_of_unlike_sizes_are_those_of_each_image_alone():
    backbone = small().eval().backbone
    images = [torch.randn(3, 45, 20), torch.randn(3, 17, 71)]
    canvas = torch.full((2, 3, 45, 71), 7.0)
    for row, image in zip(canvas, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    together = backbone.stages(canvas, torch.tensor([image.shape[1:] for image in images]))
    for number, image in enumerate(images):
        for tokens, alone in zip(together, backbone.stages(image[None]), strict=True):
            torch.testing.assert_close(tokens.x[number][tokens.mask[number]], alone.x[0])


def test_layers_are_blocks_counted_through_all_stages():
    backbone = small().backbone
    assert backbone.layer_of("conv.weight") == backbone.layer_of("stem_norm.bias") == 0
    assert backbone.layer_of("blocks.1.blocks.1.norm2.weight") == 3
    assert backbone.depth == 4


def test_a_traced_network_answers_alike():
    network = small().eval()
    pixels = torch.randn(2, 3, 37, 50)
    traced = torch.export.export(network, (pixels,)).module()
    torch.testing.assert_close(traced(pixels), network(pixels))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers": (1, 2)}, "one number for every stage"),
        ({"layers": (1, 2000, 1)}, "more than any network"),
        ({"layers": (1, 0, 1)}, "layers must be positive"),
        ({"channels": (8, -12, 16)}, "channels must be positive"),
        ({"stem_chs": 0}, "stem_chs must be positive"),
        ({"block": "fancy"}, "not one of basic, bottleneck"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
    ],
)
def test_nonsense_is_refused_by_name(settings, words):
    with pytest.raises(UserError, match=words):
        describe("resnet50", 5, **(SMALL | settings))


def converted(library: str, **settings):
    network = small(**settings)
    layout, parts = LAYOUTS[f"{library}/resnet"], network.architecture
    tensors = save(layout.rules(parts.backbone, parts.head), network.state_dict())
    return network.eval(), tensors | layout.extras(parts.backbone, parts.head)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
class TestOthersMissNothing:
    def test_timm(self, block):
        network, tensors = converted("timm", block=block, layers=(1, 2, 1, 1), channels=(12, 20, 28, 16), stem_chs=64)
        theirs = from_timm(block)
        theirs.reset_classifier(5)
        theirs.load_state_dict(tensors)
        pixels = torch.randn(1, 3, 37, 50)
        torch.testing.assert_close(theirs.eval()(pixels), network(pixels))

    def test_torchvision(self, block):
        channels = (64, 128, 256, 512)
        network, tensors = converted("torchvision", block=block, layers=(1, 2, 1, 1), channels=channels, stem_chs=64)
        theirs = from_torchvision(block)
        assert isinstance(theirs, TheirResNet)
        theirs.fc = nn.Linear(theirs.fc.in_features, 5)
        theirs.load_state_dict(tensors)
        pixels = torch.randn(1, 3, 37, 50)
        theirs, network = theirs.eval().double(), network.double()
        torch.testing.assert_close(theirs(pixels.double()), network(pixels.double()))

    def test_transformers(self, block):
        expansion = 4 if block == "bottleneck" else 1
        channels = tuple(size // expansion for size in (20, 28, 36))
        network, tensors = converted("transformers", block=block, layers=(2, 1, 2), channels=channels, stem_chs=20)
        theirs = from_transformers(block)
        theirs.classifier[1] = nn.Linear(36, 5)
        named = {name if name.startswith("classifier") else f"resnet.{name}": t for name, t in tensors.items()}
        theirs.load_state_dict(named)
        pixels = torch.randn(1, 3, 37, 50)
        torch.testing.assert_close(theirs.eval()(pixels).logits, network(pixels))


def test_what_other_libraries_cannot_express_is_refused():
    parts = describe("resnet50", 5, **SMALL)
    assert any("stem_chs" in phrase for phrase in LAYOUTS["timm/resnet"].refusals(parts.backbone, parts.head))
    assert any("4 stages" in phrase for phrase in LAYOUTS["timm/resnet"].refusals(parts.backbone, parts.head))
    assert any("channels" in phrase for phrase in LAYOUTS["torchvision/resnet"].refusals(parts.backbone, parts.head))
    assert LAYOUTS["transformers/resnet"].refusals(parts.backbone, parts.head) == []
