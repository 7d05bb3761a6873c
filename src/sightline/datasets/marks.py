"""What is marked in an image: boxes of objects, a class for every pixel."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8

from sightline.datasets.image_set import Marks

IGNORE = 255
"""The class of pixels that are neither learned from nor judged."""


@dataclass(frozen=True, eq=False)
class Objects(Marks):
    """Objects in an image: class indices, boxes (left, top, right, bottom) in pixels of the upright image.

    `crowd` says that a box holds many objects of its class, which are neither learned nor counted singly. `area` is
    that of each object's pixels, by which COCO calls it small, medium or large.
    """

    labels: Int64[np.ndarray, " n"]
    boxes: Float32[np.ndarray, "n 4"]
    crowd: Bool[np.ndarray, " n"]
    area: Float32[np.ndarray, " n"]

    @classmethod
    def of(cls, labels: Sequence[int], boxes: Sequence[Sequence[float]]) -> "Objects":
        """Single objects as large as their boxes."""
        corners = np.array(boxes, dtype=np.float32).reshape(-1, 4)
        area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
        return cls(np.array(labels, dtype=np.int64), corners, np.zeros(len(corners), dtype=bool), area)

    def __len__(self) -> int:
        return len(self.labels)

    def content(self) -> bytes:
        parts = (self.labels, self.boxes, self.crowd, self.area)
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest().encode()

    def renumbered(self, places: Int64[np.ndarray, " k"]) -> "Objects":
        return replace(self, labels=places[self.labels])

    @property
    def objects(self) -> "Objects":
        """Themselves: whatever has objects is asked for them so."""
        return self


class Masked(Marks):
    """An image with a class for every pixel."""

    @abstractmethod
    def mask(self, height: int, width: int) -> UInt8[np.ndarray, "h w"]:
        """Class indices of an upright image of this size, `IGNORE` for none. Raises ImageError where it has none."""


@dataclass(frozen=True, eq=False)
class Scene(Masked):
    """Everything that is known of a drawn scene: objects, back to front, a class for every pixel, and a caption.

    In `pixels` class 0 is the background, and an object of class i has i + 1. `colours` names that of each object.
    """

    objects: Objects
    pixels: UInt8[np.ndarray, "h w"]
    colours: tuple[str, ...]
    caption: str

    @property
    def captions(self) -> tuple[str, ...]:
        """What is said of it, as of images with several captions."""
        return (self.caption,)

    def content(self) -> bytes:
        return self.objects.content() + hashlib.sha256(self.pixels.tobytes() + self.caption.encode()).digest()

    def renumbered(self, places: Int64[np.ndarray, " k"]) -> "Scene":
        raise AssertionError("the classes of scenes have one order")

    def mask(self, height: int, width: int) -> UInt8[np.ndarray, "h w"]:
        assert self.pixels.shape == (height, width)
        return self.pixels
