"""The pixel contract as timm, transformers and torchvision write it, read and, where they can express it, written.

Reading fails rather than approximates: an operation that the contract does not have is named and refused.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sightline.errors import UserError, printable, suggest
from sightline.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, Colour, Preprocess

_HALF: Colour = (0.5, 0.5, 0.5)
_CLIP_MEAN: Colour = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD: Colour = (0.26862954, 0.26130258, 0.27577711)
_TIMM_MODES = {"center": "crop", "squash": "squash", "border": "pad"}
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def from_timm(cfg: Mapping[str, Any], *, test_size: bool = False) -> Preprocess:
    """The contract of a timm `pretrained_cfg`; keys that do not concern pixels are passed over.

    `test_size` takes `test_input_size` and `test_crop_pct` where they are there. Raises UserError for what the
    contract cannot express.
    """

    def read(name: str, default: Any) -> Any:
        value = cfg.get(f"test_{name}") if test_size else None
        return value or cfg.get(name) or default

    size = read("input_size", (3, 224, 224))
    if not isinstance(size, list | tuple) or len(size) != 3 or size[0] != 3:
        raise UserError(f"the timm configuration has input_size {printable(size)}; [3, height, width] is expected")
    mode = read("crop_mode", "center")
    if not isinstance(mode, str) or mode not in _TIMM_MODES:
        raise UserError(f"the timm configuration has an unknown crop_mode '{printable(mode)}'")
    settings = {
        "size": size[1:],
        "resize": _TIMM_MODES[mode],
        "crop_pct": read("crop_pct", 0.875),
        "interpolation": read("interpolation", "bicubic"),
        "kernel": "pillow",
        "mean": read("mean", IMAGENET_MEAN),
        "std": read("std", IMAGENET_STD),
    }
    contract = Preprocess.from_json(settings)
    red, green, blue = (round(255 * max(0, min(1, v))) for v in contract.mean)
    return contract.replace(fill=(red, green, blue)) if mode == "border" else contract


def to_timm(preprocess: Preprocess) -> dict[str, Any]:
    """The entries of a timm `pretrained_cfg` that give the same pixels (draft decoding excepted).

    Raises UserError where timm cannot express the contract.
    """
    modes = {ours: theirs for theirs, ours in _TIMM_MODES.items()}
    if preprocess.resize not in modes or not preprocess.antialias:
        raise UserError(f"timm has no counterpart of: {preprocess.describe()}")
    written = {
        "input_size": [3, *preprocess.size],
        "interpolation": preprocess.interpolation,
        "crop_pct": _timm_crop(preprocess),
        "crop_mode": modes[preprocess.resize],
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
    }
    again = from_timm(written)
    sizes = [(again.scaled(h, w), preprocess.scaled(h, w)) for h, w in ((97, 89), (89, 97), (1013, 499), (499, 1013))]
    if any(ours != theirs for ours, theirs in sizes) or again.fill != preprocess.fill:
        raise UserError(f"timm has no counterpart of: {preprocess.describe()}")
    return written


def _timm_crop(preprocess: Preprocess) -> float:
    """The crop_pct whose floor(size / crop_pct) is the intermediate size; the caller checks it."""
    if preprocess.resize_size is None:
        return preprocess.crop_pct
    wanted = preprocess.resize_size if isinstance(preprocess.resize_size, int) else preprocess.resize_size[0]
    share = preprocess.size[0] / wanted
    return share if math.floor(preprocess.size[0] / share) == wanted else math.nextafter(share, 0)


@dataclass(frozen=True)
class _Processor:
    """The defaults of one of transformers' image processors; `square` says what a bare number means as its size."""

    size: Mapping[str, int]
    square: bool = True
    crop: bool = False
    resample: int = 3
    mean: Colour = _HALF
    std: Colour = _HALF


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


