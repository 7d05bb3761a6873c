"""Codebooks that use their words: what asks for it, by hand, and what comes of it on the digits."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sightline.datasets.digits import digits
from sightline.datasets.unlabelled import open_images
from sightline.network import create_model, describe
from sightline.objectives.codebook import Codebook, CodebookConfig, uneven
from sightline.recipes import pretrain as run
from sightline.recipes.ingredients import made
from sightline.recipes.pretraining import PUBLISHED, SMALL, beside, chosen
from sightline.recipes.recipe import Facts
from sightline.training.run import RunFolder
from sightline.types import Batch


def given(pixels: torch.Tensor) -> Batch:
    index = torch.arange(len(pixels))
    return Batch(pixels, index * 0, index, index)


def book(size: tuple[int, int] = (8, 12), seed: int = 0, **settings) -> Codebook:
    torch.manual_seed(seed)
    network = create_model("dvae_small_4_32", 0, size, hidden=8, vocab_size=13)
    return Codebook(network, CodebookConfig(decoder_dim=8, decoder_input=5, **settings))


def test_uneven_by_hand():
    told = uneven(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25] * 4, [0.5, 0.5, 0.0, 0.0]]).clamp(min=1e-12).log())
    torch.testing.assert_close(told, torch.tensor([math.log(4), 0.0, math.log(2)]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("sharp", "same"), [(0.0, True), (200.0, True), (200.0, False)])
def test_even_use_asks_for_the_mean_answer_and_for_nothing_of_a_cell(sharp, same):
    """Six cells of two images: all even, all the same word for certain, and each another word for certain."""
    losses = {}
    for weight in (0.0, 7.0):
        taught = book(kl_weight=0.0, use_weight=weight)
        logits = sharp * F.one_hot(torch.zeros(12).long() if same else torch.arange(12), 13).float()
        logits.requires_grad_()
        tokens = taught.network.backbone(torch.zeros(2, 3, 8, 12))._replace(x=logits.view(2, 6, 13))
        taught.network.backbone.forward = lambda pixels, tokens=tokens: tokens
        torch.manual_seed(3)
        loss = taught(given(torch.full((2, 3, 8, 12), 0.4))).loss
        loss.backward()
        losses[weight] = float(loss.detach())
        assert logits.grad.isfinite().all()
    wanted = math.log(13) - (0.0 if same else math.log(12)) if sharp else 0.0
    assert losses[7.0] - losses[0.0] == pytest.approx(7 * wanted * 6 / (3 * 8 * 12), abs=1e-5)


def test_standardised_codes_begin_with_an_equal_chance():
    pixels = torch.rand(20, 3, 8, 12, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
    plain, taught = book(kl_weight=0.0), book(kl_weight=0.0, standardised=True)
    before = plain.network.backbone(pixels).x
    for one in (plain, taught):
        one.prepare(pixels)
    assert torch.equal(plain.network.backbone(pixels).x, before)
    after = taught.network.backbone(pixels).x
    torch.testing.assert_close(after.mean(dim=(0, 1)), torch.zeros(13), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.std(dim=(0, 1), correction=0), torch.ones(13), atol=1e-4, rtol=0)
    wanted = (before - before.mean(dim=(0, 1))) / before.std(dim=(0, 1), correction=0)
    torch.testing.assert_close(after, wanted, atol=1e-4, rtol=1e-4)


def test_a_codebook_of_one_and_pixels_all_alike_are_no_division_by_zero():
    torch.manual_seed(0)
    network = create_model("dvae_small_4_32", 0, 8, hidden=4, vocab_size=1)
    taught = Codebook(network, CodebookConfig(use_weight=20.0, standardised=True))
    taught.prepare(torch.full((3, 3, 8, 8), 0.1))
    step = taught(given(torch.full((3, 3, 8, 8), 0.1)))
    step.loss.backward()
    assert math.isfinite(float(step.loss.detach()))
    assert float(step.metrics["codebook_perplexity"]) == 1
    assert all(p.grad.isfinite().all() for p in taught.parameters() if p.grad is not None)


def test_a_run_begins_with_logits_that_fit_its_images(tmp_path):
    splits = open_images("builtin:digits", seed=0)
    plan = chosen("small", "codebook", Facts(1000, 0, (8, 8)), None, {})
    network = plan.architecture.build()
    objective = made(plan, network, splits, tmp_path, torch.device("cpu"))
    few = splits.train.select(np.arange(0, len(splits.train), 5))
    seen = torch.stack([plan.preprocess(image) for image in few.samples.arrays])
    with torch.no_grad():
        logits = objective.network.backbone(seen).x.flatten(0, 1)
    assert float(logits.mean(dim=0).abs().max()) < 0.3
    assert float(logits.std(dim=0).min()) > 0.8
    assert float(logits.std(dim=0).max()) < 1.25


def test_the_small_recipe_uses_its_words_and_the_paper_s_loss_does_not():
    """40 updates of 32 digits each: of 128 words, dozens are in use, or a handful."""
    images = np.stack(digits().select(np.arange(640)).samples.arrays)
    pixels = F.interpolate(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, (16, 16), mode="bicubic")
    pixels = pixels.clamp(0, 1) * 0.8 + 0.1
    used = {}
    for name, options in (("small", SMALL["codebook"].options), ("plain", {"kl_weight": 0.0, "decoder_dim": 32})):
        torch.manual_seed(0)
        taught = Codebook(create_model("dvae_small_4_32", 0, 16), CodebookConfig(**options)).train()
        taught.prepare(pixels[::10])
        optimizer = torch.optim.AdamW(taught.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0)
        for update in range(40):
            taught.before_update(update / 40)
            step = taught(given(pixels[update % 20 :: 20]))
            optimizer.zero_grad()
            step.loss.backward()
            torch.nn.utils.clip_grad_norm_(taught.parameters(), 1.0)
            optimizer.step()
        used[name] = float(step.metrics["codebook_perplexity"])
    assert used["small"] > 25, used
    assert used["plain"] < 8, used


def test_a_codebook_has_a_cell_for_each_patch_of_the_network_that_learns_its_words():
    for facts, grid in ((Facts(1000, 0, (8, 8)), (4, 4)), (Facts(1000, 0, (48, 80)), (6, 10))):
        usual = chosen("small", "beit", facts, None, {}).architecture
        assert usual.backbone.image_size != (4 * grid[0], 4 * grid[1])
        codebook = chosen("small", "codebook", facts, None, {})
        assert codebook.architecture.backbone.image_size == codebook.preprocess.size == (4 * grid[0], 4 * grid[1])
        assert beside("codebook", usual) == (4 * grid[0], 4 * grid[1])
    told = chosen("small", "codebook", facts, None, {"image_size": (40, 56)})
    assert told.architecture.backbone.image_size == (40, 56)
    assert beside("codebook", describe("beit_base_patch16_224", 0, (64, 96))) == (16, 24)


@pytest.mark.parametrize("minutes", [None, 6.0])
def test_what_is_learned_first_has_a_third_of_the_minutes_and_the_grid_of_the_network(minutes, tmp_path, monkeypatch):
    told = {}
    monkeypatch.setattr(run, "_finished", lambda folder, what, data, objective, rest: told.update(rest) or what)
    settings = {"minutes": minutes, "seed": 5, "workers": 0}
    plan = chosen("small", "beit", Facts(1000, 0, (8, 8)), None, {"patch_size": (3, 8)})
    found = run._learned_first("builtin:digits", plan, {}, RunFolder(tmp_path), {}, settings)
    assert found == {"codebook": "codebook"}
    assert told == {"seed": 5, "workers": 0, "image_size": (32, 12)} | ({"minutes": 2.0} if minutes else {})
    assert run._learned_first("builtin:digits", plan, {"codebook": "mine"}, RunFolder(tmp_path), {}, settings) == {}


def test_the_paper_s_codebook_has_neither():
    assert (CodebookConfig().use_weight, CodebookConfig().standardised) == (0.0, False)
    assert "codebook" not in PUBLISHED
