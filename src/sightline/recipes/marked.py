"""What tasks have in common whose targets lie inside the image: the whole of it is read, and little of it varied."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from sightline.images.augment import Augment
from sightline.images.preprocess import Preprocess
from sightline.network import describe
from sightline.recipes.recipe import Facts, Recipe
from sightline.recipes.task import Task
from sightline.training.settings import Settings

LARGEST = 128
"""Pixels along the side of a square: larger images are reduced when a small network learns from nothing."""

PATCH = 8
"""Pixels along the side of its patches."""


class MarkedTask(Task):
    """A task that finds something in an image, and not one answer for all of it.

    `small` are the settings of the head of the network that learns from nothing, `because` why they are so; it gets to
    see `views` training images, repetitions counted, in `fewest` epochs at least. `tuned` are settings of a run that
    starts from weights, besides those that every such task has.
    """

    small: ClassVar[Mapping[str, Any]]
    because: ClassVar[str]
    views: ClassVar[int]
    fewest: ClassVar[int]
    tuned: ClassVar[Mapping[str, Any]] = {}

    def adapted(self, recipe: Recipe) -> Recipe:
        """Whole images, or parts of them with at least half of the area: what is cut off would have to be guessed."""
        plain = {**recipe.preprocess.to_json(), "resize": "squash", "crop_pct": 1.0, "resize_size": None}
        return replace(
            recipe,
            preprocess=Preprocess.from_json(plain),
            augment=replace(recipe.augment, crop_scale=(0.5, 1.0), vertical_flip=0.0),
            settings=replace(recipe.settings, mixup=0.0, cutmix=0.0, smoothing=0.0, **self.tuned),
        )

    def from_scratch(
        self,
        facts: Facts,
        *,
        model: str | None = None,
        minutes: float | None = None,
        pace: Callable[[Recipe], float] | None = None,
        **overrides: Any,
    ) -> Recipe:
        """A small Vision Transformer on patches read by convolutions, with the head that `small` describes."""
        height, width = facts.size if facts.alike else (facts.side, facts.side)
        scale = min(LARGEST / math.sqrt(height * width), 1.0)
        size = tuple(max(round(side * scale / PATCH), 1) * PATCH for side in (height, width))
        if model is None:
            settings: dict[str, Any] = {"image_size": size, "patch_size": PATCH, "tokenizer": "convolution"}
            settings |= {"embed_dim": 64, "depth": 4, "num_heads": 4, **self.small}
            model = "vit_nano_patch4_32"
            read = f"read at {size[0]}×{size[1]}, in patches of {PATCH}×{PATCH}"
            why = f"images of {facts.size[0]}×{facts.size[1]} pixels are {read}"
        else:
            settings, why = {}, f"{model} was asked for"
        architecture = describe(model, facts.classes, task=self.name, **{**settings, **overrides})
        return Recipe(
            "from-scratch",
            architecture,
            Preprocess(size=architecture.backbone.image_size, resize="squash"),
            Augment(horizontal_flip=0.5, brightness=0.1, contrast=0.1),
            Settings(
                epochs=min(max(round(self.views / facts.images), self.fewest), 300),
                batch_size=min(16, max(facts.images // 4, 8)) // 2 * 2,
                optimizer="muon",
                lr=2e-3,
                beta2=0.99,
                weight_decay=0.05,
                warmup=0.07,
                min_lr=0.01,
                evaluations=10,
            ),
            (why, self.because),
        )
