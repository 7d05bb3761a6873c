"""The shared mathematics against hand-computed values and independent formulas."""

import math

import pytest
import torch
from einops import rearrange
from torch import nn

from sightline.layers.attention import Attention
from sightline.layers.encoder import Block, DropPath, Encoder, Mlp, rows_of
from sightline.layers.positions import (
    FixedPositions,
    LearnedPositions,
    RelativePositions,
    relative_index,
    resample_table,
    sincos1d,
    sincos2d,
)


def _random(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


def test_attention_by_hand():
    attention = Attention(2, 1)
    with torch.no_grad():
        attention.qkv.weight.copy_(torch.cat([torch.eye(2), torch.eye(2), 2 * torch.eye(2)]))
        attention.qkv.bias.zero_()
        attention.out.weight.copy_(torch.eye(2))
        attention.out.bias.copy_(torch.tensor([0.0, 1.0]))
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    near = math.exp(1 / math.sqrt(2)) / (math.exp(1 / math.sqrt(2)) + 1)
    torch.testing.assert_close(attention.weights(x)[0, 0], torch.tensor([[near, 1 - near], [1 - near, near]]))
    expected = torch.tensor([[2 * near, 2 * (1 - near) + 1], [2 * (1 - near), 2 * near + 1]])
    torch.testing.assert_close(attention(x)[0], expected)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_fused_attention_is_the_explicit_one(cross, biased):
    attention = _random(Attention(21, 3, qkv_bias=True))
    x, y = torch.randn(2, 5, 21), torch.randn(2, 7, 21)
    keys = (y,) if cross else ()
    bias = torch.randn(1, 3, 5, 7 if cross else 5) if biased else None
    map_ = attention.weights(x, *keys, bias=bias)
    torch.testing.assert_close(map_.sum(-1), torch.ones(2, 3, 5))
    _, _, v = attention.project(x, *(keys or (None,)), None)
    explicit = attention.out(rearrange(map_ @ v, "b h n k -> b n (h k)"))
    torch.testing.assert_close(attention(x, *keys, bias=bias), explicit, atol=2e-5, rtol=1e-5)


def test_attention_agrees_with_the_framework():
    attention = _random(Attention(21, 3))
    reference = nn.MultiheadAttention(21, 3, batch_first=True).eval()
    reference.load_state_dict(
        {
            "in_proj_weight": attention.qkv.weight,
            "in_proj_bias": attention.qkv.bias,
            "out_proj.weight": attention.out.weight,
            "out_proj.bias": attention.out.bias,
        }
    )
    x, y, z = torch.randn(2, 5, 21), torch.randn(2, 7, 21), torch.randn(2, 7, 21)
    theirs, map_ = reference(x, y, z, average_attn_weights=False)
    torch.testing.assert_close(attention(x, y, z), theirs, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(attention.weights(x, y, z), map_)


def test_a_hidden_key_is_not_seen():
    attention = _random(Attention(6, 2))
    x = torch.randn(1, 3, 6)
    bias = torch.tensor([0.0, 0.0, -torch.inf])[None, None, None]
    torch.testing.assert_close(attention(x, bias=bias)[:, :2], attention(x[:, :2]))


def test_post_norm_block_is_the_original_transformer():
    ours = _random(Block(14, 2, 19, norm="post", activation="relu", eps=1e-5))
    theirs = nn.TransformerEncoderLayer(14, 2, 19, dropout=0.0, batch_first=True, norm_first=False).eval()
    names = {
        "self_attn.in_proj_weight": "attention.qkv.weight",
        "self_attn.in_proj_bias": "attention.qkv.bias",
        "self_attn.out_proj.weight": "attention.out.weight",
        "self_attn.out_proj.bias": "attention.out.bias",
        "linear1.weight": "mlp.fc1.weight",
        "linear1.bias": "mlp.fc1.bias",
        "linear2.weight": "mlp.fc2.weight",
        "linear2.bias": "mlp.fc2.bias",
    } | {f"norm{i}.{part}": f"norm{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
    state = ours.state_dict()
    theirs.load_state_dict({name: state[own] for name, own in names.items()})
    x = torch.randn(3, 5, 14)
    with torch.enable_grad():  # keeps the reference off its inference-only fast path
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("gelu", 0.5 * (1 + math.erf(1 / math.sqrt(2)))),
        ("gelu_tanh", 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * 1.044715))),
        ("quick_gelu", 1 / (1 + math.exp(-1.702))),
        ("relu", 1.0),
        ("silu", 1 / (1 + math.exp(-1))),
    ],
)
def test_activations_at_one(kind, value):
    mlp = Mlp(1, 1, activation=kind)
    with torch.no_grad():
        for layer in (mlp.fc1, mlp.fc2):
            layer.weight.fill_(1.0)
            layer.bias.zero_()
    assert mlp(torch.ones(1, 1)).item() == pytest.approx(value, abs=1e-6)


