"""The task that gives every pixel a class."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sightline.datasets.image_set import ImageSet
from sightline.datasets.loader import Joint, Picture
from sightline.datasets.marks import Masked
from sightline.evaluation.segmentation import Masks, PixelCounts
from sightline.heads.segment import IGNORE
from sightline.images.augment import Augment
from sightline.images.decode import decode, image_size
from sightline.images.marked import MarkedImages
from sightline.images.preprocess import Preprocess
from sightline.network import describe
from sightline.recipes.recipe import Facts, Recipe
from sightline.recipes.task import Task
from sightline.reports.masks import MasksReport
from sightline.training.settings import Settings

LARGEST = 128
"""Pixels along the side of a square: larger images are reduced when a small network learns from nothing."""


VIEWS = 100_000
"""Training images, repetitions counted, that a small network gets to see where no time is given."""


class _Pixels(Joint):
    """An image and its mask as a network reads them."""

    def __init__(self, read: MarkedImages):
        self.read = read

    def __call__(
        self, image: Picture, marks: Masked, key: int
    ) -> tuple[Float[Tensor, "3 rows columns"], UInt8[Tensor, "rows columns"]]:
        picture = image if isinstance(image, np.ndarray) else decode(image)
        mask = marks.mask(picture.shape[0], picture.shape[1])
        seen = self.read(picture, np.zeros((0, 4), dtype=np.float32), mask, key)
        assert seen.mask is not None
        return seen.pixels, seen.mask

    def together(self, targets: Sequence[UInt8[Tensor, "_ _"]]) -> UInt8[Tensor, "b rows columns"]:
        height, width = (max(mask.shape[axis] for mask in targets) for axis in (0, 1))
        batch = torch.full((len(targets), height, width), IGNORE, dtype=torch.uint8)
        for row, mask in zip(batch, targets, strict=True):
            row[: mask.shape[0], : mask.shape[1]] = mask
        return batch


class _Truth(Masks):
    """The masks of an image set."""

    def __init__(self, images: ImageSet):
        self.images = images
        self.numbers: dict[str, int] = {}

    def truth(self, image: int | str) -> UInt8[np.ndarray, "h w"]:
        if isinstance(image, str):
            self.numbers = self.numbers or {name: i for i, name in enumerate(self.images.samples.names)}
            image = self.numbers[image]
        sample = self.images.samples[image]
        return sample.target.mask(*image_size(sample.image))


class Segmentation(Task):
    """Classes of pixels, told apart by cross-entropy over all of them (arXiv 2105.05633)."""

    name = "segment"
    score = "miou"
    report = MasksReport

    def varied(self, augment: Augment, preprocess: Preprocess) -> _Pixels:
        return _Pixels(MarkedImages(preprocess, augment))

    def prepared(self, preprocess: Preprocess) -> _Pixels:
        return _Pixels(MarkedImages(preprocess))

    def noise(self, images: int, size: tuple[int, int]) -> UInt8[Tensor, "b h w"]:
        return torch.zeros(images, *size, dtype=torch.uint8)

    def measure(self, images: ImageSet, preprocess: Preprocess) -> PixelCounts:
        return PixelCounts(len(images.classes), _Truth(images), preprocess)

    def adapted(self, recipe: Recipe) -> Recipe:
        """Whole images, turned over at random: what is cut off would have to be guessed."""
        return replace(
            recipe,
            preprocess=_whole(recipe.preprocess),
            augment=replace(recipe.augment, crop_scale=(0.5, 1.0), vertical_flip=0.0),
            settings=replace(recipe.settings, mixup=0.0, cutmix=0.0, smoothing=0.0),
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
        """A small Vision Transformer whose patches tell small cells apart, so that edges are finer than patches."""
        height, width = facts.size if facts.alike else (facts.side, facts.side)
        scale = min(LARGEST / math.sqrt(height * width), 1.0)
        size = tuple(max(round(side * scale / 8), 1) * 8 for side in (height, width))
        if model is None:
            settings: dict[str, Any] = {"image_size": size, "patch_size": 8, "tokenizer": "convolution"}
            settings |= {"embed_dim": 64, "depth": 4, "num_heads": 4, "decoder": "linear", "cells": 8}
            model = "vit_nano_patch4_32"
            why = f"images of {facts.size[0]}×{facts.size[1]} pixels are read at {size[0]}×{size[1]}, in patches of 8×8"
        else:
            settings, why = {}, f"{model} was asked for"
        architecture = describe(model, facts.classes, task=self.name, **{**settings, **overrides})
        epochs = min(max(round(VIEWS / facts.images), 10), 300)
        return Recipe(
            "from-scratch",
            architecture,
            Preprocess(size=architecture.backbone.image_size, resize="squash"),
            Augment(horizontal_flip=0.5, brightness=0.1, contrast=0.1),
            Settings(
                epochs=epochs,
                batch_size=min(16, max(facts.images // 4, 8)) // 2 * 2,
                optimizer="muon",
                lr=2e-3,
                beta2=0.99,
                weight_decay=0.05,
                warmup=0.07,
                min_lr=0.01,
                evaluations=10,
            ),
            (why, "a pixel's class does not depend on which side of the image is left"),
        )


def _whole(preprocess: Preprocess) -> Preprocess:
    """The contract for whole images, whatever their shape."""
    plain = {**preprocess.to_json(), "resize": "squash", "crop_pct": 1.0, "resize_size": None}
    return Preprocess.from_json(plain)


TASKS = {"segment": Segmentation()}
