"""Small Vision Transformers of other libraries with random weights, saved as those libraries save them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from parity import VIEWS, Case, Made, spread

SIZES = {"square": (32, 32), "non-square": (32, 56), "other size": (40, 72)}
LITTLE = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8}
LITTLE_HUB = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "patch_size": 8,
    "image_size": 32,
    "num_labels": 5,
}


def pixels_of(size: tuple[int, int]) -> Tensor:
    """Two images of noise."""
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def timm_cases(
    kind: str, layout: str, name: str, classes: int = 5, given: Mapping[str, Any] | None = None, **settings: Any
) -> list[Case]:
    """The table's rows for one of timm's names; at another size timm stretches its own positions.

    `settings` are timm's arguments, `given` what they are called here.
    """

    def make(view: str) -> Callable[[Path], Made]:
        def write(folder: Path) -> Made:
            size = SIZES[view]
            made_for = (32, 32) if view == "other size" else size
            model = spread(timm.create_model(name, img_size=made_for, num_classes=classes, **LITTLE, **settings))
            path = folder / "model.pth"
            torch.save(model.state_dict(), path)
            if size != made_for:
                model.set_input_size(size)
            with torch.no_grad():
                expected = model(pixels_of(size))
            sizes = {"image_size": size, "source_size": made_for}
            return Made(path, {"architecture": name, **sizes, **LITTLE, **(given or {})}, pixels_of(size), expected)

        return write

    return [Case(kind, "timm", view, layout, make(view)) for view in VIEWS]


def hub_cases(
    kind: str,
    layout: str,
    build: Callable[..., nn.Module],
    config: type,
    answer: Callable[..., Tensor],
    *,
    oblong: tuple[int, int] = SIZES["non-square"],
    square: bool = False,
    **settings: Any,
) -> list[Case]:
    """The table's rows for a class of transformers. `answer` takes model, pixels, and whether positions are stretched.

    `oblong` is the non-square size. With `square`, its files are for square images only, and a non-square one is
    another size too.
    """

    def make(view: str) -> Callable[[Path], Made]:
        def write(folder: Path) -> Made:
            size = oblong if view == "non-square" else SIZES[view]
            stretched = view == "other size" or (square and view == "non-square")
            made_for = (32, 32) if stretched else size
            sides: Mapping[str, Any] = {"image_size": made_for[0] if made_for[0] == made_for[1] else list(made_for)}
            model = spread(build(config(**{**LITTLE_HUB, **settings, **sides})))
            model.save_pretrained(folder)
            with torch.no_grad():
                expected = answer(model, pixels_of(size), stretched)
            return Made(folder, {"image_size": size} if stretched else {}, pixels_of(size), expected)

        return write

    return [Case(kind, "transformers", view, layout, make(view)) for view in VIEWS]


def stretching(model: nn.Module, pixels: Tensor, stretched: bool) -> Any:
    """What a model gives that stretches positions only when it is told to."""
    return model(pixels, interpolate_pos_encoding=stretched)
