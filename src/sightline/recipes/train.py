"""From a folder of images to a model directory: the whole run, as one function."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sightline.checkpoints.directory import write_model
from sightline.datasets.loader import OrderedLoader, TrainLoader
from sightline.datasets.order import steps_per_epoch
from sightline.datasets.preflight import quick
from sightline.datasets.split import Splits
from sightline.device import pick_device, pick_precision
from sightline.errors import UserError, WorkError, printable
from sightline.evaluation.measure import Measure, weigh
from sightline.model import Model, load
from sightline.network import Network
from sightline.recipes.autopilot import autopilot
from sightline.recipes.recipe import Recipe
from sightline.recipes.task import Task, task_of
from sightline.reports.card import model_card
from sightline.training import loop as teaching
from sightline.training.chart import Finding
from sightline.training.distributed import World, join, leave
from sightline.training.run import RunFolder, environment, locked
from sightline.training.signals import breaking_off

ENDLESS = 2**62
"""More steps than any run has: the loop says when to stop."""

RETOLD = ("refused_limit", "micro_batch", "save_seconds", "workers")
"""Settings that a resumed run may be told anew: they change what it bears, and what it learns in rounding at most."""

CLOSING = 4.0
"""Seconds that the report at the end of a run takes, about; a run by the clock keeps them free."""


@dataclass(frozen=True)
class Trained:
    """What a run left behind. Fractions lie between 0 and 1, `seconds` tell what the time went into.

    `findings` are what the doctor named, in order; `headline` tells the figures that matter most.
    """

    directory: Path
    task: str
    metrics: Mapping[str, float]
    counts: Mapping[str, int]
    seconds: Mapping[str, float]
    findings: Sequence[Finding] = ()
    headline: str = ""

    @property
    def model(self) -> Model:
        """The trained model, read from its directory."""
        return load(self.directory)

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.directory / "report.html"

    def to_json(self) -> dict[str, Any]:
        """The document of `train --json`."""
        return {
            "model": str(self.directory),
            "task": self.task,
            "metrics": dict(self.metrics),
            "counts": dict(self.counts),
            "seconds": dict(self.seconds),
            "findings": [asdict(finding) for finding in self.findings],
            "report": str(self.report),
        }


def train(
    data: str | Path,
    *,
    task: str = "classify",
    model: str | None = None,
    weights: str | Path | None = None,
    out: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    resize: str | None = None,
    recipe: str | None = None,
    resume: bool = False,
    device: str = "auto",
    quiet: bool = True,
    network: Mapping[str, Any] | None = None,
    augment: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Trained:
    """Teaches a network a task and writes its model directory with report and record.

    `data` is what `open_dataset` takes for the task, a key of `TASKS`. `model` is an architecture's name and
    `weights` what `load` takes, or "none" for random ones; what is left out is chosen by the number and size of the
    images. `resize` is how images of other shapes are brought to `image_size`: squash, crop, pad, or native, which
    keeps each image's own aspect ratio at about as many pixels. `recipe` names one of `fine_tune.RECIPES`. `settings`
    are fields of `Settings` (epochs, minutes, lr, seed, …), `augment` those of `Augment`, `network` those of the
    architecture. With `resume` the run in `out` goes on where it was, by its own record; of the settings only those of
    `RETOLD` are asked again. Raises UserError, WorkError, and Interrupted after a signal.
    """
    began, remarks = time.monotonic(), []
    folder = RunFolder(Path(out) if out is not None else Path("runs") / _stem(data))
    with ExitStack() as held:
        world = join(pick_device(device))
        held.callback(leave)
        if resume:
            record = folder.read()
            what = task_of(str(record.get("task")))
            splits = what.open(record["data"]["source"], record["seed"])
            _require_same_data(splits, record, folder)
            chosen = Recipe.from_json(record["recipe"], str(folder.record_file))
            chosen = chosen.told({name: settings[name] for name in RETOLD if name in settings}, {})
            record["recipe"] = chosen.to_json()
            taught = chosen.architecture.build()
        else:
            record = {}
            what = task_of(task)
            folder.require_fresh()
            splits = what.open(data, int(settings.get("seed", 0)))
            chosen, taught, remarks = autopilot(
                splits.train,
                world,
                task=task,
                model=model,
                weights=weights,
                recipe=recipe,
                resize=resize,
                network={**(network or {}), **({} if image_size is None else {"image_size": image_size})},
                settings=settings,
                augment=augment or {},
            )
            if world.first:
                remarks += [finding.line() for finding in quick(splits) if finding.severity != "note"]
        world.agree(None)  # nobody writes before everybody has looked
        if world.first:
            held.enter_context(locked(folder.path))
            if not resume:
                folder.require_fresh()  # somebody may have been quicker
        held.enter_context(_threads(chosen.settings.threads or torch.get_num_threads()))
        spent = time.monotonic() - began
        return _Run(what, folder, splits, chosen, taught, world, quiet).go(resume, record, remarks, spent)


class _Run:
    """One run from its loaders to its report."""

    def __init__(
        self,
        task: Task,
        folder: RunFolder,
        splits: Splits,
        recipe: Recipe,
        network: Network,
        world: World,
        quiet: bool,
    ):
        self.task, self.folder, self.splits, self.recipe, self.network = task, folder, splits, recipe, network
        self.world, self.quiet = world, quiet
        self.latest: Measure | None = None
        self.precision = pick_precision(recipe.settings.precision, world.device)
        self.validation = OrderedLoader(
            splits.val,
            task.prepared(recipe.preprocess),
            batch_size=max(recipe.settings.batch_size, 64),
            rank=world.rank,
            world=world.size,
            workers=recipe.settings.workers if splits.val.samples.arrays is None else 0,
        )

    def go(self, resume: bool, record: dict[str, Any], remarks: Sequence[str], spent: float) -> Trained:
        recipe, settings = self.recipe, self.recipe.settings
        record = record if resume else self._record()
        names, unsaid = self.splits.train.samples.names, dict(record)
        task = teaching.Task(
            self.task.objective(self.network, settings),
            settings,
            self._batches,
            len(self.splits.train),
            steps_per_epoch(len(self.splits.train), settings.batch_size),
            self._evaluate,
            score=self.task.score,
            name=lambda i: names[i],
            labels=self.task.labels(self.splits),
            begin=lambda: self.folder.write(unsaid),
            aside=spent + CLOSING,
        )
        loop = teaching.Loop(
            task, self.world, self.folder.path, precision=self.precision, resume=resume, quiet=self.quiet
        )
        for line in [*self.splits.notes, *recipe.describe(), *remarks]:
            loop.journal.say(line)
        self.validation.tell(loop.journal.say)
        with breaking_off():
            try:
                outcome = loop.run()
            except WorkError:
                if self.world.first and loop.doctor.findings:
                    self.folder.write(unsaid | {"findings": [asdict(finding) for finding in loop.doctor.findings]})
                raise
            return self._finished(outcome, record)

    def _finished(self, outcome: teaching.Outcome, record: dict[str, Any]) -> Trained:
        """Weighs the network where that is still to do, and writes everything that stays."""
        settings = self.recipe.settings
        fresh = self.latest if settings.patience is None else None  # patience may have gone back to older weights
        counts = fresh or self._weigh(outcome.network)
        metrics = counts.metrics()
        trained = Trained(
            self.folder.path,
            self.task.name,
            metrics,
            {"evaluated": counts.evaluated, "refused": len(counts.refused)},
            {"train": round(outcome.seconds, 2)},
            outcome.findings,
            counts.headline(),
        )
        if self.world.first:
            record |= {
                "status": "finished",
                "steps": outcome.steps,
                "metrics": metrics,
                "counts": dict(trained.counts),
                "seconds": dict(trained.seconds),
                "findings": [asdict(finding) for finding in trained.findings],
                "refused": {"train": sorted(outcome.refused.items()), "val": counts.refused},
            }
            self._write(outcome.network, counts, record)
        self.world.agree(None)  # nobody leaves before the files are there
        return trained

    def _batches(self, step: int, say: Callable[[str], None]) -> TrainLoader:
        settings = self.recipe.settings
        return TrainLoader(
            self.splits.train,
            self.task.varied(self.recipe.augment, self.recipe.preprocess),
            batch_size=settings.batch_size,
            seed=settings.seed,
            steps=range(step, ENDLESS),
            repeats=settings.repeats,
            rank=self.world.rank,
            world=self.world.size,
            workers=settings.workers,
            pin_memory=self.world.device.type == "cuda",
            say=say,
        )

    def _evaluate(self, network: nn.Module, heed: Callable[[], None]) -> dict[str, float]:
        first, self.latest = self.latest is None, self._weigh(network, heed)
        counts = self.latest
        for name, reason in counts.refused if first else ():
            self.validation.say(f"held out, counts as wrong, {printable(name)}: {printable(reason)}")
        return counts.metrics() | counts.told()

    def _weigh(self, network: nn.Module, heed: Callable[[], None] = lambda: None) -> Measure:
        """The counts of a network over the validation images, over all processes."""
        part = weigh(
            network,
            self.validation,
            self.task.measure(self.splits.val, self.recipe.preprocess),
            device=self.world.device,
            precision=self.precision,
            heed=heed,
        )
        first, *others = self.world.gather(part)
        return first.merge(others)

    def _record(self) -> dict[str, Any]:
        return {
            "status": "begun",
            "task": self.task.name,
            "seed": self.recipe.settings.seed,
            "data": {
                "source": self.splits.source,
                "train": len(self.splits.train),
                "val": len(self.splits.val),
                "classes": len(self.splits.train.classes),
                "fingerprint": {"train": self.splits.train.fingerprint(), "val": self.splits.val.fingerprint()},
            },
            "recipe": self.recipe.to_json(),
            "environment": environment(self.world.device, self.precision),
        }

    def _write(self, network: Network, counts: Measure, record: dict[str, Any]) -> None:
        network = network.to("cpu").eval()
        labels = self.splits.train.classes
        about = self.folder.path, network, self.recipe.preprocess, labels, self.splits.val, counts, record
        report = self.task.report(*about)
        write_model(self.folder.path, network, self.recipe.preprocess, labels)
        report.write()
        model_card(self.folder.path, labels, record, report.card)
        self.folder.write(record)


@contextmanager
def _threads(count: int) -> Generator[None]:
    """Computes with so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _require_same_data(splits: Splits, record: dict[str, Any], folder: RunFolder) -> None:
    now = {"train": splits.train.fingerprint(), "val": splits.val.fingerprint()}
    if now != record["data"]["fingerprint"]:
        raise UserError(
            f"the images of {splits.source} have changed since the run in {folder.path} began; it can only go on with "
            "the same images. Start a new run with another --out."
        )


def _stem(data: str | Path) -> str:
    return str(data).removeprefix("builtin:") if str(data).startswith("builtin:") else Path(data).resolve().stem
