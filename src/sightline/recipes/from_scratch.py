"""Learning from the user's images alone, with random weights at first."""

import math
from collections.abc import Callable
from typing import Any

from sightline.images.augment import Augment
from sightline.images.preprocess import Preprocess
from sightline.network import Architecture, count_parameters, describe
from sightline.recipes.recipe import SHOWN, Facts, Recipe, evaluations
from sightline.training.settings import Settings

VIEWS, PLAIN_VIEWS = 60_000, 100_000
"""Training images, repetitions counted, that a small network gets to see where no time is given; with plain patches."""

CELLS, PATCHES = 6.7, (2, 4, 6, 8, 12, 16, 24, 32)
"""Patches along the side of a square image, or about so many, and their sides in pixels, for which a few small strides
suffice."""

LARGEST, SMALLEST = 96, 24
"""Pixels along the side of a square: larger images are reduced, for their size costs much and teaches a small network
little; smaller ones are enlarged, for a picture of 8×8 pixels loses its strokes when it is turned."""

SMALL = 2_000_000
"""Parameters below which a network bears the higher learning rate."""

SIZES = {
    "vit_femto_patch4_32": (0, 0),
    "vit_pico_patch4_32": (40, 40_000),
    "vit_nano_patch4_32": (60, 400_000),
}
"""The networks to choose from, in growing order, and what there has to be time for: so many epochs, and so many images,
repetitions counted."""


def from_scratch(
    facts: Facts,
    *,
    model: str | None = None,
    minutes: float | None = None,
    pace: Callable[[Recipe], float] | None = None,
    finest: int = 2,
    **overrides: Any,
) -> Recipe:
    """A Vision Transformer that fits the number and size of the images, taught from random weights.

    Its patches are read by a few small convolutions, and all kernels are taught by Muon: of what was tried, these two
    together learn most from few images in little time (docs/log.md). `pace` tells the seconds that an update of a
    recipe takes here; with it and `minutes`, the largest network is taken that still sees its images often enough. A
    patch has `finest` pixels of the image along its side, at least: images that were enlarged say no more than before.
    """
    if model is not None:
        asked = describe(model, facts.classes, **overrides)
        return teaching(facts, asked, [f"{model} was asked for"], minutes)
    small, medium, large = (teaching(facts, *_fitting(facts, name, overrides, finest), minutes) for name in SIZES)
    if minutes is None or pace is None:
        return medium if facts.images < 5_000 else large
    chosen = small
    for candidate, (epochs, views) in zip((medium, large), list(SIZES.values())[1:], strict=True):
        possible = 60 * minutes / pace(candidate) * candidate.settings.batch_size
        if possible < max(views, epochs * facts.images):
            break
        chosen = candidate
    return chosen


def teaching(facts: Facts, architecture: Architecture, why: list[str], minutes: float | None) -> Recipe:
    """How a small network is taught, for so many minutes or as long as it needs; `why` it is this one."""
    plain = (
        getattr(architecture.backbone, "tokenizer", None) == "patch"
    )  # for which AdamW is what was found to do (docs/log.md)
    small = count_parameters(architecture.lay_out()) < SMALL
    epochs = min(max(round((PLAIN_VIEWS if plain else VIEWS) / facts.images), 12), 300)
    length = [] if minutes else [f"{epochs} {SHOWN} {epochs * facts.images:,} images"]
    return Recipe(
        "from-scratch",
        architecture,
        Preprocess(size=architecture.backbone.image_size, resize="squash" if facts.alike else "crop"),
        Augment(
            degrees=10.0,
            translate=0.06,
            zoom=(0.9, 1.1),
            shear=5.0,
            horizontal_flip=facts.mirroring.horizontal / 2,
            vertical_flip=facts.mirroring.vertical / 2,
        ),
        Settings(
            epochs=epochs,
            batch_size=min(32 if facts.images < 5_000 and not plain else 64, max(facts.images // 4, 8)) // 2 * 2,
            optimizer="adamw" if plain else "muon",
            lr=(3e-3 if plain else 2e-3) if small else 1e-3,
            beta2=0.999 if plain else 0.99,
            weight_decay=0.05,
            warmup=0.07,
            min_lr=0.01,
            smoothing=0.1,
            mixup=0.15,
            evaluations=evaluations(minutes),
        ),
        (*why, *length, facts.mirroring.why),
    )


def _fitting(facts: Facts, name: str, overrides: dict[str, Any], finest: int) -> tuple[Architecture, list[str]]:
    """A network for the shape of the images, and why it is so."""
    asked = overrides.get("image_size")
    height, width = resolution(facts) if asked is None else (asked, asked) if isinstance(asked, int) else asked
    enlarged = math.sqrt(height * width / math.prod(facts.size))
    pixel = max(round(enlarged), 1)  # which a patch has whole, where that can be
    large = [side for side in sorted({pixel, *PATCHES}) if side >= finest * enlarged] or PATCHES[-1:]
    sides = [side for side in large if side % pixel == 0] or large
    patch = min(sides, key=lambda side: abs(math.log(math.sqrt(height * width) / side / CELLS)))
    if asked is None:
        height, width = (max(round(side / patch), 1) * patch for side in (height, width))
    fitting: dict[str, Any] = {"patch_size": patch, "tokenizer": "convolution"} | overrides
    fitting["image_size"] = (height, width)
    architecture = describe(name, facts.classes, **fitting)
    grid = "×".join(str(-(-n // p)) for n, p in zip((height, width), architecture.backbone.patch_size, strict=True))
    return architecture, [
        f"{facts.images:,} images are few for a Vision Transformer, so the network is small"
        + (", reads its patches by convolutions and is taught by Muon" if fitting["tokenizer"] != "patch" else ""),
        f"images of {facts.size[0]}×{facts.size[1]} pixels read at {height}×{width} make a grid of {grid} patches",
    ]


def resolution(facts: Facts) -> tuple[int, int]:
    """Input size (height, width) in pixels: of the images' own shape where they agree on one."""
    height, width = facts.size if facts.alike else (facts.side, facts.side)
    height, width = min(height, 4 * width), min(width, 4 * height)  # a grid of one row would see little of a panorama
    side = min(height, width)
    scale = math.ceil(SMALLEST / side) if side < SMALLEST else min(LARGEST / math.sqrt(height * width), 1.0)
    return round(height * scale), round(width * scale)
