"""Who takes part: the network as Sightline computes it, as others have it, and as a program of other runtimes."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sightline.benching.apart import Side
from sightline.benching.ceilings import timer_of
from sightline.benching.peers import network_of
from sightline.benching.tables import CLASSES, OURS, Plan
from sightline.device import INT8, keep_for_next
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
    predictor = _predicting("bf16")(model, plan)
    images = noise(predictor, CALIBRATING)
    grids = calibrated(model.network, [torch.stack([image.pixels for image in images])])
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


def computable(plan: Plan) -> None:
    """Raises UserError where 8 bits are asked for, and the device does not multiply them."""
    if INT8 in plan.precisions and (plan.device.type != "cpu" or not multiplies_int8()):
        raise UserError(f"{plan.device} does not multiply 8-bit numbers here: leave int8 out of --precision")


PROGRAMS: Mapping[str, tuple[Format, str]] = {
    "onnx": ("onnx", "ONNX Runtime"),
    "openvino": ("openvino", "OpenVINO"),
}
"""Runtimes on the processor that take a program of `sightline export`, and what they are called."""


class Entrant:
    """A contender for any batch: `prepare` is given the number of images, and gives what computes them."""

    def __init__(self, parameters: int, prepare: Callable[[int], Callable[[], object]]):
        self.parameters, self.prepared = parameters, cache(prepare)

    def __call__(self, batch: int) -> object:
        return self.prepared(batch)()


def seconds_of(made: Callable[..., object], device: torch.device, *given: object) -> float:
    """What a contender needs for what it is given, in its own process."""
    return timer_of(device)(partial(made, *given))


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


def ours(plan: Plan, precision: str) -> Side:
    """The network as long jobs of `predict` compute it."""
    return Side(OURS, OURS, partial(_ours, plan, precision))


def _ours(plan: Plan, precision: str) -> Entrant:
    keep_for_next()
    predictor = PRECISIONS[precision].ours(model_of(plan.architecture().build()), plan)
    images = noise(predictor, max(plan.batch_sizes))
    return Entrant(
        count_parameters(predictor.network),
        lambda batch: partial(predictor.compute, images[:batch], features=False),
    )


def others(plan: Plan, precision: str) -> tuple[list[Side], list[str]]:
    """The network of each peer, in each of the settings that its users take; remarks about them.

    Weights in the precision that is asked for, and autocast where that is half; the channels last where most layers are
    convolutions; compiled, with weights that are constants on the processor, where the plan asks for it.
    """
    dtype, own = PRECISIONS[precision].dtype, PRECISIONS[precision].own
    settings: dict[str, dict[str, Any]] = {"": {}}
    if dtype != torch.float32:
        settings[", autocast"] = {"autocast": True}
    if _convolves(plan.architecture()):
        settings[", channels last"] = {"form": torch.channels_last}
    if plan.compiled:
        settings[", compiled"] = {"compiled": True}
    found = [
        Side(f"{name}{said}", name, partial(_passing, name, plan, dtype, **setting))
        for name in plan.peers
        for said, setting in settings.items()
    ]
    return found, ["others compute in bf16 here"] if own is not None and found else []


def _convolves(architecture: Architecture) -> bool:
    """Whether most layers are convolutions."""
    with torch.device("meta"):
        parts = list(architecture.build().modules())
    return sum(isinstance(part, nn.Conv2d) for part in parts) > sum(isinstance(part, nn.Linear) for part in parts)


def _passing(
    name: str,
    plan: Plan,
    dtype: torch.dtype,
    *,
    autocast: bool = False,
    form: torch.memory_format = torch.contiguous_format,
    compiled: bool = False,
) -> Entrant:
    network = network_of(name, plan.architecture(), CLASSES)
    own = torch.float32 if autocast else dtype
    network = network.to(plan.device, own).to(memory_format=form).eval()
    if compiled:
        network.compile(dynamic=False, options={"freezing": True} if plan.device.type == "cpu" else None)

    def prepare(batch: int) -> Callable[[], object]:
        pixels = _pixels(plan, batch).to(plan.device, own).contiguous(memory_format=form)

        def passed() -> None:
            with torch.inference_mode(), torch.autocast(plan.device.type, dtype, enabled=autocast):
                network(pixels).float().cpu()

        return passed

    return Entrant(count_parameters(network), prepare)


class Programs:
    """Sightline's network as programs, each written once: what `predict --runtime NAME` computes with.

    `notes` say what is missing and why.
    """

    def __init__(self, model: Model, plan: Plan):
        self.notes: list[str] = []
        self.plan, self.parameters = plan, count_parameters(model.network)
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

    def sides(self, precision: str) -> tuple[list[Side], list[str]]:
        """Those that compute in this precision, and remarks."""
        found, notes = list[Side](), list(self.notes)
        for name, (path, outputs) in self.files.items():
            called = f"sightline's export in {PROGRAMS[name][1]}"
            if precision == "fp32":
                make = partial(RUNTIMES[PROGRAMS[name][0]], path, outputs)
            elif PRECISIONS[precision].dtype == torch.bfloat16 and name == "openvino":
                make = partial(OpenVinoProgram, path, outputs, precision="bf16")
            else:
                notes.append(f"{PROGRAMS[name][1]} computes this program in fp32 alone, and is left out in {precision}")
                continue
            found.append(Side(called, name, partial(_running, make, self.plan, self.parameters)))
        return found, notes

    def close(self) -> None:
        """Removes the files."""
        self.room.cleanup()


def _running(make: Callable[[], Runtime], plan: Plan, parameters: int) -> Entrant:
    runtime = make()
    return Entrant(parameters, lambda batch: partial(runtime.run, _pixels(plan, batch).numpy()))


def _pixels(plan: Plan, batch: int) -> Tensor:
    return torch.randn(batch, 3, *plan.architecture().backbone.image_size)
