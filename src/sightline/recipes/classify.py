"""From a folder of images to a model directory: the whole run, as one function."""

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sightline.checkpoints.directory import write_model
from sightline.checkpoints.load import load_bundle
from sightline.datasets.loader import OrderedLoader, TrainLoader
from sightline.datasets.open import open_dataset
from sightline.datasets.order import steps_per_epoch
from sightline.datasets.split import Splits
from sightline.device import pick_device, pick_precision
from sightline.errors import UserError, suggest
from sightline.evaluation.accuracy import Accuracy, accuracy
from sightline.model import Model, load
from sightline.network import Network, count_parameters
from sightline.objectives.supervised import Supervised
from sightline.recipes.fine_tune import RECIPES
from sightline.recipes.from_scratch import from_scratch
from sightline.recipes.recipe import Facts, Recipe, facts
from sightline.reports.card import model_card
from sightline.reports.report import Report
from sightline.training.distributed import World, join, leave
from sightline.training.loop import Loop, Task
from sightline.training.run import RunFolder, environment, locked

ENDLESS = 2**62
"""More steps than any run has: the loop says when to stop."""

SMALL_WORK = 2e10
"""Floating-point operations of an update below which one thread is faster than several."""


@dataclass(frozen=True)
class Trained:
    """What a run left behind. Fractions lie between 0 and 1, `seconds` tell what the time went into."""

    directory: Path
    task: str
    metrics: Mapping[str, float]
    counts: Mapping[str, int]
    seconds: Mapping[str, float]

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
            "report": str(self.report),
        }


