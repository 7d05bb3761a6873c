"""Networks of other libraries with random weights, and what they answer: one file for each kind, with its `CASES`."""

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

VIEWS = ("square", "non-square", "other size")
"""A square image, one of unequal sides, and one of another size than the file was made for."""


class Made(NamedTuple):
    """A checkpoint on disk as the other library writes it, and its answer.

    `options` are for `sightline.load`; `expected` is what the other library computes from `pixels` and what is `beside`
    them (texts), after whatever it does itself to get to another image size.
    """

    path: Path
    options: dict[str, Any]
    pixels: Tensor
    expected: Tensor
    beside: tuple[Tensor, ...] = ()


class Case(NamedTuple):
    """One row of the parity table: `make` writes into an empty folder. `layout` is the key of its `LAYOUTS` entry."""

    kind: str
    source: str
    view: str
    layout: str
    make: Callable[[Path], Made]


def cases() -> list[Case]:
    """The `CASES` of every file of this folder."""
    modules = (importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    return [case for module in modules for case in module.CASES]


def spread(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights with which every tensor is felt in the output and no value grows out of bounds; in eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, tensor in sorted([*network.named_parameters(), *network.named_buffers()]):
            if not tensor.is_floating_point() or name.endswith("attn_mask"):
                continue
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.ndim == 1 and name.endswith("weight"):
                tensor.copy_(1 + 0.3 * normal(tensor))
            elif tensor.ndim >= 2 and name.endswith("weight"):
                tensor.copy_(1.3 * normal(tensor) / tensor[0].numel() ** 0.5)
            else:
                tensor.copy_(0.5 * normal(tensor))
    return network.eval()
