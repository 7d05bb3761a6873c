"""Maps over images, as pictures."""

import math
from collections.abc import Sequence
from io import BytesIO
from typing import NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

Box = tuple[int | float, int | float, int | float, int | float]

# Dark violet to pale yellow: lightness rises evenly, so that the order of values survives in grey and for every eye.
_ANCHORS = "000004 210c4a 56106e 89226a bb3754 e35932 f98c0a f9c932 fcffa4"
_TABLE = np.array([list(bytes.fromhex(anchor)) for anchor in _ANCHORS.split()], dtype=np.float64)
_LABEL = (128, 128, 128, 255)  # readable on white and on black
_DIMMED = 0.35


class View(NamedTuple):
    """Where a model's grid lies on an image.

    `box` is the region of the image, (left, top, right, bottom) in its pixels, that became the model's input of `size`
    (height, width); it may reach beyond the image where the input was filled up. `stride` is the step of the grid in
    pixels of the input, (down, right), and `origin` where its first cell begins: patches that overlap are wider than
    their step, and see as much before the first cell as behind the last.
    """

    box: Box
    size: tuple[int, int]
    stride: tuple[int | float, int | float]
    origin: tuple[int | float, int | float] = (0, 0)


def colours(values: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape 3"]:
    """The colours of values from 0 (almost black) to 1 (pale yellow)."""
    at = np.clip(values, 0, 1) * (len(_TABLE) - 1)
    bands = [np.interp(at, np.arange(len(_TABLE)), _TABLE[:, band]) for band in range(3)]
    return np.stack(bands, axis=-1).round().astype(np.uint8)


def spread(
    cells: Float[np.ndarray, "rows columns"], height: int, width: int, view: View, *, blocks: bool = False
) -> tuple[Float[np.ndarray, "height width"], Bool[np.ndarray, "height width"]]:
    """A map on the grid brought to the pixels of the image, and which of these the model saw.

    Bilinear between the centres of the patches, constant beyond the outermost; or, in `blocks`, the value of the
    nearest centre.
    """
    (left, top, right, bottom), inputs, strides, origin = view
    down = _axis(height, (top, bottom), inputs[0], strides[0], origin[0], cells.shape[0], blocks)
    across = _axis(width, (left, right), inputs[1], strides[1], origin[1], cells.shape[1], blocks)
    return down[0] @ cells.astype(np.float32) @ across[0].T, down[1][:, None] & across[1][None, :]


def _axis(
    length: int,
    span: tuple[int | float, int | float],
    size: int,
    stride: int | float,
    origin: int | float,
    cells: int,
    blocks: bool,
) -> tuple[Float[np.ndarray, "length cells"], Bool[np.ndarray, " length"]]:
    """The share of each cell in each pixel along one axis, and whether the pixel was seen."""
    at = (np.arange(length) + 0.5 - span[0]) * size / (span[1] - span[0])  # in pixels of the model's input
    nearest = np.clip((at - origin) / stride - 0.5, 0, cells - 1)
    nearest = np.rint(nearest) if blocks else nearest
    shares = np.maximum(1 - np.abs(nearest[:, None] - np.arange(cells)), 0)
    return shares.astype(np.float32), (at >= 0) & (at < min(size, cells * stride + max(2 * origin, 0)))


def overlay(
    image: UInt8[np.ndarray, "h w 3"], cells: Float[np.ndarray, "rows columns"], view: View
) -> UInt8[np.ndarray, "h w 3"]:
    """The image with a map over it, scaled by its largest value; what the model did not see is dimmed."""
    heat, seen = spread(cells, *image.shape[:2], view)
    heat = np.clip(heat / max(float(cells.max()), np.finfo(np.float32).tiny), 0, 1)
    share = np.where(seen, 0.3 + 0.4 * heat, 0)[..., None].astype(np.float32)
    shade = np.where(seen, 1, _DIMMED)[..., None].astype(np.float32)
    return (image * shade * (1 - share) + colours(heat) * share).round().astype(np.uint8)


def veil(image: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """The image with what lies outside a mask dimmed and without colour."""
    grey = np.broadcast_to(image.mean(axis=-1, keepdims=True) * _DIMMED, image.shape)
    return np.where(mask[..., None], image, grey).round().astype(np.uint8)


def fitted(
    image: UInt8[np.ndarray, "h w 3"], box: Box, least: int, most: int
) -> tuple[UInt8[np.ndarray, "height width 3"], Box]:
    """An image whose longer side has `least` to `most` pixels, and where `box` lies on it.

    A large image is averaged down; the pixels of a small one become squares.
    """
    longest = max(image.shape[:2])
    factor = min(max(longest, least), most) / longest
    height, width = (max(round(side * factor), 1) for side in image.shape[:2])
    sized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))
    (left, top, right, bottom), (y, x) = box, (height / image.shape[0], width / image.shape[1])
    return sized, (left * x, top * y, right * x, bottom * y)


