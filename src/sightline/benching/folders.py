"""Folders of JPEGs to labels, as `predict` does it, beside transformers' pipeline and timm with a DataLoader."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from operator import call
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from sightline.benching.apart import Processes, Side
from sightline.benching.ceilings import Machine
from sightline.benching.contenders import PRECISIONS, shared
from sightline.benching.peers import network_of
from sightline.benching.rounds import Contender, take_turns
from sightline.benching.tables import CLASSES, OURS, Plan, Table, rows_of
from sightline.checkpoints.convert import convert
from sightline.device import INT8, computing_with
from sightline.errors import UserError, printable
from sightline.evaluation.cache import Cache
from sightline.images.decode import decode
from sightline.images.preprocess import Preprocess
from sightline.inference.choose import Chosen, choose
from sightline.model import Model, load
from sightline.network import count_parameters

FOLDERS: Mapping[str, tuple[int, int, int]] = {"small": (375, 500, 200), "large": (3000, 4000, 50)}
"""Height, width and usual number of the JPEGs."""

OWN: Mapping[str, Mapping[str, Any]] = {
    OURS: {},
    f"{OURS}, fp32": {"precision": "fp32"},
    f"{OURS}, --draft": {"draft": True},
}
"""Ways of `predict`, and what they ask `choose` for; the first is held against all others."""

ASKED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    # Answers of random weights nearly tie: what 8 bits do to answers has to be measured on trained ones.
    INT8: (f"{OURS}, {INT8}", {"precision": INT8, "agreement": 0.001}),
}
"""Those that are measured where their precision is asked for."""

BATCH = 8
"""At which the pipeline of transformers is best on processors."""


def predict(plan: Plan, machine: Machine) -> Iterator[Table]:
    """Paths to top-1 labels: reading, resizing and the network, all of it; drawn pictures, random weights."""
    with tempfile.TemporaryDirectory(prefix="sightline-bench-") as folder:
        room = Path(folder)
        model = _saved(plan, room)
        sides, notes = _sides(plan, room)
        with Processes() as processes:
            found, absent = processes.present(sides)
            for kind, (height, width, usual) in FOLDERS.items():
                count = plan.images or usual
                paths = draw(room / kind, height, width, count)
                answers: dict[str, _Answers] = {}
                contenders = [
                    Contender(side.name, partial(_noted, answers, processes, side, paths)) for side, _ in found
                ]
                timed = take_turns(contenders, plan.rounds)
                title = f"predict, {plan.model}, {count} JPEGs of {width}×{height}"
                told = [*notes, *absent, _agreement(answers), _shares(model, paths[0], plan)]
                told += [f"{name}: {given.why}" for name, given in answers.items() if given.why]
                rows = rows_of(timed, [size for _, size in found], count)
                yield Table("predict", title, count, ",".join(plan.precisions), rows, notes=told)


class _Answers(NamedTuple):
    """The label of each path, and why it was computed as it was."""

    labels: list[str]
    why: str = ""


def draw(folder: Path, height: int, width: int, count: int) -> list[str]:
    """JPEGs of quality 90 with waves and grain: about as many bytes as photographs have."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    waves = [np.sin(y / rng.uniform(9, 90) + x / rng.uniform(9, 90) + rng.uniform(0, 6)) for _ in range(3)]
    grain = rng.normal(0, 6, (height, width, 1)).astype(np.float32)
    picture = np.clip(128 + 80 * np.stack(waves, axis=-1) + grain, 0, 255).astype(np.uint8)
    paths = []
    for i in range(count):
        paths.append(str(folder / f"{i:06d}.jpg"))
        Image.fromarray(np.roll(picture, (37 * i, 53 * i), axis=(0, 1))).save(paths[-1], quality=90)
    return paths


def _noted(answers: dict[str, _Answers], processes: Processes, side: Side, paths: list[str]) -> None:
    answers[side.name] = processes.ask(side, call, paths)


def _agreement(answers: Mapping[str, _Answers]) -> str:
    """How many labels are those of the first in plain fp32, where weights are the same."""
    base = answers[f"{OURS}, fp32"].labels
    shares = []
    for name, found in answers.items():
        if name != f"{OURS}, fp32" and not name.startswith("timm"):  # which draws weights of its own
            same = sum(a == b for a, b in zip(found.labels, base, strict=True)) / len(base)
            shares.append(f"{name} {same:.1%}")
    return f"the same labels as in fp32: {'; '.join(shares)}"


def _saved(plan: Plan, room: Path) -> Model:
    """The network with random weights, as a model directory of ours and, where it can be, as one of transformers."""
    network = plan.architecture().build()
    for parameter in network.head.classifier.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    half = (0.5, 0.5, 0.5)
    size = network.backbone.config.image_size
    contract = Preprocess(size, resize="squash", interpolation="bilinear", mean=half, std=half)
    Model(network.eval(), contract, tuple(f"class {i}" for i in range(CLASSES))).save(room / "ours")
    return load(room / "ours")


