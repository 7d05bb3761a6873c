"""Boxes drawn on images."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from sightline.errors import printable
from sightline.explanation.masks import palette
from sightline.heads.detect import Detections


def boxed(
    image: UInt8[np.ndarray, "h w 3"],
    boxes: Sequence[Sequence[float]],
    indices: Sequence[int],
    words: Sequence[str],
    classes: int,
) -> UInt8[np.ndarray, "h w 3"]:
    """The image with boxes (left, top, right, bottom, in its pixels), each in the colour of its class, and words."""
    canvas = Image.fromarray(image)
    draw, colours = ImageDraw.Draw(canvas), palette(classes + 1)[1:]
    thick = max(round(max(image.shape[:2]) / 200), 1)
    high = max(round(max(image.shape[:2]) / 30), 10)
    font = ImageFont.load_default(high)
    for box, index, text in zip(boxes, indices, words, strict=True):
        left, top, right, bottom = box
        colour = tuple(colours[index].tolist())
        corners = [left, top, max(right - 1, left), max(bottom - 1, top)]
        draw.rectangle(corners, outline=colour, width=thick)
        if text:
            place = draw.textbbox((left + thick, max(top - high, 0)), text, font=font)
            draw.rectangle(place, fill=colour)
            draw.text((left + thick, max(top - high, 0)), text, fill=(0, 0, 0), font=font)
    return np.asarray(canvas)


def _draw(
    reply: Detections, image: UInt8[np.ndarray, "h w 3"], scale: float, labels: Sequence[str] | None
) -> UInt8[np.ndarray, "h w 3"]:
    """The objects that were found."""
    boxes = [[side * scale for side in found.box] for found in reply.boxes]
    words = [f"{printable(found.label, 20)} {found.score:.0%}" for found in reply.boxes]
    indices = [found.index for found in reply.boxes]
    return boxed(image, boxes, indices, words, len(labels) if labels else max(indices, default=0) + 1)


DRAWINGS = {"Detections": _draw}
