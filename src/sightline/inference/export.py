"""Models as programs for other runtimes, with the pixel contract inside, written only where they answer as predict."""

import json
import logging
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from sightline.checkpoints.atomic import write_atomic
from sightline.errors import UserError, WorkError, printable
from sightline.images.program import PixelProgram
from sightline.inference.gate import TOLERANCE, Agreement, draw_pictures, judge, photographs
from sightline.inference.outputs import Outputs, outputs_of
from sightline.inference.predictor import Predictor
from sightline.inference.runtimes import RUNTIMES

Format = Literal["onnx", "openvino", "torch"]
Input = Literal["image", "pixels"]

OPSET = 20
"""The version of ONNX's operators that is written, of 2023."""

_MOST_BYTES = 2**31 - 2**24  # one ONNX file holds less than 2 GiB
_LONGEST = 2**20


@dataclass(frozen=True)
class Exported:
    """What was written: the program's files, `labels.json`, and how far the program agrees with `predict`."""

    files: tuple[Path, ...]
    labels: Path
    agreement: Agreement
    input: Input
    outputs: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of the program."""
        return sum(path.stat().st_size for path in self.files)


class PictureProgram(nn.Module):
    """A decoded upright picture to what its task answers."""

    def __init__(self, network: nn.Module, pixels: PixelProgram, outputs: Outputs):
        super().__init__()
        self.network, self.prepare, self.outputs = network, pixels, outputs

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        pixels, sides = self.prepare(image)
        return self.outputs.compute(self.network(pixels), sides)


class PixelsProgram(nn.Module):
    """A batch of prepared pixels to the network's own output."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        output = self.network(pixels)
        return (output,) if isinstance(output, Tensor) else tuple(output)


def export(
    predictor: Predictor,
    path: str | Path,
    *,
    format: Format = "onnx",
    input: Input = "image",
    pictures: Sequence[str | Path] = (),
    tolerance: float = TOLERANCE,
) -> Exported:
    """Writes a model as a program for another runtime, and `labels.json` beside it: the class names in order.

    `path` is the file, or a folder for `model.onnx` (`.xml`, `.pt2`). With `input="image"` the program takes one
    decoded upright picture, uint8 [h, w, 3] of any size; with "pixels" a batch of float32 [b, 3, h, w] as `Preprocess`
    gives it. Pictures that are made on the spot, and `pictures` besides, go from file to answer through `predict` and
    through the program in its own runtime. Raises WorkError where the answers differ by more than `tolerance`,
    UserError for what cannot be exported; nothing is then written.
    """
    runtime = RUNTIMES[format]
    architecture = predictor.network.architecture
    outputs = outputs_of(architecture.task)
    if not predictor.labels:
        raise UserError("this model has no classes to answer with: name --labels, or train a classifier first")
    if predictor.network.backbone.merges:
        raise UserError("a model that merges tokens is computed by torch alone: export it without merging")
    if predictor.device.type != "cpu" or predictor.precision != torch.float32:
        raise UserError("a program is exported from a model on the processor in fp32: --device cpu --precision fp32")
    if format == "openvino" and input == "image":
        raise UserError(
            "OpenVINO computes float64 as float32, so that it cannot give the same pixels to the bit: "
            "use --input pixels, or --format onnx"
        )
    weights = sum(values.nbytes for values in predictor.network.state_dict().values())
    if format != "torch" and weights > _MOST_BYTES:
        raise UserError(f"the weights have {weights:,} bytes, and one ONNX file holds less than 2 GiB: --format torch")
    runtime.parts()
    names = outputs.names if input == "image" else outputs.plain
    target = _target(Path(path), runtime.suffix)
    with tempfile.TemporaryDirectory(prefix="sightline-export-") as room:
        fresh = Path(room, f"program{runtime.suffix}")
        drawn = Path(room, "pictures")
        drawn.mkdir()
        shown = [*draw_pictures(drawn), *photographs(), *map(Path, pictures)]
        # Folding constants spoils the graphs of some networks (T2T's Performer): those are written as they are.
        for fold in (True, False) if format != "torch" else (True,):
            program = _traced(predictor, outputs, input)
            _write(program, fresh, format, names, _about(predictor, input, names), fold)
            loaded = runtime(fresh, names)
            try:
                agreement = judge(loaded, predictor, outputs, shown, prepared=input == "pixels", tolerance=tolerance)
                break
            except WorkError as fault:
                refused = fault
            finally:
                del loaded
        else:
            raise refused
        files = []
        for part in sorted(Path(room).glob("program.*"), key=lambda part: part.suffix == runtime.suffix):
            files.append(target.with_suffix(part.suffix))
            write_atomic(files[-1], part.read_bytes())
    labels = target.with_name("labels.json")
    write_atomic(labels, (json.dumps(predictor.labels, ensure_ascii=False, indent=1) + "\n").encode())
    return Exported(tuple(files[::-1]), labels, agreement, input, names)


