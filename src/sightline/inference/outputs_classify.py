"""Exported classifiers answer with logits."""

from typing import Any

from torch import Tensor

from sightline.inference.outputs import Outputs, best, distances


def _logits(output: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return (output[0],)


_ROW = Outputs(("logits",), ("logits",), _logits, _logits, best, distances)

OUTPUTS = {"classify": _ROW, "clip": _ROW}
