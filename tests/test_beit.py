"""BEiT: relative positions stretched its way, keys without a bias, a token for hidden patches."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
)

from parity import spread
from parity.beit import unilm_resize
from sightline.checkpoints.convert import convert
from sightline.checkpoints.load import load_bundle
from sightline.errors import UserError
from sightline.layers.attention import Attention
from sightline.layers.positions import resample_relative
from sightline.network import create_model
from vit_references import LITTLE_HUB, pixels_of

GOLDEN = Path(__file__).parent / "data" / "goldens" / "beit-relative-positions"
LITTLE = {"image_size": (16, 24), "patch_size": 8, "embed_dim": 6, "depth": 2, "num_heads": 2}


def test_the_original_s_own_tables() -> None:
    case, io = json.loads((GOLDEN / "case.json").read_text()), load_file(GOLDEN / "io.safetensors")
    for old, new in case["configuration"]["grids"]:
        ours = resample_relative(io[f"input.{old}_to_{new}"], (old, old), (new, new), "geometric")
        theirs = io[f"output.{old}_to_{new}"]
        assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5


@pytest.mark.parametrize(("old", "new"), [((4, 7), (6, 9)), ((7, 3), (4, 11)), ((3, 14), (20, 5)), ((3, 5), (3, 8))])
def test_the_spline_is_scipy_s(old: tuple[int, int], new: tuple[int, int]) -> None:
    table = torch.randn((2 * old[0] - 1) * (2 * old[1] - 1) + 3, 3)
    theirs = unilm_resize(table, old, new)
    torch.testing.assert_close(resample_relative(table, old, new, "geometric"), theirs, atol=1e-5, rtol=1e-5)


def test_a_single_row_of_patches_has_one_offset_for_every_row() -> None:
    table = torch.randn(5 + 3, 2)
    first, second, third, prefix = resample_relative(table, (1, 3), (2, 3), "geometric").split([5, 5, 5, 3])
    assert torch.equal(first, second)
    assert torch.equal(second, third)
    assert torch.equal(prefix, table[5:])
    torch.testing.assert_close(first[2], table[2])


@pytest.mark.parametrize("method", ["geometric", "geometric_linear"])
def test_stretching_keeps_the_middle_and_what_is_even(method: str) -> None:
    plane = torch.randn(9, 11)
    plane = plane + plane.flip(0, 1)
    table = torch.cat([plane.reshape(-1, 1), torch.tensor([[1.0], [2.0], [3.0]])])
    stretched = resample_relative(table, (5, 6), (8, 7), method)
    new = stretched[:-3].reshape(15, 13)
    torch.testing.assert_close(new[7, 6], plane[4, 5])
    torch.testing.assert_close(new, new.flip(0, 1), atol=1e-5, rtol=1e-5)
    assert torch.equal(stretched[-3:], table[-3:])


def test_keys_have_no_bias_and_need_none() -> None:
    bare, full = Attention(6, 2, key_bias=False), Attention(6, 2)
    with torch.no_grad():
        nn.init.normal_(bare.q_bias)
        nn.init.normal_(bare.v_bias)
        full.qkv.weight.copy_(bare.qkv.weight)
        full.qkv.bias.copy_(torch.cat([bare.q_bias, torch.randn(6), bare.v_bias]))  # any bias of the keys
        full.out.load_state_dict(bare.out.state_dict())
    x, y = torch.randn(2, 5, 6), torch.randn(2, 4, 6)
    torch.testing.assert_close(bare(x), full(x))
    torch.testing.assert_close(bare(x, y), full(x, y))
    torch.testing.assert_close(bare.weights(x), full.weights(x))
    assert not [name for name, _ in bare.named_parameters() if "k_bias" in name]


def test_one_table_is_what_equal_tables_are() -> None:
    each = create_model("beit_base_patch16_224", 3, **LITTLE)
    for parameter in each.parameters():
        nn.init.normal_(parameter, std=0.5)
    for one, other in pairwise(each.backbone.relative):
        other.load_state_dict(one.state_dict())
    shared = create_model("beit_base_patch16_224", 3, positions="relative_shared", **LITTLE)
    shared.load_state_dict({n: t for n, t in each.state_dict().items() if not n.startswith("backbone.relative.1")})
    pixels, sizes = torch.randn(2, 3, 24, 32), torch.tensor([[24, 16], [8, 32]])
    torch.testing.assert_close(shared.eval()(pixels), each.eval()(pixels))
    torch.testing.assert_close(shared(pixels, sizes), each(pixels, sizes))
    assert shared.backbone.layer_of("relative.0.table") == each.backbone.depth + 1
    assert each.backbone.layer_of("relative.1.table") == 2


def test_hidden_patches_are_the_mask_token_before_they_get_positions() -> None:
    network = create_model("vit_tiny_patch16_224", 0, mask_token=True, **LITTLE).eval()
    pixels, mask = torch.randn(2, 3, 16, 24), torch.tensor([[True, False] * 3, [False] * 6])
    tokens, _ = network.backbone.embed(pixels, mask=mask)
    seen, _ = network.backbone.embed(pixels)
    place = network.backbone.place
    masked = place.mask_token[0] + place.positions.table[0, 1:]
    torch.testing.assert_close(tokens.patches[0, ::2], masked[::2])
    torch.testing.assert_close(tokens.patches[0, 1::2], seen.patches[0, 1::2])
    torch.testing.assert_close(tokens.x[1], seen.x[1])
    assert torch.equal(network.backbone(pixels, mask=torch.zeros_like(mask)).x, network.backbone(pixels).x)


def _pretrained(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of transformers' pre-training network under microsoft/unilm's names, with an index and a head."""
    found: dict[str, Tensor] = {"rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.int64)}
    names = {
        "beit.embeddings.cls_token": "cls_token",
        "beit.embeddings.mask_token": "mask_token",
        "beit.embeddings.patch_embeddings.projection": "patch_embed.proj",
        "beit.shared_position_bias": "rel_pos_bias",
        "layernorm.": "norm.",
        "lm_head": "lm_head",
        "beit.layers": "blocks",
    }
    inside = {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.q_proj.bias": "attn.q_bias",
        "attention.v_proj.bias": "attn.v_bias",
        "attention.o_proj": "attn.proj",
        "lambda_": "gamma_",
    }
    state = model.state_dict()
    for name, tensor in state.items():
        theirs, ours = next(pair for pair in names.items() if name.startswith(pair[0]))
        new = name.replace(theirs, ours, 1)
        for before, after in inside.items():
            new = new.replace(before, after)
        found[new] = tensor
    for i in range(2):
        parts = [found.pop(f"blocks.{i}.attention.{part}_proj.weight") for part in "qkv"]
        found[f"blocks.{i}.attn.qkv.weight"] = torch.cat(parts)
    return found


@pytest.mark.parametrize("layout", ["transformers", "original"])
def test_a_pre_trained_network_is_read_without_its_last_layer(tmp_path: Path, layout: str) -> None:
    settings = {"use_shared_relative_position_bias": True, "use_mask_token": True, "vocab_size": 11}
    config = BeitConfig(**LITTLE_HUB, **settings, intermediate_size=40, layer_norm_eps=1e-6)
    model = spread(BeitForMaskedImageModeling(config))
    if layout == "transformers":
        model.save_pretrained(tmp_path)
        bundle = load_bundle(tmp_path)
    else:
        torch.save({"model": _pretrained(model)}, tmp_path / "beit.pth")
        bundle = load_bundle(tmp_path / "beit.pth", num_heads=3)
    assert set(bundle.coverage.dropped) >= {"lm_head.weight", "lm_head.bias"}
    mask = torch.rand(2, 16) < 0.4
    with torch.no_grad():
        ours = bundle.network.backbone(pixels_of((32, 32)), mask=mask)
        expected = model(pixels_of((32, 32)), bool_masked_pos=mask).logits
        logits = nn.functional.linear(ours.patches, model.lm_head.weight, model.lm_head.bias)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)


