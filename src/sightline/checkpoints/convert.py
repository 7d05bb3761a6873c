"""Weights from one ecosystem to another: written so that the other library reads them with nothing left over."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sightline.checkpoints.atomic import write_atomic
from sightline.checkpoints.load import load_bundle
from sightline.checkpoints.rules import save
from sightline.checkpoints.scheme import Bundle, Coverage
from sightline.errors import UserError, WorkError, printable
from sightline.registry import find

TOLERANCE = 1e-5
"""How far the other library's outputs may lie from ours, in units of the largest output."""


@dataclass(frozen=True)
class Conversion:
    """What a conversion did: `read` and `written` say which tensors became which, `files` where they lie.

    `parity` is max|theirs - ours| / max|ours| over the outputs for random pixels, or None where the other library is
    not installed or the format cannot be opened by it alone.
    """

    target: str
    files: tuple[Path, ...]
    read: Coverage
    written: Coverage
    parity: float | None

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {
            "target": self.target,
            "files": [str(path) for path in self.files],
            "read": self.read.to_json(),
            "written": self.written.to_json(),
            "parity": self.parity,
        }

    def describe(self) -> str:
        """The report as a table for people: names on the other side, ours, and shapes."""
        rows = [
            (" + ".join(theirs), " + ".join(ours), " + ".join("×".join(map(str, shape)) for shape in shapes))
            for ours, theirs, shapes in self.written.pairs
        ]
        rows = [(self.target, "sightline", "shape"), *rows]
        first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
        lines = [f"{theirs:<{first}}  {ours:<{second}}  {shape}" for theirs, ours, shape in rows]
        parity = "not checked" if self.parity is None else f"{self.parity:.1e} of the largest output"
        notes = [f"note: {printable(note)}" for note in (*self.read.notes, *self.written.notes)]
        return "\n".join([*lines, f"{self.written.tensors} tensors, 100 % covered; parity: {parity}", *notes])


def convert(source: Bundle | str | Path, to: str, out: str | Path, **options: Any) -> Conversion:
    """Writes a checkpoint in another library's layout and reports on it.

    `to` is a key of the `SCHEMES` tables (`timm`, `transformers`, `google`, `big_vision`, `sightline`). `out` is a
    folder, or a file where the target has bare files. `options` are those of `load_bundle`. Where the other library is
    installed it reads the result and its outputs are compared. Raises UserError for settings that the target cannot
    express, by name, before anything is written; WorkError where writing or the comparison fails.
    """
    scheme, out = find("checkpoints", "SCHEMES", to, "layout"), Path(out)
    bundle = source if isinstance(source, Bundle) else load_bundle(source, **options)
    architecture = bundle.architecture
    refusals = scheme.refusals(architecture, out)
    if refusals:
        stem = any("tokenizer" in refusal for refusal in refusals)
        remedy = "; a network trained with --tokenizer patch can be converted" if stem else ""
        raise UserError(f"{to} cannot express this network: {'; '.join(refusals)}{remedy}")
    rules = scheme.rules(architecture)
    tensors = {**save(rules, bundle.network.state_dict()), **scheme.extras(architecture)}
    files = scheme.files(bundle, tensors, out)
    for path, content in files.items():
        write_atomic(path, content)
    pairs = tuple((rule.ours, rule.theirs, tuple(tuple(tensors[t].shape) for t in rule.theirs)) for rule in rules)
    written = Coverage(pairs, (), tuple(scheme.remarks(bundle, out)))
    return Conversion(to, tuple(files), bundle.coverage, written, _parity(bundle, scheme.reference(bundle, out), to))


def _parity(bundle: Bundle, reference: Any, to: str) -> float | None:
    if reference is None:
        return None
    config = bundle.architecture.backbone
    pixels = torch.randn(2, config.in_chans, *config.image_size, generator=torch.Generator().manual_seed(0))
    inputs = bundle.network.example(pixels)
    with torch.no_grad():
        outputs = bundle.network(*inputs), reference(*inputs)
    parts = [output if isinstance(output, tuple) else (output,) for output in outputs]
    apart = max(_apart(ours, theirs) for ours, theirs in zip(*parts, strict=True))
    if not apart <= TOLERANCE:
        raise WorkError(f"{to} computes other outputs from the converted weights: {apart:.1e} of the largest output")
    return apart


def _apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / ours.abs().max().clamp(min=torch.finfo(ours.dtype).tiny))