def test_drop_path_keeps_the_mean_and_whole_samples():
    drop = DropPath(0.3).train()
    out = drop(torch.ones(4000, 2, 3))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert (out == out[:, :1, :1]).all()
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(drop.eval()(out), out)


def test_drop_path_of_parts_is_drop_path_of_the_whole():
    drop = DropPath(0.5).train()
    x = torch.randn(10, 3)
    torch.manual_seed(5)
    whole = drop(x)
    parts = []
    for start, stop in ((0, 4), (4, 10)):
        torch.manual_seed(5)
        with rows_of(start, 10):
            parts.append(drop(x[start:stop]))
    assert torch.equal(torch.cat(parts), whole)
    assert DropPath.part is None


def test_stochastic_depth_grows_linearly():
    encoder = Encoder(5, drop_path=0.4, width=4, heads=2, hidden=4)
    assert [b.drop_path.rate for b in encoder.blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_recomputed_activations_change_no_gradient():
    encoder = Encoder(3, drop_path=0.5, width=6, heads=2, hidden=5)
    x = torch.randn(4, 5, 6)
    gradients = []
    for encoder.checkpointing in (False, True):
        torch.manual_seed(1)
        encoder.zero_grad()
        encoder(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_sincos2d_by_hand():
    table = sincos2d(8, (2, 3))
    row, column = 1, 2
    slow = 10000 ** (-1 / 2)
    expected = [math.sin(column), math.sin(column * slow), math.cos(column), math.cos(column * slow)]
    expected += [math.sin(row), math.sin(row * slow), math.cos(row), math.cos(row * slow)]
    torch.testing.assert_close(table[row * 3 + column], torch.tensor(expected))


def test_sincos1d_by_hand():
    table = sincos1d(4, (2, 3))
    expected = [math.sin(4), math.cos(4), math.sin(0.04), math.cos(0.04)]
    torch.testing.assert_close(table[4], torch.tensor(expected))


def test_fixed_positions_are_carried_and_never_learned():
    fixed = FixedPositions(12, (2, 3), prefix=1, resample="bicubic")
    assert list(fixed.state_dict()) == ["table"]
    assert not fixed.table.requires_grad
    assert not fixed.table[:, 0].any()
    assert fixed((2, 3)) is fixed.table
    assert torch.equal(fixed((5, 7)), resample_table(fixed.table, (2, 3), (5, 7), "bicubic"))


def test_waves_along_the_sequence_count_the_class_token():
    with_token, without = (FixedPositions(4, (2, 3), prefix=n, kind="sincos1d").table[0] for n in (1, 0))
    assert with_token[0].tolist() == [0.0, 1.0, 0.0, 1.0]
    assert torch.equal(with_token[1:6], without[1:])


def test_relative_index_knows_offsets_and_prefix():
    index = relative_index((2, 3), 1)
    assert index.shape == (7, 7)
    patches = index[1:, 1:]
    assert patches[0, 4] == patches[1, 5] != patches[4, 0]  # one row up, one column left, from two places
    assert patches.max() < 15
    assert index[0, 1:].unique().tolist() == [15]
    assert index[1:, 0].unique().tolist() == [16]
    assert index[0, 0] == 17
    assert relative_index((2, 3), 0).equal(patches)


def test_relative_positions_on_another_grid_keep_what_they_know():
    table = _random(RelativePositions(2, (3, 5)))
    bias = table((5, 7))
    assert bias.shape == (2, 36, 36)
    # The bias of a patch to itself is the middle of the table, whatever its extent.
    middle = table((3, 5))[:, 1, 1]
    torch.testing.assert_close(bias[:, 8, 8], middle)


def test_learned_positions_stay_on_their_own_grid():
    positions = LearnedPositions(6, (3, 5), prefix=2)
    assert positions((3, 5)) is positions.table
    moved = positions((4, 7))
    assert moved.shape == (1, 2 + 28, 6)
    assert torch.equal(moved[:, :2], positions.table[:, :2])


def test_equal_counts_of_patches_are_not_equal_grids():
    table = torch.randn(1, 1 + 28, 3)
    assert not torch.equal(resample_table(table, (4, 7), (7, 4), "bicubic"), table)
