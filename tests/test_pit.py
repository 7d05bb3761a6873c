"""Pooling-based Vision Transformers: what their stages, poolings and tokens do, by hand."""

import pytest
import timm
import torch
from torch import nn

from parity.pit import original_names
from sightline.backbones.pit import Pooling
from sightline.checkpoints.pit import LAYOUTS
from sightline.errors import UserError
from sightline.layout import Shapes
from sightline.network import Network, create_model, describe
from sightline.types import Tokens

SMALL = {"patch_size": 8, "stride": 4, "base_dims": (4, 4, 4), "depth": (1, 3, 1), "heads": (2, 4, 8)}


def small(name: str = "pit_ti_distilled_224", **settings) -> Network:
    network = create_model(name, 5, **({"image_size": (33, 47)} | SMALL | settings))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.eval()


def test_pooling_by_hand():
    pooling = Pooling(2, 4)
    kernels = torch.arange(4 * 9.0).reshape(4, 1, 3, 3)
    with torch.no_grad():
        pooling.convolution.weight.copy_(kernels)
        pooling.convolution.bias.fill_(0.5)
    plane = torch.randn(3, 5, 2)  # rows, columns, channels
    found = pooling(Tokens(torch.cat([torch.ones(1, 1, 2), plane.reshape(1, 15, 2)], dim=1), (3, 5), 1))
    assert found.grid == (2, 3)
    assert torch.equal(found.x[:, :1], pooling.dense(torch.ones(1, 1, 2)))
    around = torch.zeros(5, 7, 2)
    around[1:4, 1:6] = plane
    for channel in range(4):  # two outputs for each input, next to each other
        corner = (around[2:5, 4:7, channel // 2] * kernels[channel, 0]).sum() + 0.5
        torch.testing.assert_close(found.patches[0, -1, channel], corner)


def test_what_a_mask_hides_counts_as_outside_the_image():
    pooling, alone = Pooling(2, 6), torch.randn(1, 6, 2)
    canvas = torch.full((1, 4, 5, 2), 7.0)
    canvas[:, :2, :3] = alone.reshape(1, 2, 3, 2)
    mask = torch.zeros(1, 4, 5, dtype=torch.bool)
    mask[:, :2, :3] = True
    together = pooling(Tokens(canvas.reshape(1, 20, 2), (4, 5), 0, mask.reshape(1, 20))).x.reshape(2, 3, 6)
    torch.testing.assert_close(together[:1, :2], pooling(Tokens(alone, (2, 3))).x.reshape(1, 2, 6))


@pytest.mark.parametrize(("name", "sides"), [("pit_ti_224", (27, 14, 7)), ("pit_b_224", (31, 16, 8))])
def test_stages_have_the_published_sizes(name, sides):
    backbone = describe(name, depth=(1, 1, 1)).lay_out().backbone
    with torch.device("meta"):
        stages = backbone.stages(torch.empty(1, 3, 224, 224))
    assert [stage.grid for stage in stages] == [(side, side) for side in sides]
    assert [stage.x.shape[2] for stage in stages] == list(backbone.config.widths)


def test_prefix_tokens_have_no_position():
    network, seen = small(), []
    network.backbone.transformers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    network(torch.randn(1, 3, 33, 47))
    assert torch.equal(seen[0][:, :2], network.backbone.prefix_tokens)


def test_one_word_asks_for_the_second_token_and_its_classifier():
    one, two = describe("pit_s_224"), describe("pit_s_224", distilled=True)
    assert not one.backbone.distillation_token
    assert two.backbone.distillation_token
    assert two.head.distilled
    assert two.backbone == describe("pit_s_distilled_224").backbone
    assert describe("pit_s_distilled_224", distilled=False).backbone == one.backbone


def test_stochastic_depth_grows_over_all_stages():
    backbone = create_model("pit_ti_224", 5, **SMALL, image_size=32, drop_path_rate=0.5).backbone
    rates = [block.drop_path.rate for stage in backbone.transformers for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_pixels_beyond_the_last_whole_patch_are_not_seen():
    network, pixels = small(), torch.randn(1, 3, 35, 46)
    assert torch.equal(network(pixels), network(pixels[..., :32, :44]))
    assert network.backbone(pixels).grid == (2, 3)


def test_an_image_smaller_than_a_patch_is_filled_with_zeros():
    network, pixels = small(), torch.randn(1, 3, 5, 30)
    whole = nn.functional.pad(pixels, (0, 0, 0, 3))
    assert torch.equal(network(pixels), network(whole))


def test_layers_are_counted_through_the_stages():
    backbone = small().backbone
    assert backbone.depth == 5
    assert backbone.layer_of("positions.table") == 0
    assert backbone.layer_of("transformers.1.blocks.2.mlp.fc1.weight") == 4
    assert backbone.layer_of("poolings.1.dense.bias") == 5 == backbone.layer_of("transformers.2.blocks.0.norm1.bias")
    assert backbone.layer_of("norm.weight") == 6


def test_a_map_has_the_grid_of_its_stage():
    backbone, map_ = small().backbone, torch.rand(1, 4, 22, 22)
    weights, grid = backbone.whole("transformers.1.blocks.0.attention", map_, (33, 47))
    assert weights is map_
    assert grid == (4, 5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"heads": (2, 4)}, "one number each"),
        ({"heads": (2, 3, 6)}, "12 wide, which is no multiple of the 8"),
        ({"depth": (1, 0, 1)}, "depth must be positive"),
        ({"base_dims": (), "depth": (), "heads": ()}, "must be positive"),
        ({"stride": 0}, "stride must be positive"),
        ({"mlp_ratio": 0.01}, "no hidden units"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"position_resample": "nearest"}, "position_resample"),
    ],
)
def test_nonsense_is_refused_by_name(settings, words):
    with pytest.raises(UserError, match=words):
        small(**settings)


@pytest.mark.parametrize("name", ["pit_xs_224", "pit_b_distilled_224"])
def test_shapes_tell_a_published_network(name):
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    for key, other, tensors in (("timm", "original", state), ("original", "timm", original_names(state))):
        shapes = Shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, "here")
        assert LAYOUTS[f"{key}/pit"].recognises(shapes)
        assert not LAYOUTS[f"{other}/pit"].recognises(shapes)
        told = LAYOUTS[f"{key}/pit"].measure(shapes, None)
        found, wanted = describe("pit_ti_224", **told), describe(name)
        assert (found.backbone, found.head) == (wanted.backbone, wanted.head)


def test_a_size_that_was_given_holds_where_the_plane_of_positions_allows_it():
    shapes = Shapes({"patch_embed.conv.weight": (8, 3, 16, 16), "pos_embed": (1, 8, 27, 27)}, "here")
    shapes = Shapes({**shapes, "cls_token": (1, 1, 8), "transformers.0.blocks.0.mlp.fc1.weight": (32, 8)}, "here")
    shapes = Shapes({**shapes, "transformers.0.blocks.0.norm1.weight": (8,)}, "here")
    sizes = [LAYOUTS["timm/pit"].measure(shapes, size)["image_size"] for size in (None, (230, 224), (384, 384))]
    assert sizes == [(224, 224), (230, 224), (224, 224)]


def test_what_no_layout_can_express_is_refused():
    given = describe("pit_ti_224", norm_eps=1e-5, global_pool="avg", distillation_token=True)
    refusals = LAYOUTS["timm/pit"].refusals(given.backbone, given.head)
    assert len(refusals) == 3
