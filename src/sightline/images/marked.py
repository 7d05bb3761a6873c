"""Images together with boxes and masks: what moves the pixels moves them too."""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from sightline.errors import UserError
from sightline.images.augment import Augment
from sightline.images.preprocess import Preprocess
from sightline.types import Placement

OUTSIDE = 255
"""The class of the pixels that no part of the image covers."""

LEAST = 0.25
"""Share of a box that has to stay in sight; of less, nobody could say what it is."""


class Marked(NamedTuple):
    """Pixels [3, h, w] with boxes in them (left, top, right, bottom, in pixels), their rows before, and a mask [h, w].

    A box of which too little is left in sight is gone; `kept` has the rows of those that stayed.
    """

    pixels: Tensor
    boxes: Float[Tensor, "n 4"]
    kept: Int[Tensor, " n"]
    mask: UInt8[Tensor, "h w"] | None


class MarkedImages:
    """A pixel contract, and where given an augmentation, for images with boxes and masks. It can be sent to processes.

    Raises UserError for variations that would move pixels and not what is marked.
    """

    def __init__(self, preprocess: Preprocess, augment: Augment | None = None):
        self.preprocess, self.augment = preprocess, augment
        self._vary = [] if augment is None else _operations(augment)

    def __reduce__(self) -> tuple[type, tuple[Preprocess, Augment | None]]:
        return MarkedImages, (self.preprocess, self.augment)

    def __call__(
        self,
        image: UInt8[np.ndarray, "h w 3"],
        boxes: Float[np.ndarray, "n 4"],
        mask: UInt8[np.ndarray, "h w"] | None,
        key: int,
    ) -> Marked:
        """The image as a network reads it; `key` seeds whatever is random, and nothing else is."""
        corners = torch.from_numpy(boxes.astype(np.float32)).reshape(-1, 4)
        if self.augment is None:
            return self._finished(*self._placed(image, corners, mask))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key)
            prepare = self._cropped if self.augment.crop == "resized" else self._placed
            pixels, corners, cells = prepare(image, corners, mask)
            for operation in self._vary:
                pixels, corners, cells = operation(pixels, corners, cells)
            return self._finished(pixels, corners, cells)

    def _placed(self, image: np.ndarray, corners: Tensor, mask: np.ndarray | None) -> tuple[Tensor, Tensor, Any]:
        height, width = image.shape[:2]
        place = self.preprocess.placement(height, width)
        pixels = self.preprocess.fit(image)
        cells = None if mask is None else placed_mask(mask, place, (pixels.shape[1], pixels.shape[2]))
        return pixels, placed_boxes(corners, place), cells

    def _cropped(self, image: np.ndarray, corners: Tensor, mask: np.ndarray | None) -> tuple[Tensor, Tensor, Any]:
        from torchvision.transforms import v2

        assert self.augment is not None
        height, width = self.preprocess.size
        ratio = (self.augment.crop_ratio[0] * width / height, self.augment.crop_ratio[1] * width / height)
        part = v2.RandomResizedCrop((height, width), scale=self.augment.crop_scale, ratio=ratio)
        drawn = part.make_params([torch.empty(3, *image.shape[:2], device="meta")])
        rows = slice(drawn["top"], drawn["top"] + drawn["height"])
        columns = slice(drawn["left"], drawn["left"] + drawn["width"])
        cut = np.ascontiguousarray(image[rows, columns])
        pixels = self.preprocess.resample(cut, (height, width), (0, 0, height, width))
        scale = height / cut.shape[0], width / cut.shape[1]
        offset = -drawn["top"] * scale[0], -drawn["left"] * scale[1]
        place = Placement((image.shape[0], image.shape[1]), scale, offset, (height, width))
        cells = None if mask is None else placed_mask(mask, place, (height, width))
        return pixels, placed_boxes(corners, place), cells

    def _finished(self, pixels: Tensor, corners: Tensor, cells: Any) -> Marked:
        height, width = pixels.shape[1:]
        limits = torch.tensor([width, height, width, height], dtype=torch.float32)
        clipped = torch.minimum(corners.clamp(min=0), limits)
        area, left = _area(corners), _area(clipped)
        kept = ((left > 0) & (left >= LEAST * area)).nonzero()[:, 0]
        mask = None if cells is None else torch.as_tensor(cells)
        return Marked(self.preprocess.normalise(pixels), clipped[kept], kept, mask)