_PROCESSORS = {
    "ViT": _Processor(_square(224), resample=2),
    "DeiT": _Processor(_square(256), crop=True),
    "Beit": _Processor(_square(224)),
    "Siglip": _Processor(_square(224), square=False),
    "CLIP": _Processor({"shortest_edge": 224}, square=False, crop=True, mean=_CLIP_MEAN, std=_CLIP_STD),
    "Bit": _Processor({"shortest_edge": 224}, square=False, crop=True, mean=_CLIP_MEAN, std=_CLIP_STD),
    "ConvNext": _Processor({"shortest_edge": 384}, square=False),
    "Levit": _Processor({"shortest_edge": 224}, square=False, crop=True, mean=IMAGENET_MEAN, std=IMAGENET_STD),
}
_DONE = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}
_UNRELATED = {"do_reduce_labels", "do_reduce_label"}  # these are about segmentation maps


def from_transformers(config: Mapping[str, Any]) -> Preprocess:
    """The contract of a transformers `preprocessor_config.json`, also of old ones with a bare number as size.

    Reads the processors of ViT, DeiT, BEiT, SigLIP, CLIP, BiT, ConvNeXt and LeViT and the many models that use them
    (one without a type counts as ViT's). Raises UserError for other processors and for any further operation that is
    switched on.
    """
    name, known = _processor(config)
    for key, value in config.items():
        if key.startswith("do_") and key not in _DONE | _UNRELATED and value:
            raise UserError(f"the transformers configuration asks for '{printable(key)}', which is not supported")
    if not config.get("do_resize", True):
        raise UserError("the transformers configuration does not resize: images would keep their own sizes")
    resample = config.get("resample", known.resample)
    if not isinstance(resample, int) or resample not in _RESAMPLE:
        raise UserError(f"the transformers configuration has an unsupported resample {printable(resample)}")
    size = _sides(config.get("size", known.size), known.square)
    crop = _sides(config.get("crop_size", _square(224)), True) if config.get("do_center_crop", known.crop) else None
    return Preprocess.from_json(
        {
            **_geometry(name, size, crop, _positive(config, "crop_pct", 224 / 256)),
            **_statistics(config, known),
            "crop_offset": "floor",
            "interpolation": _RESAMPLE[resample],
        }
    )


def _positive(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or not value > 0:
        raise UserError(f"the transformers configuration has {key} {printable(value)}; a positive number is expected")
    return value


def _processor(config: Mapping[str, Any]) -> tuple[str, _Processor]:
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "ViTImageProcessor")
    name = kind
    for ending in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        name = name.removesuffix(ending)
    if name not in _PROCESSORS:
        listed = ", ".join(f"{k}ImageProcessor" for k in _PROCESSORS)
        raise UserError(f"unsupported image processor '{printable(kind)}'.{suggest(name, _PROCESSORS)} Known: {listed}")
    return name, _PROCESSORS[name]


def _sides(size: Any, square: bool) -> int | tuple[int, int]:
    """The number of a shortest edge, or (height, width)."""
    if isinstance(size, int):
        return (size, size) if square else size
    if isinstance(size, list | tuple) and len(size) == 2:
        return size[0], size[1]
    given = {key: value for key, value in size.items() if value is not None} if isinstance(size, Mapping) else {}
    if set(given) == {"height", "width"}:
        return given["height"], given["width"]
    if set(given) == {"shortest_edge"}:
        return given["shortest_edge"]
    raise UserError(f"the transformers configuration has an unsupported size {printable(size)}")


def _geometry(name: str, size: int | tuple[int, int], crop: Any, crop_pct: float) -> dict[str, Any]:
    if name == "ConvNext" and isinstance(size, int) and crop is None:
        if size >= 384:
            return {"size": size, "resize": "squash"}
        return {"size": size, "resize": "crop", "resize_size": int(size / crop_pct)}
    if isinstance(size, tuple):
        if crop is None or crop == size:
            return {"size": size, "resize": "squash"}
        return {"size": crop, "resize": "squash", "resize_size": size}
    if crop is None:
        raise UserError("the transformers configuration resizes to a shortest edge without a crop: sizes would differ")
    return {"size": crop, "resize": "crop", "resize_size": int(256 / 224 * size) if name == "Levit" else size}


