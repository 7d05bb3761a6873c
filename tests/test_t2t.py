"""The tokens-to-token module: the original's tokens, and its peculiarities one by one."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from parity.t2t import GOLDENS, Plain
from sightline.checkpoints.load import load_bundle
from sightline.checkpoints.t2t import LAYOUTS
from sightline.errors import UserError
from sightline.network import Network, create_model, describe
from sightline.tokenizers.t2t import TokenPerformer, TokenTransformer

KINDS = ["performer", "transformer"]


def small(attention: str, **settings) -> Network:
    given = {"embed_dim": 24, "depth": 1, "num_heads": 3, "image_size": (33, 47), **settings}
    options = {"attention": attention, "token_dim": 10}
    network = create_model("t2t_vit_7", 5, tokenizer_options=options, **given)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.eval()


def apart(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


FILES = [("t2t-performer", "weights.safetensors", 3), ("t2t-transformer", "checkpoint.pth.tar", 4)]


@pytest.mark.parametrize(("case", "file", "heads"), FILES)
@torch.no_grad()
def test_tokens_and_features_are_the_originals(case, file, heads):
    network = load_bundle(GOLDENS / case / file, num_heads=heads).network
    values = load_file(GOLDENS / case / "io.safetensors")
    tokens = network.backbone.tokenizer(values["input.pixels"])
    assert apart(tokens.x, values["output.tokens"]) <= 1e-5
    assert apart(network.embed(values["input.pixels"]), values["output.features"]) <= 1e-5


@torch.no_grad()
def test_the_plain_network_of_the_parity_cases_is_the_original():
    state = load_file(GOLDENS / "t2t-performer" / "weights.safetensors")
    plain = Plain("performer", (48, 48), width=45, depth=3, heads=3, ratio=2.0, inner=20).eval()
    plain.load_state_dict(state)
    values = load_file(GOLDENS / "t2t-performer" / "io.safetensors")
    assert apart(plain(values["input.pixels"]), values["output.logits"]) <= 1e-5


def test_positions_are_the_originals():
    wanted = load_file(GOLDENS / "t2t-performer" / "weights.safetensors")["pos_embed"]
    place = create_model("t2t_vit_7", 0, image_size=48, embed_dim=45, num_heads=3, depth=1).backbone.place
    assert torch.equal(place.positions.table, wanted)
    assert not place.positions.table.requires_grad


def test_the_skip_connection_starts_at_the_values():
    layer, x = TokenTransformer(12, 4), torch.randn(2, 7, 12)
    for part in (layer.out, layer.mlp.fc2):
        nn.init.zeros_(part.weight)
        nn.init.zeros_(part.bias)
    torch.testing.assert_close(layer(x), layer.norm1(x) @ layer.qkv.weight[8:].T)


def test_logits_are_divided_by_the_root_of_the_input_width():
    layer = TokenTransformer(16, 4)
    query, key, value = torch.randn(3, 2, 7, 4).unbind()
    torch.testing.assert_close(layer.mix(query, key, value), (query @ key.mT / 4).softmax(dim=2) @ value)


def test_the_performer_by_hand():
    layer = TokenPerformer(9, 2)  # one feature
    nn.init.constant_(layer.features, 0.5)
    query = torch.tensor([[[1.0, 2.0], [0.0, 3.0]]])  # of one feature, a query's own factor cancels
    key, value = torch.tensor([[[0.0, 1.0], [2.0, 0.0]]]), torch.eye(2)[None]
    first, second = math.exp(0.5 - 0.5), math.exp(1.0 - 2.0)
    wanted = torch.tensor([[[first, second]] * 2]) / (first + second)
    torch.testing.assert_close(layer.mix(query, key, value), wanted)


@torch.no_grad()
def test_the_performer_estimates_the_exponential_kernel():
    query, key, value = (0.3 * torch.randn(1, 30, 8) for _ in range(3))
    layer = TokenPerformer(9, 8)
    layer.features = nn.Parameter(torch.randn(200_000, 8))  # so many need not be orthogonal
    assert apart(layer.mix(query, key, value), (query @ key.mT).softmax(dim=2) @ value) < 0.05


def test_random_features_are_orthogonal_and_never_learned():
    features = TokenPerformer(147, 64).features
    assert not features.requires_grad
    torch.testing.assert_close(features @ features.T, 32 * torch.eye(32), atol=1e-4, rtol=0)


@torch.no_grad()
def test_sums_are_taken_in_single_precision():
    layer = TokenPerformer(20, 8)
    query, key, value = (torch.randn(1, 4000, 8) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer.mix(query, key, value)
    assert torch.equal(half, layer.mix(query, key, value))


@pytest.mark.parametrize("kind", KINDS)
def test_windows_that_do_not_divide_the_image(kind):
    padded, dropped = small(kind), small(kind, partial_patches="drop")
    pixels = torch.randn(1, 3, 33, 50)
    for network, grid in ((padded, (3, 4)), (dropped, (2, 3))):
        assert network.backbone(pixels).grid == network.backbone.tokenizer.grid((33, 50)) == grid
    whole = nn.functional.pad(pixels, (0, 2, 0, 3))
    torch.testing.assert_close(padded(pixels), padded(whole))
    torch.testing.assert_close(dropped(pixels), dropped(pixels[..., :49]))  # the last column is in no window


@pytest.mark.parametrize("kind", KINDS)
def test_every_pixel_is_felt_by_every_token(kind):
    tokenizer = small(kind).backbone.tokenizer
    pixels = torch.randn(1, 3, 40, 40, requires_grad=True)
    tokenizer(pixels).x[0, 0].sum().backward()
    assert pixels.grad.ne(0).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention": "reformer"}, "performer, transformer"),
        ({"token_dim": 1}, "token_dim must lie"),
        ({"token_dim": 2.5}, "token_dim: expected int"),
        ({"drop": 1.0}, "drop must lie"),
        ({"depth": 3}, "unknown setting 'depth'"),
    ],
)
def test_nonsense_is_refused_by_name(options, words):
    with pytest.raises(UserError, match=words):
        create_model("t2t_vit_7", tokenizer_options=options, image_size=32)


def test_patches_of_another_size_are_refused():
    with pytest.raises(UserError, match="16×16 pixels, not 8×16"):
        create_model("t2t_vit_7", patch_size=(8, 16), image_size=32)


def test_what_the_original_cannot_express_is_refused():
    layout = LAYOUTS["original/t2t"]
    given = describe("t2t_vit_7")
    assert layout.refusals(given.backbone, given.head) == []
    given = describe("t2t_vit_7", qkv_bias=True, norm_eps=1e-6, positions="learned")
    assert len(layout.refusals(given.backbone, given.head)) == 3
