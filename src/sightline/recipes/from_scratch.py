"""Learning from the user's images alone, with random weights at first."""

from typing import Any

from sightline.images.augment import Augment
from sightline.images.preprocess import Preprocess
from sightline.network import Architecture, count_parameters, describe
from sightline.recipes.recipe import Facts, Recipe
from sightline.training.settings import Settings

VIEWS = 100_000
"""Training images, repetitions counted, that a small network gets to see."""

SMALL = 2_000_000
"""Parameters below which a network bears the higher learning rate."""


def from_scratch(facts: Facts, *, model: str | None = None, **overrides: Any) -> Recipe:
    """A Vision Transformer that fits the number and size of the images, taught from random weights.

    Small images are enlarged rather than cut into patches of one or two pixels; few images get a small network, gentle
    changes of place, size and angle, and no mirroring, which would change the meaning of letters and digits.
    On the 1,437 training images of `builtin:digits`: a minute and a half on two cores, about 99.4 % of the held-out
    digits right (mean of three seeds; docs/log.md has the runs).
    """
    architecture, why = _network(facts, model, overrides)
    epochs = min(max(round(VIEWS / facts.images), 20), 300)
    small = facts.side <= 64
    return Recipe(
        "from-scratch",
        architecture,
        Preprocess(size=architecture.backbone.image_size, resize="squash" if small else "crop"),
        _variation(small),
        Settings(
            epochs=epochs,
            batch_size=min(64, max(facts.images // 8, 2)) // 2 * 2,
            lr=3e-3 if count_parameters(architecture.lay_out()) < SMALL else 1e-3,
            weight_decay=0.05,
            warmup=0.07,
            min_lr=0.01,
            smoothing=0.1,
            mixup=0.15,
        ),
        (
            *why,
            f"{epochs} epochs show it {epochs * facts.images:,} images, and {VIEWS:,} or so are enough",
            "nothing says that mirrored images keep their meaning, so none is mirrored (--horizontal-flip 0.5 does)",
        ),
    )


def _network(facts: Facts, model: str | None, overrides: dict[str, Any]) -> tuple[Architecture, list[str]]:
    if model is not None:
        return describe(model, facts.classes, **overrides), [f"{model} was asked for"]
    name = "vit_pico_patch4_32" if facts.images < 5_000 else "vit_nano_patch4_32"
    size, patch = _resolution(facts.side)
    fitting: dict[str, Any] = {"image_size": size, "patch_size": patch} | overrides
    cells = fitting["image_size"] if isinstance(fitting["image_size"], int) else min(fitting["image_size"])
    why = [
        f"{facts.images:,} images are few for a Vision Transformer, so the network is small",
        f"images of {facts.size[0]}×{facts.size[1]} pixels read at {cells} pixels make a grid of about "
        f"{-(-cells // patch)}×{-(-cells // patch)} patches",
    ]
    return describe(name, facts.classes, **fitting), why


def _resolution(side: int) -> tuple[int, int]:
    """Input size and patch size, in pixels, for images whose shorter side is typically `side`."""
    if side <= 16:
        return 24, 6
    if side <= 64:
        return -(-side // 8) * 8, max(side // 8, 2)
    return 96, 12


def _variation(small: bool) -> Augment:
    if small:
        return Augment(degrees=10.0, translate=0.06, zoom=(0.9, 1.1), shear=5.0)
    return Augment(crop="resized", crop_scale=(0.5, 1.0), brightness=0.2, contrast=0.2, saturation=0.2)