def seen_part(
    image: UInt8[np.ndarray, "h w 3"], view: View, longest: int
) -> tuple[UInt8[np.ndarray, "height width 3"], View]:
    """The part of the image inside the view's box, its longer side `longest` pixels, and the view of that part."""
    left, top, right, bottom = view.box
    x0, y0 = max(math.floor(left), 0), max(math.floor(top), 0)
    part = image[y0 : max(math.ceil(bottom), y0 + 1), x0 : max(math.ceil(right), x0 + 1)]
    small, box = fitted(part, (left - x0, top - y0, right - x0, bottom - y0), longest, longest)
    return small, view._replace(box=box)


def sheet(pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]], labels: Sequence[str], columns: int) -> Image.Image:
    """Pictures in rows of `columns`, each with its label above, on a transparent ground."""
    font = ImageFont.load_default()
    gap, line = 6, 14
    height = max(picture.shape[0] for picture in pictures)
    width = max(picture.shape[1] for picture in pictures)
    width = max(width, *(math.ceil(font.getlength(label)) for label in labels))
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    page = Image.new("RGBA", (columns * (width + gap) - gap, rows * (height + line + gap) - gap))
    draw = ImageDraw.Draw(page)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = i % columns * (width + gap), i // columns * (height + line + gap)
        draw.text((x + 2, y), label, fill=_LABEL, font=font)
        page.paste(Image.fromarray(picture), (x, y + line))
    return page


def tiles(similarity: Float[np.ndarray, "rows columns rows columns"], most: int = 14) -> Image.Image:
    """One small map for each patch, standing where the patch stands, of its similarity with all others, -1 to 1.

    Of a finer grid than `most` in either direction, every second, third … patch has a tile.
    """
    rows, columns = similarity.shape[:2]
    step = -(-max(rows, columns) // most)
    chosen = similarity[step // 2 :: step, step // 2 :: step]
    scale = max(1, 600 // (max(chosen.shape[:2]) * max(rows, columns)))
    cells = colours((chosen + 1) / 2).repeat(scale, axis=2).repeat(scale, axis=3)
    opaque = np.concatenate([cells, np.full((*cells.shape[:-1], 1), 255, np.uint8)], axis=-1)
    framed = np.pad(opaque, ((0, 0), (0, 0), (0, 3), (0, 3), (0, 0)))  # a transparent gap
    return Image.fromarray(rearrange(framed, "r c y x band -> (r y) (c x) band"))


def filter_sheet(pictures: Float[np.ndarray, "k channels height width"], columns: int = 7) -> Image.Image | None:
    """The filters' components as colour (or grey) pictures; None where the channels are not a picture's."""
    if pictures.shape[1] not in (1, 3):
        return None
    scale = max(1, 64 // max(pictures.shape[2:]))
    cells = (pictures * 255).round().astype(np.uint8).repeat(scale, axis=2).repeat(scale, axis=3)
    shown = [np.broadcast_to(rearrange(c, "band y x -> y x band"), (*c.shape[1:], 3)).copy() for c in cells]
    return sheet(shown, [str(i + 1) for i in range(len(shown))], columns)


def png(picture: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    buffer = BytesIO()
    picture.save(buffer, format="PNG", compress_level=3)  # the default takes twice as long for 2 % less
    return buffer.getvalue()