def train(
    data: str | Path,
    *,
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
    """Teaches a classifier and writes its model directory with report and record.

    `data` is a folder of class folders, a CSV file, or `builtin:digits`. `model` is an architecture's name and
    `weights` what `load` takes, or "none" for random ones; what is left out is chosen by the number and size of the
    images. `resize` is how images of other shapes are brought to `image_size`: squash, crop, pad, or native, which
    keeps each image's own aspect ratio at about as many pixels. `recipe` names one of `fine_tune.RECIPES`. `settings`
    are fields of `Settings` (epochs, minutes, lr, seed, …), `augment` those of `Augment`, `network` those of the
    architecture. With `resume` the run in `out` goes on where it was, by its own record, and nothing else is asked.
    Raises UserError, WorkError, and Interrupted after a signal.
    """
    folder = RunFolder(Path(out) if out is not None else Path("runs") / _stem(data))
    with ExitStack() as held:
        world = join(pick_device(device))
        held.callback(leave)
        if resume:
            record = folder.read()
            splits = open_dataset(record["data"]["source"], seed=record["seed"])
            _require_same_data(splits, record, folder)
            chosen = Recipe.from_json(record["recipe"], str(folder.record_file))
            taught = chosen.architecture.build()
        else:
            record, seed = {}, int(settings.get("seed", 0))
            folder.require_fresh()
            splits = open_dataset(data, seed=seed)
            known, asked = facts(splits.train), dict(network or {})
            chosen, taught = choose(known, model, weights, image_size, recipe, asked, seed)
            chosen = chosen.resized(resize).told({**settings, "seed": seed}, augment or {})
            chosen = _fitting(chosen, taught, len(splits.train), world)
        world.agree(None)  # nobody writes before everybody has looked
        if world.first:
            held.enter_context(locked(folder.path))
            if not resume:
                folder.require_fresh()  # somebody may have been quicker
        held.enter_context(_threads(chosen.settings.threads or torch.get_num_threads()))
        return _Run(folder, splits, chosen, taught, world, quiet).go(resume, record)


def choose(
    known: Facts,
    model: str | None,
    weights: str | Path | None,
    image_size: int | tuple[int, int] | None,
    recipe: str | None,
    overrides: dict[str, Any],
    seed: int,
) -> tuple[Recipe, Network]:
    """The recipe for what is known and asked for, and its network with the weights it starts from."""
    torch.manual_seed(seed)
    if image_size is not None:
        overrides["image_size"] = image_size
    if weights is None or str(weights) == "none":
        if recipe not in (None, "from-scratch"):
            raise UserError(f"recipe '{recipe}' starts from weights: name them with --weights")
        chosen = from_scratch(known, model=model, **overrides)
        return chosen, chosen.architecture.build()
    name = recipe or "fine-tune"
    if name not in RECIPES:
        raise UserError(f"unknown recipe '{name}'.{suggest(name, RECIPES)} There are {', '.join(RECIPES)}.")
    bundle = load_bundle(weights, architecture=model, num_classes=known.classes, **overrides)
    preprocess = bundle.preprocess.at(bundle.network.architecture.backbone.image_size)
    chosen = RECIPES[name](known, bundle.network.architecture, preprocess)
    network = chosen.architecture.build()
    network.load_state_dict(bundle.network.state_dict())
    head = network.head.classifier
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return chosen, network


class _Run:
    """One run from its loaders to its report."""

    def __init__(self, folder: RunFolder, splits: Splits, recipe: Recipe, network: Network, world: World, quiet: bool):
        self.folder, self.splits, self.recipe, self.network = folder, splits, recipe, network
        self.world, self.quiet = world, quiet
        self.latest: Accuracy | None = None
        self.precision = pick_precision(recipe.settings.precision, world.device)
        self.validation = OrderedLoader(
            splits.val,
            recipe.preprocess,
            batch_size=max(recipe.settings.batch_size, 64),
            rank=world.rank,
            world=world.size,
            workers=recipe.settings.workers if splits.val.samples.arrays is None else 0,
        )

    def go(self, resume: bool, record: dict[str, Any]) -> Trained:
        recipe, settings = self.recipe, self.recipe.settings
        if not resume:
            record = self._record()
            if self.world.first:
                self.folder.write(record)
        objective = Supervised(
            self.network,
            smoothing=settings.smoothing,
            mixup=settings.mixup,
            cutmix=settings.cutmix,
            switch_prob=settings.switch_prob,
        )
        names = self.splits.train.samples.names
        task = Task(
            objective,
            settings,
            self._batches(),
            steps_per_epoch(len(self.splits.train), settings.batch_size),
            self._evaluate,
            name=lambda i: names[i],
        )
        loop = Loop(task, self.world, self.folder.path, precision=self.precision, resume=resume, quiet=self.quiet)
        for line in [*self.splits.notes, *recipe.describe()]:
            loop.journal.say(line)
        outcome = loop.run()
        fresh = self.latest if settings.patience is None else None  # patience may have gone back to older weights
        counts = fresh or self._weigh(outcome.network)
        metrics = counts.metrics()
        trained = Trained(
            self.folder.path,
            "classify",
            metrics,
            {"evaluated": counts.evaluated, "refused": len(counts.refused)},
            {"train": round(outcome.seconds, 2)},
        )
        if self.world.first:
            record |= {
                "status": "finished",
                "steps": outcome.steps,
                "metrics": metrics,
                "counts": dict(trained.counts),
                "seconds": dict(trained.seconds),
                "refused": {"train": sorted(set(outcome.refused)), "val": counts.refused},
            }
            self._write(outcome.network, counts, record)
        self.world.agree(None)  # nobody leaves before the files are there
        return trained

    def _batches(self) -> Callable[[int], TrainLoader]:
        settings = self.recipe.settings
        transform = self.recipe.augment.bind(self.recipe.preprocess)
        return lambda step: TrainLoader(
            self.splits.train,
            transform,
            batch_size=settings.batch_size,
            seed=settings.seed,
            steps=range(step, ENDLESS),
            repeats=settings.repeats,
            rank=self.world.rank,
            world=self.world.size,
            workers=settings.workers,
            pin_memory=self.world.device.type == "cuda",
        )

    def _evaluate(self, network: nn.Module) -> dict[str, float]:
        self.latest = self._weigh(network)
        return self.latest.metrics()

    def _weigh(self, network: nn.Module) -> Accuracy:
        """The counts of a network over the validation images, over all processes."""
        part = accuracy(
            network,
            self.validation,
            len(self.splits.val.classes),
            device=self.world.device,
            precision=self.precision,
        )
        first, *others = self.world.gather(part)
        return first.merge(others)

    def _record(self) -> dict[str, Any]:
        return {
            "status": "begun",
            "task": "classify",
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

    def _write(self, network: Network, counts: Accuracy, record: dict[str, Any]) -> None:
        network = network.to("cpu").eval()
        labels = self.splits.train.classes
        report = Report(self.folder.path, network, self.recipe.preprocess, labels, self.splits.val, counts, record)
        write_model(self.folder.path, network, self.recipe.preprocess, labels)
        report.write()
        model_card(self.folder.path, labels, record)
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


def _fitting(recipe: Recipe, network: Network, images: int, world: World) -> Recipe:
    """The recipe with a batch that the processes can share evenly, in pairs, and as many threads as pay.

    Threads that wait for each other at every small operation cost far more than they bring. The number is part of the
    record, because sums in another order differ in their last bits.
    """
    unit = 2 * world.size
    batch = min(recipe.settings.batch_size, images)
    if world.size > 1:
        if batch < unit:
            raise UserError(f"{images} images are too few for {world.size} processes")
        batch = batch // unit * unit
    height, width = recipe.architecture.backbone.image_size
    with torch.no_grad():
        tokens = network.backbone(torch.zeros(1, recipe.architecture.backbone.in_chans, height, width)).x.shape[1]
    work = 6 * count_parameters(network) * tokens * batch / world.size
    threads = recipe.settings.threads or (1 if work < SMALL_WORK else torch.get_num_threads())
    return recipe.told({"batch_size": batch, "threads": threads}, {})


def _require_same_data(splits: Splits, record: dict[str, Any], folder: RunFolder) -> None:
    now = {"train": splits.train.fingerprint(), "val": splits.val.fingerprint()}
    if now != record["data"]["fingerprint"]:
        raise UserError(
            f"the images of {splits.source} have changed since the run in {folder.path} began; it can only go on with "
            "the same images. Start a new run with another --out."
        )


def _stem(data: str | Path) -> str:
    return str(data).removeprefix("builtin:") if str(data).startswith("builtin:") else Path(data).resolve().stem
