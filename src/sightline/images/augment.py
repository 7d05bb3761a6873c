"""Random variation of training images, as plain data; each result is a pure function of an image and a key.

The operations are torchvision's (transforms v2), imported only when training binds them; the resize kernel and the
normalisation are those of the pixel contract, so that training and evaluation cannot drift apart.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from sightline.errors import UserError, printable, suggest
from sightline.images.preprocess import Preprocess

Crop = Literal["resized", "padded", "none"]


@dataclass(frozen=True)
class Augment:
    """How training images vary; the operations happen in the order of the fields, and each is off at its default.

    `crop`: `resized` takes a random part of area `crop_scale` (fractions) and aspect ratio `crop_ratio` (times the
    target's own) and resizes it to the contract's size; `padded` prepares the image as for evaluation, adds `padding`
    black pixels all around and takes a window of the same size; `none` prepares as for evaluation.
    `horizontal_flip`, `vertical_flip`, `erasing` are probabilities. Affine: rotation up to ±`degrees`, translation up
    to ±`translate` (a fraction of each side), `zoom` factors, shear up to ±`shear` degrees. Elastic deformation
    displaces by fields of strength `elastic_alpha`, smoothed with `elastic_sigma` (both in pixels). RandAugment
    (arXiv 1909.13719) draws `randaugment` operations of magnitude `randaugment_magnitude` (0 to 30). Colour jitter
    varies `brightness`, `contrast` and `saturation` by ± a fraction and `hue` by up to 0.5, with probability `jitter`.
    `grey`, `blur` (Gaussian, deviation 0.1 to 2 at 224 pixels and in proportion) and `solarize` (values from 128 on are
    inverted) are probabilities (arXiv 2006.07733, appendix B). Random erasing (arXiv
    1708.04896) sets a rectangle of 2 to 33 % to the mean colour. Raises UserError for a setting out of its range.
    """

    crop: Crop = "none"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    padding: int = 0
    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0
    degrees: float = 0.0
    translate: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    shear: float = 0.0
    elastic_alpha: float = 0.0
    elastic_sigma: float = 2.0
    randaugment: int = 0
    randaugment_magnitude: int = 9
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter: float = 1.0
    grey: float = 0.0
    blur: float = 0.0
    solarize: float = 0.0
    erasing: float = 0.0

    def __post_init__(self) -> None:
        for name in _SETTINGS:
            object.__setattr__(self, name, _settled(name, getattr(self, name)))
        if self.padding and self.crop != "padded":
            raise UserError("augment: padding needs crop='padded'")

    def bind(self, preprocess: Preprocess) -> "Augmented":
        """The augmentation for one pixel contract: (image, key) to normalised pixels.

        The result depends on nothing but image and key, and the process's random state is left as it was; it is drawn
        upon in between, so that two threads must not augment at once. Raises UserError where the settings do not fit
        the contract's size.
        """
        return Augmented(self, preprocess)

    def _crop(self, preprocess: Preprocess) -> Callable[[UInt8[np.ndarray, "h w 3"]], UInt8[Tensor, "3 rows columns"]]:
        if self.crop == "none":
            return preprocess.fit
        from torchvision.transforms import v2

        height, width = preprocess.size
        if self.crop == "padded":
            if preprocess.resize == "native":
                raise UserError("augment: crop='padded' needs a fixed size, and the contract's resize is 'native'")
            window = _single(v2.RandomCrop((height, width), padding=self.padding))
            return lambda image: window(preprocess.fit(image))
        ratio = self.crop_ratio[0] * width / height, self.crop_ratio[1] * width / height
        part = v2.RandomResizedCrop((height, width), scale=self.crop_scale, ratio=ratio)

        def resized(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[Tensor, "3 rows columns"]:
            drawn = part.make_params([torch.empty(3, *image.shape[:2], device="meta")])
            rows = slice(drawn["top"], drawn["top"] + drawn["height"])
            columns = slice(drawn["left"], drawn["left"] + drawn["width"])
            return preprocess.resample(
                np.ascontiguousarray(image[rows, columns]), (height, width), (0, 0, height, width)
            )

        return resized

    def _operations(
        self, preprocess: Preprocess
    ) -> list[Callable[[UInt8[Tensor, "3 rows columns"]], UInt8[Tensor, "3 rows columns"]]]:
        from torchvision.transforms import v2

        bilinear = v2.InterpolationMode.BILINEAR
        operations: list[Callable[[Tensor], Tensor]] = []
        for probability, axis in ((self.horizontal_flip, 2), (self.vertical_flip, 1)):
            if probability:
                operations.append(_flip(probability, axis))
        if self.degrees or self.translate or self.zoom != (1, 1) or self.shear:
            # Without a fill colour torchvision pads with zeros and saves a second interpolation, of the fill's mask.
            turn, shift = (-self.degrees, self.degrees), (self.translate, self.translate)
            affine = v2.RandomAffine(turn, shift, self.zoom, self.shear, interpolation=bilinear, fill=None)
            operations.append(_single(affine))
        if self.elastic_alpha:
            if 4 * self.elastic_sigma >= min(preprocess.size):
                raise UserError(f"augment: elastic_sigma has to be below a quarter of the image size {preprocess.size}")
            elastic = v2.ElasticTransform(self.elastic_alpha, self.elastic_sigma, interpolation=bilinear)
            operations.append(_single(elastic))
        if self.randaugment:
            operations.append(v2.RandAugment(self.randaugment, self.randaugment_magnitude, interpolation=bilinear))
        if self.brightness or self.contrast or self.saturation or self.hue:
            jitter = _single(v2.ColorJitter(self.brightness, self.contrast, self.saturation, self.hue))
            operations.append(jitter if self.jitter == 1 else _sometimes(self.jitter, jitter))
        if self.grey:
            operations.append(_sometimes(self.grey, v2.Grayscale(3)))
        if self.blur:
            side = min(preprocess.size) / 224
            kernel = max(2 * round(4 * side) + 1, 3)
            deviations = max(0.1 * side, 0.05), max(2.0 * side, 0.1)
            operations.append(_sometimes(self.blur, _single(v2.GaussianBlur(kernel, deviations))))
        if self.solarize:
            operations.append(_sometimes(self.solarize, _solarized))
        return operations

    def to_json(self) -> dict[str, Any]:
        """All settings as JSON values; `from_json` reads them back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> "Augment":
        """Settings from JSON values; what is left out keeps its default. Raises UserError for an unknown key."""
        for key in settings:
            if key not in _SETTINGS:
                raise UserError(f"augment has an unknown setting '{printable(key)}'.{suggest(str(key), _SETTINGS)}")
        return cls(**{name: _settled(name, value) for name, value in settings.items()})


class Augmented:
    """An augmentation bound to a pixel contract: (image, key) to normalised pixels. It can be sent to processes."""

    def __init__(self, augment: Augment, preprocess: Preprocess):
        self.augment, self.preprocess = augment, preprocess
        self._prepare = augment._crop(preprocess)
        self._vary = augment._operations(preprocess)
        self._erase = _eraser(augment.erasing)

    def __call__(self, image: UInt8[np.ndarray, "h w 3"], key: int) -> Float[Tensor, "3 rows columns"]:
        """Pixels [3, height, width] at the contract's size."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key)
            pixels = self._prepare(image)
            for operation in self._vary:
                pixels = operation(pixels)
            return self._erase(self.preprocess.normalise(pixels))

    def __reduce__(self) -> tuple[type, tuple[Augment, Preprocess]]:
        return Augmented, (self.augment, self.preprocess)


def sample_key(seed: int, epoch: int, index: int) -> int:
    """A number from 0 to 2⁶³-1 for one sample of one epoch, the same on every platform."""
    return int(sample_keys(seed, epoch, np.array([index]))[0])


def sample_keys(seed: int, epoch: int, indices: np.ndarray) -> Int64[np.ndarray, " n"]:
    """`sample_key` of many samples at once."""
    words = [np.array([number % 2**64], np.uint64) for number in (seed, epoch)]
    state = np.zeros(1, np.uint64)
    for word in (*words, indices.astype(np.int64).view(np.uint64)):
        state = _scatter(state ^ word)
    return (state >> np.uint64(1)).astype(np.int64)


def _scatter(state: np.ndarray) -> np.ndarray:
    """One step of SplitMix64 (Steele, Lea and Flood, 2014): a bijection that spreads each bit over all."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _single(transform: Any) -> Callable[[Tensor], Tensor]:
    """A transform applied to one tensor, without the search for images in nested inputs, which is slow."""
    return lambda image: transform.transform(image, transform.make_params([image]))


def _sometimes(probability: float, operation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda image: operation(image) if torch.rand(()) < probability else image


def _solarized(image: Tensor) -> Tensor:
    return torch.where(image < 128, image, 255 - image)


def _flip(probability: float, axis: int) -> Callable[[Tensor], Tensor]:
    return lambda image: image.flip(axis) if torch.rand(()) < probability else image


def _eraser(probability: float) -> Callable[[Tensor], Tensor]:
    if not probability:
        return lambda image: image
    from torchvision.transforms import v2

    return v2.RandomErasing(probability)  # zero after normalisation is the mean colour


def _range(least: int | float, most: int | float) -> tuple[Callable[[Any], Any], str]:
    def read(value: Any) -> float | None:
        known = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
        return float(value) if known and math.isfinite(value) else None

    return read, f"a number from {least:g} to {most:g}"


def _interval(least: int | float, most: int | float) -> tuple[Callable[[Any], Any], str]:
    number, expected = _range(least, most)

    def read(value: Any) -> tuple[float, float] | None:
        ends = [number(v) for v in value] if isinstance(value, list | tuple) and len(value) == 2 else [None]
        return (ends[0], ends[1]) if None not in ends and ends[0] <= ends[1] else None

    return read, f"two rising numbers, each {expected}"


def _count(most: int) -> tuple[Callable[[Any], Any], str]:
    def read(value: Any) -> int | None:
        return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most else None

    return read, f"a whole number from 0 to {most}"


# How each setting is read, from Python as from JSON (None: refused), and what the refusal says that it has to be.
_SETTINGS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "crop": (lambda value: value if value in get_args(Crop) else None, f"one of {', '.join(get_args(Crop))}"),
    "crop_scale": _interval(1e-6, 1),
    "crop_ratio": _interval(0.01, 100),
    "padding": _count(1024),
    "horizontal_flip": _range(0, 1),
    "vertical_flip": _range(0, 1),
    "degrees": _range(0, 180),
    "translate": _range(0, 1),
    "zoom": _interval(0.01, 100),
    "shear": _range(0, 89),
    "elastic_alpha": _range(0, 10_000),
    "elastic_sigma": _range(0.01, 10_000),
    "randaugment": _count(100),
    "randaugment_magnitude": _count(30),
    "brightness": _range(0, 1),
    "contrast": _range(0, 1),
    "saturation": _range(0, 1),
    "hue": _range(0, 0.5),
    "jitter": _range(0, 1),
    "grey": _range(0, 1),
    "blur": _range(0, 1),
    "solarize": _range(0, 1),
    "erasing": _range(0, 1),
}


def _settled(name: str, value: object) -> Any:
    read, expected = _SETTINGS[name]
    settled = read(value)
    if settled is None:
        raise UserError(f"augment: {name} has to be {expected}, not {printable(value)}")
    return settled
