"""Who takes part: the network as Sightline computes it, as others have it, and as a program of other runtimes."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sightline.benching.peers import PEERS
from sightline.benching.rounds import Contender
from sightline.benching.tables import CLASSES, OURS, Plan
from sightline.device import INT8
from sightline.errors import UserError, WorkError, printable
from sightline.images.preprocess import Preprocess
from sightline.inference.export import Format, export
from sightline.inference.predictor import Predictor, Ready
from sightline.inference.quantised import calibrated, multiplies_int8
from sightline.inference.runtimes import RUNTIMES, OpenVinoProgram, Runtime
from sightline.model import Model
from sightline.network import Architecture, Network, count_parameters


class Precision(NamedTuple):
    """What others compute in, and how `predict` computes long jobs in it.

    `own` is what Sightline multiplies, where others have nothing like it; its products are the peak then.
    """

    dtype: torch.dtype
    ours: Callable[[Model, Plan], Predictor]
    own: torch.dtype | None = None


def _predicting(precision: str) -> Callable[[Model, Plan], Predictor]:
    def made(model: Model, plan: Plan) -> Predictor:
        batch = max(plan.batch_sizes)
        return model.predictor(device=str(plan.device), precision=precision, batch_size=batch, pack=True)

    return made


def _in_8_bits(model: Model, plan: Plan) -> Predictor:
    if plan.device.type != "cpu" or not multiplies_int8():
        raise UserError(f"{plan.device} does not multiply 8-bit numbers here: leave int8 out of --precision")
    predictor = _predicting("bf16")(model, plan)
    grids = calibrated(model.network, [_stacked(noise(predictor, CALIBRATING))])
    return predictor.altered(precision=torch.int8, grids=grids)


CALIBRATING = 8
"""Images without meaning whose ranges 8 bits are made for: enough for speed, which does not depend on them."""

PRECISIONS: Mapping[str, Precision] = {
    "fp32": Precision(torch.float32, _predicting("fp32")),
    "bf16": Precision(torch.bfloat16, _predicting("bf16")),
    "fp16": Precision(torch.float16, _predicting("fp16")),
    INT8: Precision(torch.bfloat16, _in_8_bits, torch.int8),
}
"""What there is to ask for."""


def shared(plan: Plan) -> list[str]:
    """Those of a plan's precisions in which others compute, too, and in which networks learn."""
    return [name for name in plan.precisions if PRECISIONS[name].own is None]


PROGRAMS: Mapping[str, tuple[Format, str]] = {
    "onnx": ("onnx", "ONNX Runtime"),
    "openvino": ("openvino", "OpenVINO"),
}
"""Runtimes on the processor that take a program of `sightline export`, and what they are called."""


class Entrant(NamedTuple):
    """A contender for any batch: `work` is given prepared images and gives what computes them."""

    name: str
    parameters: int
    work: Callable[[Sequence[Ready]], Callable[[], object]]

    def on(self, images: Sequence[Ready]) -> Contender:
        """The contender for these images."""
        return Contender(self.name, self.work(images))


def model_of(network: Network) -> Model:
    """The network with pixels and classes, which are not what is measured."""
    size = network.backbone.config.image_size
    return Model(network.eval(), Preprocess(size=size), [str(i) for i in range(CLASSES)])


def noise(predictor: Predictor, count: int) -> list[Ready]:
    """Images without meaning, as the network reads them, where it computes."""
    pictures = np.random.default_rng(0).integers(0, 256, (count, *predictor.preprocess.size, 3), dtype=np.uint8)
    prepared = [predictor.prepare(picture) for picture in pictures]
    ready = [one for one in prepared if isinstance(one, Ready)]
    return [replace(one, pixels=one.pixels.to(predictor.device)) for one in ready]


def ours(predictor: Predictor) -> Entrant:
    """The network as `predict` computes it."""
    parameters = count_parameters(predictor.network)
    return Entrant(OURS, parameters, lambda images: partial(predictor.compute, images, features=False))


