"""OpenAI's own CLIP files: one `.pt` with half-precision weights, and three numbers beside them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sightline.checkpoints.files import bare_file
from sightline.checkpoints.library import Library, usual_pixels
from sightline.checkpoints.scheme import Bundle, Content, Reading, Request, Scheme, Stored
from sightline.images.preprocess import Preprocess
from sightline.layout import Layout
from sightline.network import Architecture
from sightline.texts.vocabularies import load_vocabulary

_NUMBERS = ("input_resolution", "context_length", "vocab_size")
PIXELS: Mapping[str, Any] = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
    "kernel": "pillow",
}
"""How OpenAI's networks, and open_clip's unless told otherwise, want their pixels."""


class OpenAI(Library):
    """The activation is QuickGELU in every one of these files, whatever a name says of it."""

    name = "openai"

    def recognises(self, stored: Stored) -> bool:
        """The three numbers are there, or the weights alone in a `.pt` file, as OpenAI's code saves them again."""
        tensors = stored.contents.tensors
        own = all(name in tensors for name in _NUMBERS) or (stored.where.endswith(".pt") and not stored.contents.notes)
        return own and super().recognises(stored)

    def reading(self, found: Any, layout: Layout, request: Request, **beside: Any) -> Reading:
        numbers = {name: tensor for name, tensor in found.tensors.items() if name in _NUMBERS}
        size = int(numbers["input_resolution"]) if "input_resolution" in numbers else None
        told = {"activation": "quick_gelu", "text_activation": "quick_gelu", **(beside.pop("told", None) or {})}
        square: dict[str, Any] = {} if size is None else {"image_size": (size, size)}
        reading = super().reading(found, layout, request, told=told, tell=clip_pixels, **{**beside, **square})
        return replace(reading, vocabulary=load_vocabulary(None, reading.architecture.head.vocab_size))

    def refusals(self, architecture: Architecture, out: Path) -> list[str]:
        found = super().refusals(architecture, out)
        if architecture.task != "clip":
            return found
        head, (height, width) = architecture.head, architecture.backbone.image_size
        kinds = {"activation": architecture.backbone.activation, "text_activation": head.text_activation}
        found += [f"{name}={value!r} (only 'quick_gelu')" for name, value in kinds.items() if value != "quick_gelu"]
        return found + ([f"an image of {height}×{width} pixels (only square ones)"] if height != width else [])

    def extras(self, architecture: Architecture) -> dict[str, Tensor]:
        values = (architecture.backbone.image_size[0], architecture.head.context_length, architecture.head.vocab_size)
        return {name: torch.tensor(value) for name, value in zip(_NUMBERS, values, strict=True)}

    def files(self, bundle: Bundle, tensors: Mapping[str, Tensor], out: Path) -> dict[Path, Content]:
        return bare_file(tensors, out) or super().files(bundle, tensors, out)


def clip_pixels(architecture: Architecture) -> tuple[Preprocess, None]:
    """The pixel contract of a published architecture, or what OpenAI's networks want."""
    published, _ = usual_pixels(architecture)
    if architecture.name != architecture.family:
        return published, None
    return Preprocess.from_json({"size": architecture.backbone.image_size, "resize": "crop", **PIXELS}), None


SCHEMES: Mapping[str, Scheme] = {"openai": OpenAI()}
