"""The task that finds objects and their boxes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sightline.datasets.image_set import ImageSet
from sightline.datasets.loader import Joint, Picture
from sightline.datasets.marks import Objects
from sightline.evaluation.detection import Boxes
from sightline.heads.matching import Targets, centred
from sightline.images.augment import Augment
from sightline.images.decode import decode, image_size
from sightline.images.marked import MarkedImages
from sightline.images.preprocess import Preprocess
from sightline.network import describe
from sightline.recipes.recipe import Facts, Recipe
from sightline.recipes.task import Task
from sightline.reports.boxes import BoxesReport
from sightline.training.settings import Settings

LARGEST = 128
"""Pixels along the side of a square: larger images are reduced when a small network learns from nothing."""


VIEWS = 150_000
"""Training images, repetitions counted, that a small network gets to see where no time is given."""


class _Objects(Joint):
    """An image and its objects as a network reads them; crowds are left out."""

    def __init__(self, read: MarkedImages):
        self.read = read

    def __call__(self, image: Picture, marks: Any, key: int) -> tuple[Float[Tensor, "3 rows columns"], Targets]:
        picture = image if isinstance(image, np.ndarray) else decode(image)
        objects = marks.objects
        single = ~objects.crowd
        seen = self.read(picture, objects.boxes[single], None, key)
        height, width = seen.pixels.shape[1:]
        boxes = centred(seen.boxes) / torch.tensor([width, height, width, height])
        return seen.pixels, Targets(torch.from_numpy(objects.labels[single])[seen.kept], boxes)

    def together(self, targets: Sequence[Targets]) -> tuple[Targets, ...]:
        return tuple(targets)


@dataclass(frozen=True)
class _Sized:
    """Objects with the size of their image."""

    size: tuple[int, int]
    objects: Objects

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objects, name)


class _Truth(Sequence[_Sized]):
    """The objects of an image set."""

    def __init__(self, images: ImageSet):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> _Sized:  # ty: ignore[incompatible-method-override]  (no slices)
        sample = self.images.samples[i]
        size = getattr(sample.target, "size", None) or image_size(sample.image)
        return _Sized(size, sample.target.objects)


class Detection(Task):
    """Objects, matched one to one with queries (arXiv 2005.12872)."""

    name = "detect"
    score = "ap"
    report = BoxesReport

    def varied(self, augment: Augment, preprocess: Preprocess) -> _Objects:
        return _Objects(MarkedImages(preprocess, augment))

    def prepared(self, preprocess: Preprocess) -> _Objects:
        return _Objects(MarkedImages(preprocess))

    def noise(self, images: int, size: tuple[int, int]) -> tuple[Targets, ...]:
        box = torch.tensor([[0.5, 0.5, 0.25, 0.25]])
        return tuple(Targets(torch.zeros(1, dtype=torch.int64), box) for _ in range(images))

    def measure(self, images: ImageSet, preprocess: Preprocess) -> Boxes:
        return Boxes(len(images.classes), _Truth(images), images.samples.names, preprocess)

    def adapted(self, recipe: Recipe) -> Recipe:
        """Whole images; parts of them with at least half of the area."""
        plain = {**recipe.preprocess.to_json(), "resize": "squash", "crop_pct": 1.0, "resize_size": None}
        return replace(
            recipe,
            preprocess=Preprocess.from_json(plain),
            augment=replace(recipe.augment, crop_scale=(0.5, 1.0), vertical_flip=0.0),
            settings=replace(recipe.settings, mixup=0.0, cutmix=0.0, smoothing=0.0, clip_grad=0.1, lr=1e-4),
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
        """A small Vision Transformer whose patches are the queries, each with a box where it stands."""
        height, width = facts.size if facts.alike else (facts.side, facts.side)
        scale = min(LARGEST / math.sqrt(height * width), 1.0)
        size = tuple(max(round(side * scale / 8), 1) * 8 for side in (height, width))
        if model is None:
            settings: dict[str, Any] = {"image_size": size, "patch_size": 8, "tokenizer": "convolution"}
            settings |= {"embed_dim": 64, "depth": 4, "num_heads": 4, "queries_from": "patches", "hidden_dim": 64}
            settings |= {"encoder_layers": 0, "decoder_layers": 2, "decoder_heads": 4, "decoder_mlp": 192}
            settings |= {"drop_rate": 0.0, "attn_drop": 0.0, "copies": 4}
            model = "vit_nano_patch4_32"
            why = f"images of {facts.size[0]}×{facts.size[1]} pixels are read at {size[0]}×{size[1]}, in patches of 8×8"
        else:
            settings, why = {}, f"{model} was asked for"
        architecture = describe(model, facts.classes, task=self.name, **{**settings, **overrides})
        epochs = min(max(round(VIEWS / facts.images), 15), 300)
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
            (why, "every patch is a query that begins where it stands, and several answer for an object at first"),
        )


TASKS = {"detect": Detection()}