def _statistics(config: Mapping[str, Any], known: _Processor) -> dict[str, Any]:
    """Mean and standard deviation for pixels of 0 to 1, whatever the range that the configuration rescales to."""
    if config.get("do_normalize", True):
        found = {"mean": config.get("image_mean") or known.mean, "std": config.get("image_std") or known.std}
    else:
        found = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    white = 255 * _positive(config, "rescale_factor", 1 / 255) if config.get("do_rescale", True) else 255.0
    statistics = {}
    for name, given in found.items():
        colour = given if isinstance(given, list | tuple) else [given] * 3
        if not all(isinstance(v, int | float) for v in colour):
            raise UserError(f"the transformers configuration has image_{name} {printable(given)}; numbers are expected")
        statistics[name] = colour if math.isclose(white, 1, rel_tol=1e-9) else [v / white for v in colour]
    return statistics


def to_transformers(preprocess: Preprocess) -> dict[str, Any]:
    """A transformers `preprocessor_config.json` for the same pixels (draft decoding excepted).

    A crop that cannot be centred exactly is rounded down there: for contracts that round to the even pixel it may sit
    one pixel further up or left. Raises UserError where transformers cannot express the contract.
    """
    numbers = {ours: theirs for theirs, ours in _RESAMPLE.items()}
    height, width = preprocess.size
    rows, columns = preprocess.scaled(1000, 1000)  # of a square, so that the shorter side shows
    oblong_cover = preprocess.resize == "crop" and not isinstance(preprocess.resize_size, int) and height != width
    filled = (rows < height or columns < width) and preprocess.fill != (0, 0, 0)
    if preprocess.resize not in ("squash", "crop") or oblong_cover or filled or not preprocess.antialias:
        raise UserError(f"transformers has no counterpart of: {preprocess.describe()}")
    crops = preprocess.resize == "crop" or (rows, columns) != preprocess.size
    config: dict[str, Any] = {
        "image_processor_type": "BitImageProcessor" if preprocess.resize == "crop" else "ViTImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": rows} if preprocess.resize == "crop" else {"height": rows, "width": columns},
        "resample": numbers[preprocess.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
        "do_convert_rgb": True,
    }
    if crops:
        config |= {"do_center_crop": True, "crop_size": {"height": height, "width": width}}
        if preprocess.resize == "squash":
            config["image_processor_type"] = "DeiTImageProcessor"
    return config


def from_torchvision(preset: Any) -> Preprocess:
    """The contract of a torchvision `ImageClassification` preset, of `weights.transforms`, or of its keyword arguments.

    Raises UserError for other presets.
    """
    if isinstance(preset, functools.partial):
        preset = preset.keywords
    names = ("crop_size", "resize_size", "mean", "std", "interpolation", "antialias")
    given = preset if isinstance(preset, Mapping) else {n: getattr(preset, n) for n in names if hasattr(preset, n)}
    unknown = sorted(set(given) - set(names))
    if unknown or "crop_size" not in given:
        raise UserError("a torchvision preset needs crop_size and may have " + ", ".join(names[1:]))
    interpolation = given.get("interpolation", "bilinear")
    return Preprocess.from_json(
        {
            "size": _single(given["crop_size"]),
            "resize_size": _single(given.get("resize_size", 256)),
            "interpolation": str(getattr(interpolation, "value", interpolation)).removesuffix("-exact"),
            "antialias": given.get("antialias", True) is not False,
            "kernel": "torch" if given.get("antialias", True) is False else "pillow",
            "mean": given.get("mean", IMAGENET_MEAN),
            "std": given.get("std", IMAGENET_STD),
        }
    )


def _single(side: Any) -> Any:
    return side[0] if isinstance(side, list | tuple) and len(side) == 1 else side
