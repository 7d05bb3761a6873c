"""Google's `.npz` files: those of the original JAX code (vision_transformer, AugReg, BiT) and those of big_vision."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import Tensor

from sightline.checkpoints.library import Library
from sightline.checkpoints.rules import Found
from sightline.checkpoints.scheme import Bundle, Content, Reading, Request, Scheme, Stored
from sightline.errors import UserError, printable
from sightline.images.preprocess import Preprocess
from sightline.registry import variants

_PREFIXES = ("params/img/", "opt/target/", "params/", "")
_STATE = ("opt/", "extra/", "params/t", "params/b")  # optimiser state, and big_vision's text tower and temperature
_HALF = (0.5, 0.5, 0.5)


class Google(Library):
    """The layout of the original code."""

    name = "google"
    before: ClassVar[str] = ""
    """What is put before every name that is written."""

    def clean(self, stored: Stored) -> Found:
        return _flattened(_unstacked(_unprefixed(stored)))

    def recognises(self, stored: Stored) -> bool:
        return stored.contents.kind == "npz" and super().recognises(stored)

    def read(self, stored: Stored, request: Request) -> Reading:
        found = self.clean(stored)
        _refuse_strangers(found)
        layout = self.matching(found)
        assert layout is not None, "what nobody recognises comes to no scheme"
        reading = self.reading(found, layout, request)
        # The original evaluates on a plain square resize; published rows of that name say what timm's users expect.
        size, row = reading.architecture.backbone.image_size, variants().get(request.architecture or "")
        preprocess = Preprocess(size, resize="squash", interpolation="bilinear", mean=_HALF, std=_HALF)
        if row is not None and row.preprocess:
            preprocess = Preprocess.from_json({"size": size, **row.preprocess})
        return replace(reading, preprocess=preprocess)

    def files(self, bundle: Bundle, tensors: Mapping[str, Tensor], out: Path) -> dict[Path, Content]:
        if out.suffix.lower() != ".npz":
            raise UserError(f"{printable(out)}: Google's weights are one file that ends in .npz")
        arrays = {self.before + name: tensor.numpy() for name, tensor in tensors.items()}

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)

        return {out: write}


class BigVision(Google):
    """The layout of big_vision."""

    name = "big_vision"
    before = "params/"


def _unprefixed(stored: Stored) -> Found:
    """The parameters alone, without the name of the tree that they hang on."""
    tensors = stored.contents.tensors
    prefix = next(p for p in _PREFIXES if (p and f"{p}embedding/kernel" in tensors) or p == "")
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    outside = [name for name in tensors if not name.startswith(prefix)]
    dropped = tuple(name for name in outside if name.startswith(_STATE))
    strays = {name: tensors[name] for name in outside if name not in dropped}
    return Found(stored.where, {**inside, **strays}, prefix, {name: name for name in strays}, dropped)


def _unstacked(found: Found) -> Found:
    """A tree whose blocks are stacked on a first axis, as big_vision's scan does it, taken apart."""
    stack = "Transformer/encoderblock/"
    stacked = {name: tensor for name, tensor in found.tensors.items() if name.startswith(stack)}
    if not stacked:
        return found
    depths = {tensor.shape[0] if tensor.ndim else 0 for tensor in stacked.values()}
    if len(depths) != 1 or max(depths) == 0:
        raise UserError(f"{found.where}: the stacked blocks '{found.prefix}{stack}…' differ in their number of layers")
    tensors = {name: tensor for name, tensor in found.tensors.items() if name not in stacked}
    disk = dict(found.disk)
    for name, tensor in stacked.items():
        for i, layer in enumerate(tensor):
            own = f"Transformer/encoderblock_{i}/{name.removeprefix(stack)}"
            tensors[own], disk[own] = layer, f"{found.prefix}{name}[{i}]"
    return Found(found.where, tensors, found.prefix, disk, found.dropped)


def _flattened(found: Found) -> Found:
    """Norms of one axis, where old files have them as [1, 1, 1, channels]."""
    flat = {
        name: tensor.flatten()
        for name, tensor in found.tensors.items()
        if name.endswith(("/scale", "/bias")) and tensor.ndim == 4 and tuple(tensor.shape[:3]) == (1, 1, 1)
    }
    return replace(found, tensors={**found.tensors, **flat})


def _refuse_strangers(found: Found) -> None:
    """Refuses, by its name, what is a model of its own."""
    names = [name for name in found.tensors if name.startswith("MAPHead_0/")]
    if names:
        what = "an attention pooling head (MAP)"
        raise UserError(f"{found.where} has {what}, which this Vision Transformer lacks: {found.named(names[0])}")


SCHEMES: Mapping[str, Scheme] = {"google": Google(), "big_vision": BigVision()}
