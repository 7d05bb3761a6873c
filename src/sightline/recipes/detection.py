"""The task that finds objects and their boxes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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
from sightline.recipes.marked import MarkedTask
from sightline.reports.boxes import BoxesReport


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


class Detection(MarkedTask):
    """Objects, matched one to one with queries (arXiv 2005.12872)."""

    name = "detect"
    score = "ap"
    report = BoxesReport
    small: ClassVar[Mapping[str, Any]] = {
        **{"queries_from": "patches", "hidden_dim": 64, "copies": 4, "drop_rate": 0.0, "attn_drop": 0.0},
        **{"encoder_layers": 0, "decoder_layers": 2, "decoder_heads": 4, "decoder_mlp": 192},
    }
    because = "every patch is a query that begins where it stands, and several answer for an object at first"
    views, fewest = 150_000, 15
    tuned: ClassVar[Mapping[str, Any]] = {"clip_grad": 0.1, "lr": 1e-4}

    def varied(self, augment: Augment, preprocess: Preprocess) -> _Objects:
        return _Objects(MarkedImages(preprocess, augment))

    def prepared(self, preprocess: Preprocess) -> _Objects:
        return _Objects(MarkedImages(preprocess))

    def noise(self, images: int, size: tuple[int, int]) -> tuple[Targets, ...]:
        box = torch.tensor([[0.5, 0.5, 0.25, 0.25]])
        return tuple(Targets(torch.zeros(1, dtype=torch.int64), box) for _ in range(images))

    def measure(self, images: ImageSet, preprocess: Preprocess) -> Boxes:
        return Boxes(len(images.classes), _Truth(images), images.samples.names, preprocess)


TASKS = {"detect": Detection()}
