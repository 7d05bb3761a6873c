"""What holds for every network: geometry of tokens, batches and padding, answers and their counts."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from sightline.evaluation.accuracy import Accuracy
from sightline.heads.classify import ClassifyConfig, ClassifyHead
from sightline.images.preprocess import collate
from sightline.layers.attention import Attention
from sightline.layers.encoder import DropPath, rows_of
from sightline.layers.positions import RESAMPLERS, relative_index, resample_relative, resample_table
from sightline.network import Architecture, Network, create_model
from sightline.tokenizers.patch import PatchEmbedding
from sightline.types import Tokens

PAIRS = st.tuples(st.integers(1, 9), st.integers(1, 9))
GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 6))
KINDS = ["learned", "sincos2d", "sincos1d", "relative", "none"]


def small(**changes) -> Network:
    settings = {"image_size": (12, 20), "patch_size": (4, 5), "embed_dim": 8, "depth": 2, "num_heads": 2, **changes}
    network = create_model("vit_tiny_patch16_224", **{"num_classes": 4, **settings}).eval()
    generator = torch.Generator().manual_seed(7)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return network


# Tokens


@given(st.tuples(st.integers(9, 50), st.integers(9, 50)), PAIRS, st.sampled_from(["pad", "drop"]))
def test_a_grid_of_patches_covers_the_image_and_no_more(size, patch, partial):
    tokenizer = PatchEmbedding(2, patch_size=patch, partial=partial)
    grid = tokenizer.grid(size)
    for cells, length, pixels in zip(grid, patch, size, strict=True):
        assert (cells - 1) * length < pixels if partial == "pad" else cells * length <= pixels
        assert cells * length >= pixels if partial == "pad" else (cells + 1) * length > pixels
    tokens = tokenizer(torch.zeros(1, 3, *size))
    assert tokens.grid == grid
    assert tokens.x.shape == (1, math.prod(grid), 2)


@given(st.tuples(st.integers(9, 30), st.integers(9, 30)), PAIRS, st.sampled_from(["pad", "drop"]), st.data())
def test_a_pixel_shows_in_its_own_patch_alone(size, patch, partial, data):
    tokenizer = PatchEmbedding(3, patch_size=patch, partial=partial)
    row, column = (data.draw(st.integers(0, side - 1)) for side in size)
    plain, marked = torch.zeros(2, 1, 3, *size)
    marked[0, 1, row, column] = 9.0
    rows, columns = tokenizer.grid(size)
    differs = (tokenizer(plain).x != tokenizer(marked).x).any(dim=2)[0].nonzero()[:, 0].tolist()
    own = (row // patch[0], column // patch[1])
    inside = own[0] < rows and own[1] < columns
    assert inside or partial == "drop"
    assert differs == ([own[0] * columns + own[1]] if inside else [])


@given(st.integers(1, 3), GRIDS, st.integers(0, 3), st.data())
def test_the_mean_of_tokens_is_that_of_the_real_patches(batch, grid, prefix, data):
    n = prefix + math.prod(grid)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(batch, n, 2, generator=generator)
    mask = torch.rand(batch, n, generator=generator) < 0.5
    mask[:, : prefix + 1] = True
    expected = [x[i, prefix:][mask[i, prefix:]].mean(dim=0) for i in range(batch)]
    hidden = x.masked_fill(~mask[..., None], 1e4)
    assert torch.allclose(Tokens(hidden, grid, prefix, mask).mean(), torch.stack(expected), atol=2e-3)
    assert torch.allclose(Tokens(x, grid, prefix).mean(), x[:, prefix:].mean(dim=1))


# Positions


@given(GRIDS, GRIDS, st.integers(0, 2), st.sampled_from(sorted(RESAMPLERS)), st.floats(-3, 3, width=32))
def test_positions_keep_prefix_and_constants_and_their_own_grid(old, new, prefix, method, value):
    table = torch.randn(1, prefix + math.prod(old), 2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(resample_table(table, old, old, method), table)
    stretched = resample_table(table, old, new, method)
    assert stretched.shape == (1, prefix + math.prod(new), 2)
    assert torch.equal(stretched[:, :prefix], table[:, :prefix])
    flat = resample_table(torch.full_like(table, value), old, new, method)
    assert torch.allclose(flat, torch.full_like(flat, value), atol=1e-5)


@given(GRIDS, GRIDS, st.integers(0, 2))
def test_relative_positions_know_each_offset_once(grid, other, prefix):
    index = relative_index(grid, prefix)
    rows, columns = grid
    cells = [(r, c) for r in range(rows) for c in range(columns)]
    found = {}
    for i, (r, c) in enumerate(cells):
        for j, (s, d) in enumerate(cells):
            assert found.setdefault((r - s, c - d), int(index[prefix + i, prefix + j])) == index[prefix + i, prefix + j]
    assert len(set(found.values())) == len(found) == (2 * rows - 1) * (2 * columns - 1)
    table = torch.randn(len(found) + 3 * (prefix > 0), 2, generator=torch.Generator().manual_seed(1))
    assert index.max() < len(table)
    assert torch.equal(resample_relative(table, grid, grid), table)
    assert relative_index(other, prefix).max() < len(resample_relative(table, grid, other))


# Batches


@examples(20)
@given(
    st.lists(st.tuples(st.integers(4, 17), st.integers(5, 21)), min_size=1, max_size=4),
    st.sampled_from(KINDS),
    st.sampled_from(["token", "avg"]),
    st.sampled_from(["pad", "drop"]),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.randoms(),
)
def test_neither_batch_mates_nor_place_nor_padding_change_an_answer(sizes, positions, pool, partial, more, chance):
    network = small(positions=positions, global_pool=pool, partial_patches=partial)
    generator = torch.Generator().manual_seed(3)
    images = [torch.randn(3, *size, generator=generator) for size in sizes]
    with torch.inference_mode():
        alone = torch.cat([network(image[None]) for image in images])
        chance.shuffle(order := list(range(len(images))))
        pixels, told = collate([images[i] for i in order])
        told = torch.tensor([sizes[i] for i in order]) if told is None else told
        canvas = torch.randn(len(images), 3, pixels.shape[2] + more[0], pixels.shape[3] + more[1], generator=generator)
        for row, i in zip(canvas, order, strict=True):  # whatever stands in the padding
            row[:, : sizes[i][0], : sizes[i][1]] = images[i]
        together = network(canvas, told)
    for row, i in zip(together, order, strict=True):
        assert torch.allclose(row.softmax(0), alone[i].softmax(0), atol=1e-6)
        assert row.argmax() == alone[i].argmax()


@given(st.integers(2, 12), st.lists(st.integers(0, 12), max_size=3), st.floats(0.1, 0.9), st.integers(0, 99))
def test_stochastic_depth_of_parts_is_that_of_the_whole(total, cuts, rate, seed):
    drop = DropPath(rate).train()
    x = torch.arange(1.0, total + 1)[:, None].expand(total, 3)

    def run(start: int, stop: int) -> torch.Tensor:
        torch.manual_seed(seed)
        with rows_of(start, total):
            return drop(x[start:stop])

    edges = [0, *sorted(min(cut, total) for cut in cuts), total]
    parts = [run(start, stop) for start, stop in pairwise(edges) if stop > start]
    assert torch.equal(torch.cat(parts), run(0, total))
    assert drop.eval()(x) is x


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.booleans(), st.data())
def test_fused_attention_is_the_mean_by_its_own_weights(batch, heads, n, m, biased, data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    attention = Attention(4 * heads, heads).eval()
    query, key = torch.randn(batch, n, 4 * heads), torch.randn(batch, m, 4 * heads)
    bias = torch.randn(1, heads, n, m) if biased else None
    weights = attention.weights(query, key, bias=bias)
    assert torch.allclose(weights.sum(-1), torch.ones(batch, heads, n), atol=1e-6)
    value = attention.project(query, key, None)[2]
    expected = attention.out(rearrange(weights @ value, "b h n k -> b n (h k)"))
    assert torch.allclose(attention(query, key, bias=bias), expected, atol=1e-5)


# Answers


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 99), st.floats(0.01, 100))
def test_the_best_answers_fall_and_stay_within_bounds(classes, top, seed, scale):
    logits = torch.randn(3, classes, generator=torch.Generator().manual_seed(seed)) * scale
    labels = [f"c{i}" for i in range(classes)]
    for row, answer in zip(logits, ClassifyHead(ClassifyConfig(classes), 2).read(logits, labels, top), strict=True):
        scores = [s.score for s in answer.top]
        assert len(scores) == min(top, classes)
        assert scores == sorted(scores, reverse=True)
        assert 0 <= min(scores) <= sum(scores) <= 1 + 1e-5
        assert answer.score == pytest.approx(float(row.softmax(0).max()))
        assert len({s.index for s in answer.top}) == len(scores)
        assert [labels[s.index] for s in answer.top] == [s.label for s in answer.top]


def counted(logits: torch.Tensor, targets: torch.Tensor, rows: list[int], refused: list[int]) -> Accuracy:
    counts = Accuracy(logits.shape[1])
    read = [i for i in rows if i not in refused]
    if read:
        counts.add(logits[read], targets[read], torch.tensor(read))
    counts.refused += [(str(i), "broken") for i in rows if i in refused]
    return counts


@given(
    st.integers(1, 7),
    st.integers(1, 20),
    st.lists(st.integers(0, 20), max_size=4),
    st.sets(st.integers(0, 19)),
    st.data(),
)
def test_a_metric_of_the_whole_is_that_of_its_parts(classes, count, cuts, refused, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.randn(count, classes, generator=generator).round(decimals=3)
    targets = torch.randint(classes, (count,), generator=generator)
    edges = [0, *sorted(min(cut, count) for cut in cuts), count]
    spans = [list(range(a, b)) for a, b in pairwise(edges)]
    first, *others = [counted(logits, targets, span, list(refused)) for span in spans]
    parts, whole = first.merge(others), counted(logits, targets, list(range(count)), list(refused))
    assert parts.metrics() == pytest.approx(whole.metrics())
    assert (parts.confusion == whole.confusion).all()
    assert parts.mistakes == whole.mistakes
    metrics, lost = whole.metrics(), len([i for i in refused if i < count])
    assert 0 <= metrics["top1"] <= metrics["top5"] <= (count - lost) / count
    right = sum(int(logits[i].argmax()) == int(targets[i]) for i in range(count) if i not in refused)
    assert metrics["top1"] == pytest.approx(right / count)  # what was refused is in the denominator
    assert whole.evaluated == count - lost


@given(st.integers(1, 6), st.integers(0, 99))
def test_figures_of_classes_are_those_by_hand(classes, seed):
    counts = Accuracy(classes)
    counts.confusion = np.random.default_rng(seed).integers(0, 5, (classes, classes))
    rows = counts.per_class([str(i) for i in range(classes)])
    for i, row in enumerate(rows):
        hits, actual, called = counts.confusion[i, i], counts.confusion[i].sum(), counts.confusion[:, i].sum()
        assert row["images"] == actual
        assert row["recall"] == pytest.approx(hits / actual if actual else 0)
        assert row["precision"] == pytest.approx(hits / called if called else 0)
        assert 0 <= min(row["recall"], row["precision"]) - 1e-9 <= row["f1"] or hits == 0
        assert row["f1"] <= max(row["recall"], row["precision"]) + 1e-9


# Plain data


@examples(12)
@given(
    st.sampled_from(KINDS),
    st.booleans(),
    st.sampled_from(["pre", "post"]),
    st.none() | st.floats(1e-6, 1),
    st.integers(0, 5),
    st.none() | st.integers(1, 9),
    st.integers(1, 3),
)
def test_an_architecture_is_that_of_its_network_and_survives_json(positions, token, norm, scale, classes, dense, depth):
    network = create_model(
        "vit_tiny_patch16_224",
        classes,
        image_size=(8, 12),
        patch_size=4,
        embed_dim=8,
        num_heads=2,
        depth=depth,
        positions=positions,
        class_token=token,
        global_pool="token" if token else "avg",
        norm=norm,
        init_values=scale,
        pre_logits=dense,
    )
    again = Architecture.from_json(network.architecture.to_json())
    assert again == network.architecture
    assert again.build().architecture == again
    assert again.shapes() == {name: tensor.shape for name, tensor in network.state_dict().items()}
