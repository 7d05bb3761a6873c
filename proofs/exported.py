"""Every family and every task through ONNX Runtime and OpenVINO, from image files: a table of agreement.

    python proofs/exported.py [--kinds vit swin …] [--tasks classify detect segment]

Small networks of every kind with random weights of which all matter, those of the tests, are exported each way and go
through the gate: thirteen pictures of odd sizes and two photographs, from file to answer, beside `predict`. Then a
program is written whose last matrix is one hundredth too large, which the gate has to notice. Prints a row for each.
"""

import argparse
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from sightline.errors import UserError, WorkError
from sightline.images.preprocess import Preprocess
from sightline.inference import export as exporting
from sightline.inference.predictor import Predictor
from test_networks import KINDS, small

CONTRACT = Preprocess(size=(33, 47), resize_size=(37, 53), kernel="pillow", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
LABELS = ["a", "b", "c", "d", "e"]
WAYS = (("onnx", "image"), ("onnx", "pixels"), ("openvino", "pixels"))
TASKS: dict[str, dict[str, Any]] = {
    "classify": {},
    "detect": {"task": "detect", "hidden_dim": 24, "queries": 7, "encoder_layers": 1, "decoder_layers": 1},
    "segment": {"task": "segment"},
}


def agreement(predictor: Predictor, format: str, given: str) -> str:
    """What the gate says, in a cell."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = exporting.export(predictor, folder, format=format, input=given).agreement  # ty: ignore[invalid-argument-type]
        except WorkError as fault:
            return f"REFUSED: {fault}"
    ties = f", {found.ties} ties" if found.ties else ""
    return f"{found.top1:.0%} of {found.pictures}{ties}, {found.difference:.1e}"


def sabotaged(predictor: Predictor) -> bool:
    """Whether the gate notices a program whose last matrix is another than the network's."""
    traced = exporting._traced

    def spoiled(*given: Any) -> Any:
        last = [parameter for parameter in predictor.network.parameters() if parameter.ndim > 1][-1]
        with torch.no_grad():
            before = last.clone()
            last.mul_(1.01)
            program = traced(*given)
            program.state_dict.update({name: value.clone() for name, value in program.state_dict.items()})
            last.copy_(before)  # the program has its own copy of what was spoiled
        return program

    exporting._traced = spoiled
    try:
        return agreement(predictor, "onnx", "image").startswith("REFUSED")
    finally:
        exporting._traced = traced


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    told = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{'kind':20} {'task':9} " + " ".join(f"{' '.join(way):32}" for way in WAYS) + " sabotage")
    failed = 0
    for kind in told.kinds:
        for task in told.tasks:
            try:
                predictor = Predictor(small(kind, **TASKS[task]), CONTRACT, LABELS)
            except UserError as fault:
                print(f"{kind:20} {task:9} not possible: {fault}", flush=True)
                continue
            cells = [agreement(predictor, *way) for way in WAYS]
            caught = sabotaged(predictor)
            failed += sum(cell.startswith("REFUSED") for cell in cells) + (not caught)
            print(
                f"{kind:20} {task:9} " + " ".join(f"{c:32}" for c in cells) + f" {'caught' if caught else 'MISSED'}",
                flush=True,
            )
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
