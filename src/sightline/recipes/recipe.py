"""What a run consists of, as plain data with its reasons."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sightline.datasets.image_set import ImageSet
from sightline.datasets.loader import Picture
from sightline.errors import UserError
from sightline.images.augment import Augment
from sightline.images.decode import ImageError, image_size
from sightline.images.preprocess import Preprocess
from sightline.network import Architecture
from sightline.recipes.mirroring import UNKNOWN, Mirroring, mirroring
from sightline.schema import from_json, require, to_json
from sightline.training.settings import Settings

LOOKED_AT = 256
"""Images whose size is looked at to choose a resolution."""


ALIKE = 1.15
"""Ratio up to which two aspect ratios count as the same."""


SHOWN = "epochs show it"
"""In the reason for a recipe's length, which says how many images that are."""


@dataclass(frozen=True)
class Facts:
    """What a recipe is chosen by.

    How many images and classes; the (height, width) in pixels that half of them exceed, and whether nearly all have
    about that aspect ratio; which reflections they bear.
    """

    images: int
    classes: int
    size: tuple[int, int]
    alike: bool = True
    mirroring: Mirroring = UNKNOWN

    @property
    def side(self) -> int:
        """The shorter side of a typical image, in pixels."""
        return min(self.size)


def facts(images: ImageSet, seed: int, *, reflections: bool = True) -> Facts:
    """The facts of a set: sizes by the headers of an even sample of its images, reflections by a probe where asked."""
    rows = np.unique(np.linspace(0, len(images) - 1, num=min(LOOKED_AT, len(images))).astype(int))
    sizes = [size for i in rows if (size := _size(images.samples[int(i)].image)) is not None]
    if not sizes:
        raise UserError("none of the training images can be read")
    height, width = np.median(np.array(sizes), axis=0)
    ratios = np.array([h / w for h, w in sizes]) / (height / width)
    alike = bool(np.mean((ratios > 1 / ALIKE) & (ratios < ALIKE)) > 0.9)
    mirrored = mirroring(images, seed) if reflections else UNKNOWN
    return Facts(len(images), len(images.classes), (int(height), int(width)), alike, mirrored)


def evaluations(minutes: float | None) -> int:
    """How often a run is evaluated: as `Settings` has it, but rarely where there are only so many minutes."""
    return 20 if minutes is None else min(max(round(4 * minutes), 3), 20)


def _size(image: Picture) -> tuple[int, int] | None:
    try:
        return image_size(image)
    except ImageError:
        return None  # the loader will name it


@dataclass(frozen=True)
class Recipe:
    """A run as plain data: the network, its pixels, how they vary, how it is taught, and why.

    `objective` is a key of `OBJECTIVES`, and `options` are the settings of that objective which differ from its own.
    """

    name: str
    architecture: Architecture
    preprocess: Preprocess
    augment: Augment
    settings: Settings
    reasons: tuple[str, ...] = ()
    objective: str = "supervised"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        mixed = self.settings.mixup > 0 or self.settings.cutmix > 0 or self.augment.crop != "none"
        require(
            self.preprocess.resize != "native" or not mixed,
            "images at their own aspect ratio (native) differ in size: they can neither be mixed (mixup, cutmix) nor "
            "cropped at random (crop)",
        )

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `from_json` reads back."""
        return {
            "name": self.name,
            "architecture": self.architecture.to_json(),
            "preprocess": self.preprocess.to_json(),
            "augment": self.augment.to_json(),
            "settings": to_json(self.settings),
            "reasons": list(self.reasons),
            "objective": self.objective,
            "options": to_json(self.options),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> "Recipe":
        """Reads what `to_json` wrote. Raises UserError naming `where`."""
        try:
            return cls(
                str(data["name"]),
                Architecture.from_json(data["architecture"], f"{where}: architecture"),
                Preprocess.from_json(data["preprocess"]),
                Augment.from_json(data["augment"]),
                from_json(Settings, data["settings"], f"{where}: settings"),
                tuple(data["reasons"]),
                str(data.get("objective", "supervised")),
                dict(data.get("options", {})),
            )
        except (KeyError, TypeError) as fault:
            raise UserError(f"{where}: the recipe lacks {fault}") from fault

    def told(self, settings: Mapping[str, Any], augment: Mapping[str, Any]) -> "Recipe":
        """The recipe with what the user said in place of its own; of another length its reason for its own is gone."""
        changed = from_json(Settings, {**to_json(self.settings), **settings}, "settings")
        length = (changed.epochs, changed.minutes) == (self.settings.epochs, self.settings.minutes)
        reasons = tuple(reason for reason in self.reasons if length or SHOWN not in reason)
        augmented = Augment.from_json({**self.augment.to_json(), **augment})
        return replace(self, settings=changed, augment=augmented, reasons=reasons)

    def resized(self, resize: str | None) -> "Recipe":
        """The recipe with another way to bring images to the network's size; None changes nothing.

        At their own aspect ratio images differ in size, so they are neither cropped at random nor mixed in pairs.
        """
        if resize is None:
            return self
        plain = {**self.preprocess.to_json(), "resize": resize, "crop_pct": 1.0, "resize_size": None}
        if resize != "native":
            return replace(self, preprocess=Preprocess.from_json(plain))
        patch = getattr(self.architecture.backbone, "patch_size", (1, 1))
        return replace(
            self,
            preprocess=Preprocess.from_json({**plain, "multiple": max(patch)}),
            augment=replace(self.augment, crop="none", padding=0),
            settings=replace(self.settings, mixup=0.0, cutmix=0.0),
        )

    def describe(self) -> list[str]:
        """A few lines for whoever starts the run: what was chosen, and why."""
        backbone, s = self.architecture.backbone, self.settings
        size = "×".join(map(str, backbone.image_size))
        amount, unit = (s.epochs, "epoch") if s.minutes is None else (s.minutes, "minute")
        length = f"{amount:g} {unit}{'' if amount == 1 else 's'}"
        return [
            f"recipe '{self.name}': {self.architecture.name} at {size} pixels for {length}, "
            f"batches of {s.batch_size}, {s.optimizer} with learning rate {s.lr:g}, seed {s.seed}",
            *(f"  because {reason}" for reason in self.reasons),
        ]
