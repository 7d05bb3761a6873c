"""Masked autoencoding: the original's numbers, what is saved, and that nothing of what is hidden gets in."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sightline.checkpoints.files import read_tensors
from sightline.checkpoints.load import load_bundle
from sightline.errors import UserError
from sightline.network import create_model
from sightline.objectives.mae import MAE, MAEConfig
from sightline.types import Batch

GOLDEN = Path(__file__).parent / "data" / "goldens" / "mae"
THEIRS = {"embed": "decoder_embed", "norm": "decoder_norm", "pixels": "decoder_pred"}
LAYER = {"attention.qkv": "attn.qkv", "attention.out": "attn.proj", "norm1": "norm1", "norm2": "norm2"}


def original(norm_pix: bool) -> MAE:
    """The golden network and decoder."""
    network = load_bundle(GOLDEN / "checkpoint.pth", num_heads=3).network
    objective = MAE(network, MAEConfig(norm_pix=norm_pix, decoder_dim=28, decoder_depth=1, decoder_heads=2))
    theirs = read_tensors(GOLDEN / "checkpoint.pth").tensors
    state = {"mask_token": theirs["mask_token"], "positions.table": theirs["decoder_pos_embed"]}
    for part in ("weight", "bias"):
        state |= {f"{ours}.{part}": theirs[f"{name}.{part}"] for ours, name in THEIRS.items()}
        for ours, name in (LAYER | {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}).items():
            state[f"encoder.blocks.0.{ours}.{part}"] = theirs[f"decoder_blocks.0.{name}.{part}"]
    objective.decoder.load_state_dict(state)
    return objective


def close(ours: Tensor, theirs: Tensor) -> None:
    assert float((ours.detach() - theirs).abs().max() / theirs.abs().max()) <= 1e-5


@pytest.mark.parametrize(("norm_pix", "name"), [(True, "normalised"), (False, "plain")])
def test_losses_answers_and_gradients_are_the_original_s(norm_pix, name):
    io, objective = load_file(GOLDEN / "io.safetensors"), original(norm_pix)
    objective.requires_grad_(True)
    step, answer = objective.painted(io["input.pixels"], io["input.noise"])
    close(step.loss[None], io[f"output.loss_{name}"])
    close(answer, io["output.prediction"])
    seen = io["input.noise"].argsort(dim=1)[:, :6]
    close(objective.encode(io["input.pixels"], seen), io["output.latent"])
    if norm_pix:
        step.loss.backward()
        gradient = dict(objective.named_parameters())
        close(gradient["decoder.mask_token"].grad, io["output.gradient.mask_token"])
        close(gradient["network.backbone.norm.weight"].grad, io["output.gradient.norm.weight"])
        close(gradient["network.backbone.place.class_token"].grad, io["output.gradient.cls_token"])
        layer = "network.backbone.encoder.blocks.0.attention.qkv.bias"
        close(gradient[layer].grad, io["output.gradient.blocks.0.attn.qkv.bias"])
    else:
        close(objective.target(io["input.pixels"]), io["output.target"])


@pytest.mark.parametrize("positions", ["learned", "relative", "relative_shared"])
def test_the_encoder_sees_the_kept_patches_alone(positions):
    size = {"image_size": (24, 40), "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
    network = create_model("vit_tiny_patch16_224", 0, positions=positions, **size)
    objective = MAE(network, MAEConfig(0.6, decoder_dim=8, decoder_depth=1, decoder_heads=2)).eval()
    pixels, seen = torch.randn(2, 3, 24, 40), torch.tensor([[0, 7, 14, 3], [2, 5, 11, 13]])
    before = objective.encode(pixels, seen)
    assert before.shape == (2, 1 + 4, 12)
    for image, places in enumerate(seen.tolist()):
        for place in set(range(15)) - set(places):
            row, column = divmod(place, 5)
            pixels[image, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 9.0
    torch.testing.assert_close(objective.encode(pixels, seen), before)
    every = torch.arange(15).expand(2, -1)
    torch.testing.assert_close(objective.encode(pixels, every), network.backbone(pixels).x)


def test_the_baseline_is_the_loss_of_an_answer_that_sees_nothing():
    network = create_model("vit_tiny_patch16_224", 0, image_size=32, patch_size=8, embed_dim=12, depth=1, num_heads=3)
    objective = MAE(network, MAEConfig(decoder_dim=8, decoder_depth=1, decoder_heads=2))
    torch.nn.init.zeros_(objective.decoder.pixels.weight)
    images = torch.randn(64, 3, 32, 32)
    step = objective(Batch(images, torch.zeros(64).long(), torch.arange(64), torch.arange(64)))
    assert step.loss.item() == pytest.approx(191 / 192, abs=1e-3)  # the unbiased variance of 192 values is one
    assert float(step.metrics["baseline"]) == pytest.approx(step.loss.item(), rel=0.02)


def test_where_it_cannot_work_it_says_why():
    with pytest.raises(UserError, match="take simmim"):
        MAE(create_model("resnet18", 0))
    with pytest.raises(UserError, match="--tokenizer patch"):
        MAE(create_model("vit_pico_patch4_32", 0, tokenizer="convolution"))
    with pytest.raises(UserError, match="leaves none of 4 patches"):
        MAE(create_model("vit_pico_patch4_32", 0, image_size=8), MAEConfig(0.9))


def test_the_loss_is_that_of_transformers(tmp_path):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 48}
    decoder = {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(image_size=24, patch_size=8, norm_pix_loss=True, decoder_intermediate_size=32, **sizes, **decoder)
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)
    network = load_bundle(tmp_path).network
    objective = MAE(network, MAEConfig(decoder_dim=8, decoder_depth=1, decoder_heads=2)).eval()
    found = {name.removeprefix("decoder."): t for name, t in theirs.state_dict().items() if name.startswith("decoder.")}
    state = {"mask_token": found["mask_token"], "positions.table": found["decoder_pos_embed"]}
    layers = {"attention.out": "attention.o_proj", "norm1": "layernorm_before", "norm2": "layernorm_after"}
    for part in ("weight", "bias"):
        state |= {f"{ours}.{part}": found[f"{name}.{part}"] for ours, name in THEIRS.items()}
        for ours, name in (layers | {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}).items():
            state[f"encoder.blocks.0.{ours}.{part}"] = found[f"decoder_layers.0.{name}.{part}"]
        rows = [found[f"decoder_layers.0.attention.{which}_proj.{part}"] for which in "qkv"]
        state[f"encoder.blocks.0.attention.qkv.{part}"] = torch.cat(rows)
    objective.decoder.load_state_dict(state)
    for norm in objective.decoder.modules():  # transformers has an epsilon of its own in the decoder too
        if isinstance(norm, torch.nn.LayerNorm):
            norm.eps = theirs.config.layer_norm_eps
    pixels, drawn = torch.randn(2, 3, 24, 24), torch.rand(2, 9)
    with torch.no_grad():
        answer = theirs(pixels, noise=drawn)
        step, painted = objective.painted(pixels, drawn)
    close(painted, answer.logits)
    close(step.loss[None], answer.loss[None])