def _sides(plan: Plan, room: Path) -> tuple[list[Side], list[str]]:
    """The contenders, and remarks about those that are left out."""
    own = {**OWN, **dict(ASKED[name] for name in plan.precisions if name in ASKED)}
    found = [Side(name, OURS, partial(_Ours, room, plan, **told)) for name, told in own.items()]
    low = [PRECISIONS[name].dtype for name in shared(plan) if name != "fp32"]
    notes = []
    if "transformers" in plan.peers:
        try:
            convert(str(room / "ours"), "transformers", room / "theirs")
        except UserError as fault:
            notes.append(f"transformers is left out: {printable(fault, 200)}")
        else:
            ways: list[tuple[str, dict[str, Any]]] = [("transformers' pipeline", {})]
            ways += [(f"transformers' pipeline, batches of {BATCH}", {"batch_size": BATCH})]
            ways += [(f"{ways[1][0]}, {_short(dtype)}", {"batch_size": BATCH, "dtype": dtype}) for dtype in low]
            found += [
                Side(name, "transformers", partial(_Pipeline, room / "theirs", plan, **told)) for name, told in ways
            ]
    if "timm" in plan.peers:
        for workers in (0, 2):
            for dtype in (torch.float32, *low):
                name = f"timm, {workers} workers" + ("" if dtype == torch.float32 else f", {_short(dtype)}")
                found.append(Side(name, "timm", partial(_Timm, plan, dtype, workers)))
    return found, notes


def _short(dtype: torch.dtype) -> str:
    return next(name for name, row in PRECISIONS.items() if row.dtype == dtype)


class _Ours:
    """What `sightline predict` does, with the model loaded."""

    def __init__(self, room: Path, plan: Plan, *, draft: bool = False, **asked: Any):
        model = _loaded(room)
        given = replace(model, preprocess=model.preprocess.replace(draft=True)) if draft else model
        precision = asked.get("precision", "auto")
        self.predictor = given.predictor(
            device=str(plan.device), top=1, precision="fp32" if precision in ASKED else precision
        )
        self.parameters = count_parameters(model.network)
        self.asked: dict[str, Any] = {"precision": precision, "cache": Cache(room / "speeds", 2**20), **asked}
        self.chosen = Chosen(self.predictor, ())  # kept, as those of others, whose weights lie ready in their precision

    def __call__(self, paths: list[str]) -> _Answers:
        self.chosen = choose(self.predictor, paths, **self.asked)
        labels = []
        for answer in self.chosen.predictor.predict(self.chosen.sources):
            reply: Any = answer.prediction
            assert reply is not None, answer.error
            labels.append(reply.label)
        return _Answers(labels, self.chosen.why)


@cache
def _loaded(room: Path) -> Model:
    return load(room / "ours")


class _Pipeline:
    """Transformers' pipeline, called with a list of paths."""

    def __init__(self, folder: Path, plan: Plan, batch_size: int | None = None, **settings: Any):
        from transformers import pipeline
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.batch = {} if batch_size is None else {"batch_size": batch_size}
        self.pipe: Any = pipeline("image-classification", str(folder), device=str(plan.device), **settings)
        self.parameters = count_parameters(self.pipe.model)

    def __call__(self, paths: list[str]) -> _Answers:
        return _Answers([answer[0]["label"] for answer in self.pipe(paths, **self.batch)])


class _Timm:
    """Timm's transform and dataset, torch's DataLoader, and the network in a loop."""

    def __init__(self, plan: Plan, dtype: torch.dtype, workers: int):
        from timm.data import create_transform, resolve_data_config

        network = network_of("timm", plan.architecture(), CLASSES)
        self.parameters = count_parameters(network)
        size = plan.architecture().backbone.image_size
        self.transform = create_transform(**resolve_data_config({"input_size": (3, *size)}, model=network))
        self.network, self.dtype = network.eval().to(plan.device, dtype), dtype
        self.workers, self.device = workers, plan.device

    def __call__(self, paths: list[str]) -> _Answers:
        from timm.data import ImageDataset
        from torch.utils.data import DataLoader

        dataset: Any = ImageDataset(str(Path(paths[0]).parent), transform=self.transform)
        found = []
        with torch.inference_mode():
            for pixels, _ in DataLoader(dataset, batch_size=16, num_workers=self.workers):
                scores = self.network(pixels.to(self.device, self.dtype))
                found += [f"class {i}" for i in scores.argmax(dim=1).tolist()]
        return _Answers(found)


def _shares(model: Model, path: str, plan: Plan) -> str:
    """What one image costs one thread: decoding, resizing, and the network."""
    image, drafted = decode(path), model.preprocess.replace(draft=True)
    predictor = model.predictor(device=str(plan.device), precision="fp32")
    batch: Any = [predictor.prepare(path)] * BATCH
    parts: dict[str, tuple[Callable[[], Any], int]] = {
        "decoding": (lambda: decode(path), 1),
        "resizing": (lambda: model.preprocess.normalise(model.preprocess.fit(image)), 1),
        "both with --draft": (lambda: drafted(path), 1),
    }
    for name in plan.precisions:
        other = PRECISIONS[name].ours(model, plan).altered(cores=1)
        parts[f"the network in {name}"] = (partial(other.compute, batch, features=False), BATCH)
    with computing_with(1):
        told = [f"{name} {1000 * _best(work) / images:.2f} ms" for name, (work, images) in parts.items()]
    return f"an image on one thread: {', '.join(told)}"


def _best(work: Callable[[], Any], times: int = 5) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)
