"""Token merging: the matching by hand, the method by its definition, and what a merged model promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import sightline
from command import cli
from sightline.errors import UserError
from sightline.images.preprocess import Preprocess
from sightline.layers.encoder import Encoder
from sightline.layers.merging import Crowd, match, merge
from sightline.model import Model
from sightline.network import Network

SMALL = {"image_size": 40, "patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 2, "num_classes": 7}


def _shaken(network: Network, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return network.eval()


def _model(name: str = "vit_tiny_patch16_224", **changed: object) -> Model:
    network = _shaken(sightline.create_model(name, **{**SMALL, **changed}))
    size = network.architecture.backbone.image_size
    return Model(network, Preprocess(size=size), [f"class {i}" for i in range(7)])


def test_matching_by_hand() -> None:
    # Angles of the patches in degrees; A are 0, 40, 90, 200 and B 7, 45, 131. One class token stands before.
    angles = torch.tensor([0.0, 7, 40, 45, 90, 131, 200]).deg2rad()
    keys = torch.stack([angles.cos(), angles.sin()], -1) * torch.tensor([2.0, 3, 5, 7, 11, 13, 17])[:, None]
    keys = torch.cat([torch.tensor([[1.0, 0.0]]), keys])[None]
    pairs = match(keys, 2, prefix=1)
    assert pairs.moved.tolist() == [[1, 0]]  # 5 degrees apart, then 7
    assert pairs.into.tolist() == [[1, 0]]
    assert pairs.kept.tolist() == [[2, 3]]
    x = torch.tensor([[[1.0], [2], [3], [5], [7], [11], [13], [17]]])
    crowd = merge(Crowd.of(x), keys, 2, prefix=1)
    assert crowd.x[0, :, 0].tolist() == [1, 11, 17, 2.5, 6, 13]
    assert crowd.sizes[0].tolist() == [1, 1, 1, 2, 2, 1]
    assert crowd.source[0].tolist() == [0, 3, 3, 4, 4, 1, 5, 2]
    # Again, of 11, 17 | 2.5 …: A is now 11, 2.5, 13 and B 17, 6; 2.5 goes into 17 with the weight of two.
    keys = torch.tensor([[[0.0, 1], [1, 0], [0, 1], [0.1, 1], [1, -1], [1, 1]]])
    crowd = merge(crowd, keys, 1, prefix=1)
    assert crowd.sizes[0].tolist() == [1, 1, 1, 3, 2]
    assert crowd.x[0, 3, 0].item() == pytest.approx((17 * 1 + 2.5 * 2) / 3)


@given(
    batch=st.integers(1, 3),
    patches=st.integers(1, 17),
    prefix=st.integers(0, 3),
    rounds=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_nothing_is_lost(batch: int, patches: int, prefix: int, rounds: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    n = prefix + patches
    x = torch.randn(batch, n, 5)
    crowd = Crowd.of(x)
    for r in rounds:
        crowd = merge(crowd, torch.randn(batch, crowd.x.shape[1], 3), r, prefix)
    assert torch.equal(crowd.sizes.sum(1), torch.full((batch,), float(n)))
    assert torch.equal(crowd.x[:, :prefix], x[:, :prefix])
    assert torch.equal(crowd.sizes[:, :prefix], torch.ones(batch, prefix))
    for image in range(batch):
        for place in range(crowd.x.shape[1]):
            members = x[image, crowd.source[image] == place]
            assert len(members) == crowd.sizes[image, place]
            torch.testing.assert_close(members.mean(0), crowd.x[image, place], atol=1e-5, rtol=1e-4)


def _by_definition(encoder: Encoder, x: torch.Tensor, r: int, prefix: int) -> torch.Tensor:
    """One image through a pre-norm encoder, with lists of members in place of tensors of sizes (arXiv 2210.09461)."""
    groups = [[i] for i in range(len(x))]
    first = len(x)
    for block in encoder.blocks:
        attention, heads = block.attention, block.attention.heads
        q, k, v = attention.qkv(block.norm1(x)).chunk(3, dim=-1)
        per_head = []
        for q_h, k_h, v_h in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
            odds = (q_h @ k_h.T / q_h.shape[-1] ** 0.5).exp() * torch.tensor([len(g) for g in groups])
            per_head.append(odds / odds.sum(-1, keepdim=True) @ v_h)
        x = x + attention.out(torch.cat(per_head, -1))
        mean_key = torch.stack(k.chunk(heads, -1)).mean(0)
        a, b = range(prefix, len(x), 2), range(prefix + 1, len(x), 2)
        edges = []
        for i in a:
            alike, j = max((float(torch.cosine_similarity(mean_key[i], mean_key[j], dim=0)), -j) for j in b)
            edges.append((alike, i, -j))
        goes = {i: j for _, i, j in sorted(edges, reverse=True)[: min(r, (len(x) - prefix) // 2)]}
        rows, joined = [], []
        for own in [*range(prefix), *(i for i in a if i not in goes), *b]:
            members = [own, *(i for i, j in goes.items() if j == own)]
            total = sum(len(groups[i]) for i in members)
            rows.append(sum(x[i] * len(groups[i]) for i in members) / total)
            joined.append([patch for i in members for patch in groups[i]])
        x, groups = torch.stack(rows), joined
        x = x + block.mlp(block.norm2(x))
    home = {patch: place for place, group in enumerate(groups) for patch in group}
    return torch.stack([x[home[patch]] for patch in range(first)])


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_encoder_does_what_the_paper_says(prefix: int) -> None:
    torch.manual_seed(3)
    encoder = Encoder(3, width=14, heads=2, hidden=11).eval()
    encoder.merging, encoder.protected = (3,) * 3, prefix
    x = torch.randn(5, prefix + 13, 14)
    with torch.no_grad():
        expected = torch.stack([_by_definition(encoder, image, 3, prefix) for image in x])
        torch.testing.assert_close(encoder(x), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(list(encoder.each(x))[-1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_merging_equal_tokens_changes_nothing(norm: str) -> None:
    torch.manual_seed(5)
    encoder = Encoder(3, width=14, heads=2, hidden=11, norm=norm).eval()
    x = torch.randn(2, 1 + 7, 14)
    x = torch.cat([x[:, :1], x[:, 1:].repeat_interleave(2, dim=1)], dim=1)  # each patch twice, one in A and one in B
    with torch.no_grad():
        whole = encoder(x)
        encoder.merging, encoder.protected = (7, 0, 0), 1
        assert [crowd.x.shape[1] for crowd in encoder.crowds(x)] == [8, 8, 8]
        torch.testing.assert_close(encoder(x), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"reg_tokens": 2, "positions": "sincos2d"}),
        ("deit_tiny_distilled_patch16_224", {}),
    ],
)
def test_model_promises(name: str, changed: dict) -> None:
    model = _model(name, **changed)
    pixels = torch.randn(3, 3, 40, 40)
    with torch.no_grad():
        whole = model.network(pixels)
        for_none = model.merged(0).network(pixels)
        merged = model.merged(5).network
        some = merged(pixels)
        alone = torch.cat([merged(image[None]) for image in pixels])
        sizes = torch.tensor([[40, 40], [24, 32], [40, 40]])
        unlike = merged(pixels, sizes)
    assert torch.equal(whole, for_none)
    assert torch.equal(whole, model.network(pixels))  # the model itself is as it was
    assert not torch.allclose(whole, some, atol=1e-4)
    torch.testing.assert_close(some, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(unlike[0], some[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(unlike[1], merged(pixels[1:2, :, :24, :32])[0], atol=1e-5, rtol=1e-5)
    assert all(a is b for a, b in zip(model.network.parameters(), merged.parameters(), strict=True))


def test_fewer_operations_and_gradients_for_all() -> None:
    model, pixels, counts = _model(), torch.randn(1, 3, 40, 40), []
    for r in (0, 2, 5, 100):
        network = model.merged(r).network
        with FlopCounterMode(display=False) as counter:
            network(pixels).sum().backward()
        counts.append(counter.get_total_flops())
        assert all(parameter.grad is not None for parameter in network.parameters())
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == len(counts)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "pit_ti_224", "cait_xxs24_224", "resnet50"])
def test_other_families_refuse(name: str) -> None:
    network = sightline.create_model(name)
    with pytest.raises(UserError, match="tokens cannot be merged in a "):
        network.merged(3)
    network.merged(0)


def test_refusals() -> None:
    with pytest.raises(UserError, match="relative positions"):
        _model(positions="relative", position_resample="bicubic").merged(1)
    with pytest.raises(UserError, match="must not be negative, and is -2"):
        _model().merged(-2)
    with pytest.raises(UserError, match="explain the model without merging"):
        _model().merged(2).explain(np.zeros((40, 40, 3), np.uint8))


def test_command(tmp_path) -> None:
    model = _model()
    model.save(tmp_path / "model")
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    files = sorted(tmp_path.glob("*.png"))
    said = cli("predict", tmp_path / "model", *files, "--merge", 4, "--json", "--top", 7)
    assert said.status == 0, said.err
    expected = [answer.score for answer in model.merged(4).predict(files, top=7)]
    found = [row["predictions"][0]["score"] for row in said.document["results"]]
    assert found == pytest.approx(expected, abs=1e-5)
    refused = cli("predict", tmp_path / "model", *files, "--merge", 4, "--runtime", "onnx")
    assert refused.status == 2
    assert "export it without merging" in refused.err
    refused = cli("evaluate", tmp_path / "model", "builtin:digits", "--merge", 4, "--protocol", "knn")
    assert refused.status == 2
    assert "merge is for the protocol accuracy" in refused.err