def test_stretching_that_belongs_to_relative_positions_is_refused_elsewhere() -> None:
    with pytest.raises(UserError, match="position_resample 'geometric' is not one of"):
        create_model("vit_tiny_patch16_224", position_resample="geometric")


OBLONG = [
    (BeitForImageClassification, BeitConfig, {"use_relative_position_bias": True, "intermediate_size": 40}, [32, 56]),
    (BeitForImageClassification, BeitConfig, {"use_shared_relative_position_bias": True}, [40, 24]),
    (Dinov2ForImageClassification, Dinov2Config, {}, [72, 32]),
    (Dinov2WithRegistersForImageClassification, Dinov2WithRegistersConfig, {}, [16, 64]),
]


@pytest.mark.parametrize(("kind", "config", "settings", "size"), OBLONG)
def test_a_table_that_transformers_takes_for_another_grid_s_is_kept_as_it_is(kind, config, settings, size, tmp_path):
    model = spread(kind(config(**{**LITTLE_HUB, "image_size": size}, **settings)))
    model.save_pretrained(tmp_path / "in")
    bundle = load_bundle(tmp_path / "in")
    assert convert(bundle, "transformers", tmp_path / "out").parity <= 1e-5
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    larger = (size[0] + 16, size[1] + 8)
    pixels = pixels_of(larger)
    with torch.no_grad():
        ours = load_bundle(tmp_path / "in", image_size=larger).network(pixels)
        torch.testing.assert_close(ours, model(pixels).logits, atol=1e-5, rtol=1e-5)
    network = bundle.network
    exported = torch.export.export(network, (pixels_of(tuple(size)),)).module()
    torch.testing.assert_close(exported(pixels_of(tuple(size))), network(pixels_of(tuple(size))), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match=r"position_grid|unequal|only"):
        convert(bundle, "timm", tmp_path / "timm")