def _target(path: Path, suffix: str) -> Path:
    if path.suffix == suffix and not path.is_dir():
        return path
    if path.suffix in {runtime.suffix for runtime in RUNTIMES.values()} or path.is_file():
        raise UserError(f"{printable(path)} should be a folder, or a file that ends with {suffix}")
    return path / f"model{suffix}"


def _about(predictor: Predictor, input: Input, names: tuple[str, ...]) -> dict[str, str]:
    """What the file says about itself, as text."""
    preprocess = predictor.preprocess
    return {
        "sightline.task": predictor.network.architecture.task,
        "sightline.model": predictor.network.architecture.name,
        "sightline.input": input,
        "sightline.outputs": ",".join(names),
        "sightline.preprocess": json.dumps(preprocess.to_json()),
        "sightline.fingerprint": preprocess.fingerprint,
    }


def _traced(predictor: Predictor, outputs: Outputs, input: Input) -> ExportedProgram:
    """The network and what stands before and behind it as one graph. Raises WorkError where torch cannot follow it."""
    size, network = predictor.preprocess.size, predictor.network.eval()
    if input == "image":
        program: nn.Module = PictureProgram(network, PixelProgram(predictor.preprocess), outputs)
        example = torch.zeros(61, 97, 3, dtype=torch.uint8)
        free = {0: Dim("height", min=1, max=_LONGEST), 1: Dim("width", min=1, max=_LONGEST)}
    else:
        if predictor.preprocess.resize == "native":
            raise UserError("resize 'native' gives every picture a size of its own, and an exported network has one")
        program = PixelsProgram(network)
        example = torch.zeros(3, 3, *size)
        free = {0: Dim("batch", min=1, max=_LONGEST)}
    try:
        # The plain form of attention: fused kernels leave memory in an order that their translation does not keep.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(program.eval(), (example,), dynamic_shapes=(free,), strict=False)
    except (RuntimeError, ValueError) as fault:
        raise WorkError(f"torch.export cannot follow this network: {printable(fault, 400)}") from fault


def _write(
    program: ExportedProgram, path: Path, format: Format, names: tuple[str, ...], about: dict[str, str], fold: bool
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if format == "torch":
            torch.export.save(program, path, extra_files=about)
            return
        logging.getLogger("onnxscript").setLevel(logging.ERROR)  # what it cannot fold is of no interest
        try:
            with sdpa_kernel(SDPBackend.MATH):
                onnx: Any = torch.onnx.export(
                    program, dynamo=True, opset_version=OPSET, output_names=list(names), optimize=fold, verbose=False
                )
        except torch.onnx.OnnxExporterError as fault:
            raise WorkError(f"this network cannot be written as ONNX: {printable(fault, 400)}") from fault
        onnx.model.metadata_props.update(about)
        if format == "onnx":
            onnx.save(path)
            return
        openvino: Any = import_module("openvino")  # an extra of its own, which few have
        with tempfile.TemporaryDirectory(prefix="sightline-export-") as room:
            between = Path(room, "model.onnx")
            onnx.save(between)
            openvino.save_model(openvino.convert_model(between), path, compress_to_fp16=False)