def placed_boxes(corners: Float[Tensor, "n 4"], place: Placement) -> Float[Tensor, "n 4"]:
    """Boxes of an image, in its pixels, as they lie in what a network reads of it."""
    (y, x), (top, left) = place.scale, place.offset
    return corners * torch.tensor([x, y, x, y]) + torch.tensor([left, top, left, top])


def original_boxes(corners: Float[Tensor, "n 4"], place: Placement) -> Float[Tensor, "n 4"]:
    """The reverse of `placed_boxes`, cut off at the edges of the image."""
    (y, x), (top, left), (height, width) = place.scale, place.offset, place.size
    back = (corners - corners.new_tensor([left, top, left, top])) / corners.new_tensor([x, y, x, y])
    return torch.minimum(back.clamp(min=0), back.new_tensor([width, height, width, height]))


def placed_mask(
    mask: UInt8[np.ndarray, "h w"], place: Placement, size: tuple[int, int]
) -> UInt8[Tensor, "rows columns"]:
    """A class for each pixel of the input, that of the nearest pixel of the image; `OUTSIDE` where it has none."""
    found = []
    for length, wanted, scale, offset in zip(mask.shape, size, place.scale, place.offset, strict=True):
        at = np.floor((np.arange(wanted) + 0.5 - offset) / scale).astype(np.int64)
        found.append((np.clip(at, 0, length - 1), (at >= 0) & (at < length)))
    (rows, real_rows), (columns, real_columns) = found
    cells = mask[rows][:, columns]
    return torch.from_numpy(np.where(real_rows[:, None] & real_columns, cells, OUTSIDE).astype(np.uint8))


def _area(corners: Float[Tensor, "n 4"]) -> Float[Tensor, " n"]:
    return (corners[:, 2:] - corners[:, :2]).clamp(min=0).prod(dim=1)


def _operations(augment: Augment) -> list[Any]:
    """The variations that follow the crop, each from pixels, boxes and mask to the same."""
    for name in ("randaugment", "erasing", "elastic_alpha"):
        if getattr(augment, name):
            raise UserError(f"augment: {name} is for images with one class: it would not move what is marked in them")
    if augment.crop == "padded":
        raise UserError("augment: crop='padded' is for images with one class; take 'resized' or 'none'")
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    operations: list[Any] = []
    for probability, axis in ((augment.horizontal_flip, 2), (augment.vertical_flip, 1)):
        if probability:
            operations.append(_flip(probability, axis))
    bilinear = v2.InterpolationMode.BILINEAR
    transforms: list[Any] = []
    if augment.degrees or augment.translate or augment.zoom != (1, 1) or augment.shear:
        turn, shift = (-augment.degrees, augment.degrees), (augment.translate, augment.translate)
        fill: Any = {tv_tensors.Mask: OUTSIDE, "others": 0}
        transforms.append(v2.RandomAffine(turn, shift, augment.zoom, augment.shear, interpolation=bilinear, fill=fill))
    if augment.brightness or augment.contrast or augment.saturation or augment.hue:
        transforms.append(v2.ColorJitter(augment.brightness, augment.contrast, augment.saturation, augment.hue))
    return operations + [_moving(transform) for transform in transforms]


def _flip(probability: float, axis: int) -> Any:
    def flip(pixels: Tensor, corners: Tensor, cells: Any) -> tuple[Tensor, Tensor, Any]:
        if torch.rand(()) >= probability:
            return pixels, corners, cells
        length, (low, high) = pixels.shape[axis], ((0, 2) if axis == 2 else (1, 3))
        turned = corners.clone()
        turned[:, low], turned[:, high] = length - corners[:, high], length - corners[:, low]
        return pixels.flip(axis), turned, None if cells is None else cells.flip(axis - 1)

    return flip


def _moving(transform: Any) -> Any:
    """A transform of torchvision applied with the same parameters to pixels, boxes and mask."""
    from torchvision import tv_tensors

    def move(pixels: Tensor, corners: Tensor, cells: Any) -> tuple[Tensor, Tensor, Any]:
        size = (pixels.shape[1], pixels.shape[2])
        params = transform.make_params([pixels])
        moved = transform.transform(tv_tensors.Image(pixels), params)
        boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size, clamping_mode=None)  # ty: ignore
        boxes = transform.transform(boxes, params) if len(corners) else boxes
        if cells is not None:
            cells = transform.transform(tv_tensors.Mask(cells[None]), params).as_subclass(Tensor)[0]
        return moved.as_subclass(Tensor), boxes.as_subclass(Tensor), cells

    return move
