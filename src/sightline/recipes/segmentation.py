"""The task that gives every pixel a class."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

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
from sightline.recipes.marked import MarkedTask
from sightline.reports.masks import MasksReport


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


class Segmentation(MarkedTask):
    """Classes of pixels, told apart by cross-entropy over all of them (arXiv 2105.05633)."""

    name = "segment"
    score = "miou"
    report = MasksReport
    small: ClassVar[Mapping[str, Any]] = {"decoder": "linear", "cells": 8}  # edges are finer than patches
    because = "a pixel's class does not depend on which side of the image is left"
    views, fewest = 100_000, 10

    def varied(self, augment: Augment, preprocess: Preprocess) -> _Pixels:
        return _Pixels(MarkedImages(preprocess, augment))

    def prepared(self, preprocess: Preprocess) -> _Pixels:
        return _Pixels(MarkedImages(preprocess))

    def noise(self, images: int, size: tuple[int, int]) -> UInt8[Tensor, "b h w"]:
        return torch.zeros(images, *size, dtype=torch.uint8)

    def measure(self, images: ImageSet, preprocess: Preprocess) -> PixelCounts:
        return PixelCounts(len(images.classes), _Truth(images), preprocess)


TASKS = {"segment": Segmentation()}
