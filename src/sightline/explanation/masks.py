"""Masks over images."""

from collections.abc import Sequence
from html import escape

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image

from sightline.heads.segment import SemanticMask

SHARE = 0.55


def palette(count: int) -> UInt8[np.ndarray, "k 3"]:
    """Colours for classes, as far apart as the golden angle puts them; the first is grey, as grounds often are."""
    hues = (np.arange(count) * 0.618034 + 0.05) % 1
    bright = np.where(np.arange(count) % 2, 235, 190)
    hsv = np.stack([hues * 255, np.full(count, 200), bright], axis=-1).astype(np.uint8)
    colours = np.asarray(Image.fromarray(hsv[None], mode="HSV").convert("RGB"))[0].copy()
    colours[:1] = 110
    return colours


def painted(
    image: UInt8[np.ndarray, "h w 3"], mask: Integer[np.ndarray, "h w"], classes: int
) -> UInt8[np.ndarray, "h w 3"]:
    """The image with the colour of its class over every pixel; pixels of no class stay as they are."""
    colours, real = palette(classes), mask < classes
    over = colours[np.where(real, mask, 0)]
    share = np.where(real, SHARE, 0.0)[..., None]
    return (image * (1 - share) + over * share).round().astype(np.uint8)


def legend(labels: Sequence[str], used: Sequence[int]) -> str:
    """The classes with their colours, as HTML."""
    colours = palette(len(labels))
    return " ".join(
        f'<span style="border-left:1em solid rgb({",".join(map(str, colours[i].tolist()))});padding:0 .8em 0 .3em">'
        f"{escape(labels[i])}</span>"
        for i in used
    )


def _draw(
    reply: SemanticMask, image: UInt8[np.ndarray, "h w 3"], scale: float, labels: Sequence[str] | None
) -> UInt8[np.ndarray, "h w 3"]:
    """The class of every pixel."""
    size = image.shape[1], image.shape[0]
    mask = np.asarray(Image.fromarray(reply.mask).resize(size, Image.Resampling.NEAREST))
    return painted(image, mask, len(reply.labels))


DRAWINGS = {"SemanticMask": _draw}
