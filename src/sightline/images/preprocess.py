"""The pixel contract: what happens to an image between its file and a model, as plain data with one implementation.

Training-time evaluation, prediction and serving all call `Preprocess`, one image at a time, so that neither the path
nor the other images of a batch can change a pixel. Every mode is the same two steps: resize to an intermediate size,
then cut or fill to the final one around the centre.
"""

import hashlib
import json
import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from sightline.errors import UserError, printable, suggest
from sightline.images.decode import Limits, Source, decode, decode_sized
from sightline.types import Placement

Resize = Literal["squash", "crop", "pad", "native"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Kernel = Literal["torch", "pillow"]
Colour = tuple[float, float, float]

CONTRACT = 1  # grows when the same settings come to mean other pixels; part of every fingerprint
IMAGENET_MEAN: Colour = (0.485, 0.456, 0.406)
IMAGENET_STD: Colour = (0.229, 0.224, 0.225)

# Pillow's nearest neighbour is the one that torch calls exact; torch's own "nearest" is off by half a pixel.
_TORCH_MODE = {"nearest": "nearest-exact", "bilinear": "bilinear", "bicubic": "bicubic"}
_PILLOW_MODE = {name: Image.Resampling[name.upper()] for name in get_args(Interpolation)}


@dataclass(frozen=True)
class Preprocess:
    """The pixel contract of one model; sizes are (height, width) in pixels, colours red, green, blue.

    `resize` says how an image comes to `size`:
    `squash` resizes straight to the intermediate size, whatever the aspect ratio, then crops the centre;
    `crop` keeps the aspect ratio and covers the intermediate size, then crops the centre;
    `pad` keeps the aspect ratio and fits inside the intermediate size, then fills up around the centre;
    `native` keeps the aspect ratio and takes the largest size whose sides are whole multiples of `multiple` (rounded
    up, so at most the last patch is stretched) and whose area does not exceed that of `size`.

    The intermediate size is `resize_size` where given, otherwise `size / crop_pct` rounded down. In mode `crop` a
    single number (or a square) is the length of the shorter side, the other one rounded down; an oblong is covered, to
    the nearest pixel. `crop_offset` rounds the corner of a crop that cannot be centred exactly: to the even pixel
    (`round`, as timm and torchvision) or down (`floor`, as transformers). `fill` (0 to 255) colours what the image
    does not cover. `kernel` is whose rounding is meant: torch's (also that of torchvision v2 and transformers) or
    Pillow's (timm, torchvision on PIL images; slower, at most 2/255 apart, and the only one with lanczos). `antialias`
    filters when shrinking, which Pillow always does and nearest never. `draft` lets a JPEG be
    decoded at a fraction of its size, at least twice the intermediate size: faster, and not the same pixels.
    `mean` and `std` normalise pixels of 0 to 1. Raises UserError for a setting that is out of its range.
    """

    size: tuple[int, int]
    resize: Resize = "crop"
    crop_pct: float = 1.0
    resize_size: int | tuple[int, int] | None = None
    crop_offset: Literal["round", "floor"] = "round"
    fill: tuple[int, int, int] = (0, 0, 0)
    interpolation: Interpolation = "bicubic"
    kernel: Kernel = "torch"
    antialias: bool = True
    draft: bool = False
    mean: Colour = IMAGENET_MEAN
    std: Colour = IMAGENET_STD
    multiple: int = 1

    def __post_init__(self) -> None:
        for name in _SETTINGS:
            object.__setattr__(self, name, _settled(name, getattr(self, name)))
        if self.multiple**2 > self.size[0] * self.size[1]:
            raise UserError(f"preprocess: the square of multiple ({self.multiple}) has to fit into size {self.size}")
        # One meaning, one spelling: otherwise equal pixels would have unequal fingerprints.
        if self.resize_size is not None:
            height, width = self.intermediate()
            one = self.resize == "crop" and height == width
            object.__setattr__(self, "resize_size", height if one else (height, width))
        if self.interpolation == "lanczos":  # torch has it only since lately
            object.__setattr__(self, "kernel", "pillow")
        if self.kernel == "pillow" and not self.antialias:
            raise UserError("preprocess: Pillow's kernels, lanczos among them, cannot leave antialiasing out")
        if self.resize_size is not None and self.crop_pct != 1:
            raise UserError("preprocess takes crop_pct or resize_size, not both")
        if self.resize == "native" and (self.resize_size is not None or self.crop_pct != 1):
            raise UserError("preprocess 'native' never crops: leave crop_pct and resize_size out")
        if self.resize != "native" and self.multiple != 1:
            raise UserError("preprocess takes `multiple` with resize='native' only")

    # Pixels

    def __call__(self, source: Source, *, limits: Limits | None = None) -> Float[Tensor, "3 h w"]:
        """Normalised pixels of a path, bytes, PIL image or array. Raises UserError where it cannot be read."""
        return self.normalise(self.pixels(source, limits=limits))

    def placed(self, source: Source, *, limits: Limits | None = None) -> tuple[Float[Tensor, "3 h w"], Placement]:
        """The same pixels, and where the upright image lies in them. Raises UserError where it cannot be read."""
        image, size = decode_sized(source, limits=limits, target=self._smallest() if self.draft else None)
        return self.normalise(self.fit(image)), self.placement(*size)

    def pixels(self, source: Source, *, limits: Limits | None = None) -> UInt8[Tensor, "3 h w"]:
        """The stage before normalisation: upright RGB at the final size, 0 to 255. Raises UserError."""
        return self.fit(decode(source, limits=limits, target=self._smallest() if self.draft else None))

    def fit(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[Tensor, "3 rows columns"]:
        """Bring an upright RGB image to the final size."""
        scaled = self.scaled(*image.shape[:2])
        if self.resize == "native":
            return self.resample(image, scaled, (0, 0, *scaled))
        (top, height), (left, width) = (self._cut(*lengths) for lengths in zip(scaled, self.size, strict=True))
        cut = self.resample(image, scaled, (max(top, 0), max(left, 0), height, width))
        if (height, width) == self.size:
            return cut
        canvas = torch.tensor(self.fill, dtype=torch.uint8)[:, None, None].repeat(1, *self.size)
        top, left = max(-top, 0), max(-left, 0)
        canvas[:, top : top + height, left : left + width] = cut
        return canvas

    def resample(
        self, image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int], box: tuple[int, int, int, int]
    ) -> UInt8[Tensor, "3 rows columns"]:
        """Resize to `size` with this contract's kernel and return its part `box`: (top, left, height, width)."""
        top, left, height, width = box
        if size[0] * size[1] > max(image.shape[0] * image.shape[1], 2**22):
            # An enlarged sliver may be far larger than what is cut from it: compute that part alone.
            by, bx = (old / new for old, new in zip(image.shape[:2], size, strict=True))
            right, bottom = min((left + width) * bx, image.shape[1]), min((top + height) * by, image.shape[0])
            region = (left * bx, top * by, right, bottom)
            return _planes(Image.fromarray(image).resize((width, height), _PILLOW_MODE[self.interpolation], region))
        if self.kernel == "pillow":
            planes = _planes(Image.fromarray(image).resize(size[::-1], _PILLOW_MODE[self.interpolation]))
            return planes[:, top : top + height, left : left + width]
        shared = image.flags.writeable and min(image.strides) >= 0  # torch shares no other memory
        planes = rearrange(torch.from_numpy(image if shared else image.copy()), "h w c -> c h w")
        if size != image.shape[:2]:
            # A stride for the batch of one keeps the memory interleaved, which is several times faster.
            batch = planes.as_strided((1, *planes.shape), (planes.numel(), *planes.stride()))
            smooth = {} if self.interpolation == "nearest" else {"antialias": self.antialias, "align_corners": False}
            planes = F.interpolate(batch, size=size, mode=_TORCH_MODE[self.interpolation], **smooth)[0]
        return planes[:, top : top + height, left : left + width]

    def normalise(self, pixels: UInt8[Tensor, "3 h w"]) -> Float[Tensor, "3 h w"]:
        """(pixels / 255 - mean) / std in float32, in this order."""
        mean, std = (torch.tensor(colour)[:, None, None] for colour in (self.mean, self.std))
        return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255).sub_(mean).div_(std)

    def batch(
        self, sources: Iterable[Source], *, limits: Limits | None = None
    ) -> tuple[Float[Tensor, "b 3 h w"], Int[Tensor, "b 2"] | None]:
        """The pixels of several images, each prepared alone, and their sizes where these differ; see `collate`."""
        return collate([self(source, limits=limits) for source in sources])

    # Sizes

    def placement(self, height: int, width: int) -> Placement:
        """Where an upright image of this size lies in what a network reads of it."""
        rows, columns = self.scaled(height, width)
        scale = rows / height, columns / width
        if self.resize == "native":
            return Placement((height, width), scale, (0.0, 0.0), (rows, columns))
        top, left = (self._cut(length, wanted)[0] for length, wanted in zip((rows, columns), self.size, strict=True))
        return Placement((height, width), scale, (-float(top), -float(left)), self.size)

    def scaled(self, height: int, width: int) -> tuple[int, int]:
        """The intermediate size of an image of this size."""
        if self.resize == "native":
            return self._largest(height, width)
        rows, columns = self.intermediate()
        if self.resize == "squash":
            return rows, columns
        if self.resize == "crop" and rows == columns:
            return (rows, int(rows * width / height)) if height <= width else (int(rows * height / width), rows)
        side = max if self.resize == "pad" else min
        ratio = side(height / rows, width / columns)
        return max(round(height / ratio), 1), max(round(width / ratio), 1)

    def intermediate(self) -> tuple[int, int]:
        """Height and width that images are resized to, or by, before they are cropped."""
        if self.resize_size is None:
            return math.floor(self.size[0] / self.crop_pct), math.floor(self.size[1] / self.crop_pct)
        return self.resize_size if isinstance(self.resize_size, tuple) else (self.resize_size, self.resize_size)

    def _largest(self, height: int, width: int) -> tuple[int, int]:
        """The most patches that keep the aspect ratio within the budget: one side whole, the other rounded up."""
        budget = self.size[0] * self.size[1] // self.multiple**2

        def other(n: int, this: int, that: int) -> int:
            return -(-n * that // this)

        rows = bisect_right(range(1, budget + 1), budget, key=lambda n: n * other(n, height, width))
        columns = bisect_right(range(1, budget + 1), budget, key=lambda n: n * other(n, width, height))
        grids = (rows, other(rows, height, width)), (other(columns, width, height), columns)
        rows, columns = max(grids, key=math.prod)
        return rows * self.multiple, columns * self.multiple

    def _smallest(self) -> tuple[int, int]:
        """What draft decoding has to leave at least, so that no side of the intermediate size is enlarged."""
        if self.resize != "native":
            return self.intermediate()
        side = math.isqrt(self.size[0] * self.size[1] - 1) + 1
        return side, side

    def _cut(self, length: int, wanted: int) -> tuple[int, int]:
        """Where a centred part begins (negative: how far the filling reaches) and how long it is."""
        if length <= wanted:
            return -((wanted - length) // 2), length
        half = (length - wanted) / 2
        return (round(half) if self.crop_offset == "round" else int(half)), wanted

    # Plain data

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the settings and the contract's version: equal exactly where the same pixels are promised."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """All settings as JSON values; `from_json` reads them back."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {"contract": CONTRACT, **plain}

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> "Preprocess":
        """Settings from JSON values; what is left out keeps its default. Raises UserError for an unknown key."""
        settings = dict(settings)
        contract = settings.pop("contract", CONTRACT)
        if contract != CONTRACT:
            raise UserError(
                f"preprocess has contract {printable(contract)}; this version of Sightline reads {CONTRACT}"
            )
        for key in settings:
            if key not in _SETTINGS:
                raise UserError(f"preprocess has an unknown setting '{printable(key)}'.{suggest(str(key), _SETTINGS)}")
        if "size" not in settings:
            raise UserError("preprocess lacks its 'size' (height, width)")
        return cls(**{name: _settled(name, value) for name, value in settings.items()})

    def replace(self, **changes: Any) -> "Preprocess":
        """A copy with some settings changed."""
        return replace(self, **changes)

    def at(self, size: tuple[int, int]) -> "Preprocess":
        """The same contract for another input size; an explicit intermediate size grows in proportion."""
        if self.resize_size is None:
            return replace(self, size=size)
        rows, columns = (round(r * new / old) for r, new, old in zip(self.intermediate(), size, self.size, strict=True))
        return replace(self, size=size, resize_size=(rows, columns))

    def describe(self) -> str:
        """One plain line for people."""
        (height, width), (rows, columns) = self.size, self.intermediate()
        kernel = f"{self.interpolation} of {self.kernel}{'' if self.antialias else ', aliased'}"
        cut = "" if (rows, columns) == self.size else f", centre crop to {height}×{width}"
        shorter = f"shorter side to {rows}" if rows == columns else f"resized to cover {rows}×{columns}"
        how = {
            "squash": f"resized to {rows}×{columns} ({kernel}){cut}",
            "crop": f"{shorter} ({kernel}), centre crop to {height}×{width}",
            "pad": f"fitted into {rows}×{columns} ({kernel}), filled up to {height}×{width}",
            "native": f"own aspect ratio in at most {height * width} pixels ({kernel}), multiples of {self.multiple}",
        }[self.resize]
        mean, std = (" ".join(f"{v:g}" for v in colour) for colour in (self.mean, self.std))
        return f"{how}; mean {mean}, std {std}{'; draft decoding' if self.draft else ''}"


def collate(images: Sequence[Tensor]) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, "b 2"] | None]:
    """Stack images [c, h, w]; unlike sizes are filled with zeros at the right and bottom and returned as (h, w) rows.

    Raises UserError for an empty list.
    """
    if not images:
        raise UserError("a batch needs at least one image")
    sizes = torch.tensor([image.shape[1:] for image in images])
    if (sizes == sizes[0]).all():
        return torch.stack(list(images)), None
    height, width = sizes.amax(dim=0).tolist()
    pixels = images[0].new_zeros(len(images), len(images[0]), height, width)
    for row, image in zip(pixels, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return pixels, sizes


def _planes(image: Image.Image) -> UInt8[Tensor, "3 h w"]:
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w")


def _whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(value: object) -> bool:
    # Not `isfinite`: a whole number from JSON may be larger than any float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _several(count: int, value: object, check: Callable[[Any], bool], kind: type = int) -> Any:
    known = isinstance(value, list | tuple) and len(value) == count and all(check(v) for v in value)
    return tuple(kind(v) for v in value) if known else None


def _size(value: object) -> tuple[int, int] | None:
    value = (value, value) if _whole(value, 1, 65535) else value
    return _several(2, value, lambda v: _whole(v, 1, 65535))


def _one_of(*known: str) -> tuple[Callable[[Any], Any], str]:
    return lambda value: value if value in known else None, f"one of {', '.join(known)}"


_TRUTH = lambda value: value if isinstance(value, bool) else None, "true or false"
_SIZE = "two whole numbers from 1 to 65535 (height, width), or one for a square"

# How each setting is read, from Python as from JSON (None: refused), and what the refusal says that it has to be.
_SETTINGS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "size": (_size, _SIZE),
    "resize": _one_of(*get_args(Resize)),
    "crop_pct": (lambda value: float(value) if _number(value) and 0 < value <= 1 else None, "above 0, at most 1"),
    "resize_size": (_size, _SIZE),
    "crop_offset": _one_of("round", "floor"),
    "fill": (lambda value: _several(3, value, lambda v: _whole(v, 0, 255)), "three whole numbers from 0 to 255"),
    "interpolation": _one_of(*get_args(Interpolation)),
    "kernel": _one_of(*get_args(Kernel)),
    "antialias": _TRUTH,
    "draft": _TRUTH,
    "mean": (lambda value: _several(3, value, _number, float), "three numbers"),
    "std": (lambda value: _several(3, value, lambda v: _number(v) and v > 0, float), "three positive numbers"),
    "multiple": (lambda value: value if _whole(value, 1, 65535) else None, "a whole number of at least 1"),
}


def _settled(name: str, value: object) -> Any:
    read, expected = _SETTINGS[name]
    settled = read(value)
    if settled is None and not (name == "resize_size" and value is None):
        raise UserError(f"preprocess: {name} has to be {expected}, not {printable(value)}")
    return settled