def others(plan: Plan, architecture: Architecture, precision: str) -> tuple[list[Entrant], list[str]]:
    """The network of each peer that has it, in each of the settings that its users take; remarks about the rest.

    Weights in the precision that is asked for, and autocast where that is half; the channels last where most layers are
    convolutions; compiled, with weights that are constants on the processor, where the plan asks for it.
    """
    found, notes = list[Entrant](), list[str]()
    dtype = PRECISIONS[precision].dtype
    if PRECISIONS[precision].own is not None and plan.peers:
        notes.append("others compute in bf16 here")
    for name in plan.peers:
        peer = PEERS[name]

        def fresh(dtype: torch.dtype = dtype, make: Any = peer.network) -> nn.Module:
            return make(architecture, CLASSES).to(plan.device, dtype).eval()

        if (network := peer.network(architecture, CLASSES)) is None:
            notes.append(f"{name} {peer.version} has no {architecture.name} like this")
            continue
        network = network.to(plan.device, dtype).eval()
        found.append(_passing(name, network, plan, dtype))
        if dtype != torch.float32:
            found.append(_passing(f"{name}, autocast", fresh(torch.float32), plan, torch.float32, autocast=dtype))
        if _convolves(network):
            last: Any = torch.channels_last
            found.append(_passing(f"{name}, channels last", fresh().to(memory_format=last), plan, dtype, form=last))
        if plan.compiled:
            options = {"freezing": True} if plan.device.type == "cpu" else None
            twin = fresh()
            twin.compile(dynamic=False, options=options)
            found.append(_passing(f"{name}, compiled", twin, plan, dtype))
    return found, notes


def _convolves(network: nn.Module) -> bool:
    """Whether most layers are convolutions."""
    kinds = [type(part) for part in network.modules()]
    return kinds.count(nn.Conv2d) > kinds.count(nn.Linear)


def _passing(
    name: str,
    network: nn.Module,
    plan: Plan,
    dtype: torch.dtype,
    *,
    autocast: torch.dtype | None = None,
    form: torch.memory_format = torch.contiguous_format,
) -> Entrant:
    def work(images: Sequence[Ready]) -> Callable[[], object]:
        pixels = _stacked(images).to(plan.device, dtype).contiguous(memory_format=form)

        def passed() -> None:
            with torch.inference_mode(), torch.autocast(plan.device.type, autocast, enabled=autocast is not None):
                network(pixels).float().cpu()

        return passed

    return Entrant(name, count_parameters(network), work)


class Programs:
    """Sightline's network as programs, each written once: what `predict --runtime NAME` computes with.

    `notes` say what is missing and why.
    """

    def __init__(self, model: Model, plan: Plan):
        self.notes: list[str] = []
        self.parameters = count_parameters(model.network)
        self.files: dict[str, tuple[Any, tuple[str, ...]]] = {}
        self.room = tempfile.TemporaryDirectory(prefix="sightline-bench-")
        for name in plan.runtimes if plan.device.type == "cpu" else ():
            form, called = PROGRAMS[name]
            try:
                predictor = model.predictor(device="cpu", precision="fp32")
                done = export(predictor, f"{self.room.name}/{name}", format=form, input="pixels")
                self.files[name] = done.files[0], done.outputs
            except (UserError, WorkError) as fault:
                self.notes.append(f"{called} is left out: {printable(fault, 300)}")
        if plan.runtimes and plan.device.type != "cpu":
            self.notes.append("programs are measured on the processor alone, and left out")

    def entrants(self, precision: str) -> tuple[list[Entrant], list[str]]:
        """Those that compute in this precision, and remarks."""
        found, notes = list[Entrant](), list(self.notes)
        for name, (path, outputs) in self.files.items():
            called = f"sightline's export in {PROGRAMS[name][1]}"
            if precision == "fp32":
                runtime = RUNTIMES[PROGRAMS[name][0]](path, outputs)
            elif PRECISIONS[precision].dtype == torch.bfloat16 and name == "openvino":
                runtime = OpenVinoProgram(path, outputs, precision="bf16")
            else:
                notes.append(f"{PROGRAMS[name][1]} computes this program in fp32 alone, and is left out in {precision}")
                continue
            found.append(Entrant(called, self.parameters, partial(_running, runtime)))
        return found, notes

    def close(self) -> None:
        """Removes the files."""
        self.room.cleanup()


def _running(runtime: Runtime, images: Sequence[Ready]) -> Callable[[], object]:
    pixels = np.ascontiguousarray(_stacked(images).numpy())
    return partial(runtime.run, pixels)


def _stacked(images: Sequence[Ready]) -> Tensor:
    return torch.stack([image.pixels for image in images])
