"""What all runs have in common, whatever they learn: how they are entered, fed, recorded and gone on with."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from sightline.datasets.loader import TrainLoader
from sightline.datasets.order import steps_per_epoch
from sightline.datasets.split import Splits
from sightline.device import computing_with, give_back_at_once, keep_for_next, pick_precision
from sightline.errors import UserError, WorkError
from sightline.objectives.objective import Objective
from sightline.recipes.recipe import Recipe
from sightline.training.chart import Labels
from sightline.training.distributed import World
from sightline.training.loop import Loop, Outcome, Task
from sightline.training.run import RunFolder, environment, locked
from sightline.training.signals import breaking_off

ENDLESS = 2**62
"""More steps than any run has: the loop says when to stop."""

RETOLD = ("refused_limit", "micro_batch", "save_seconds", "workers")
"""Settings that a resumed run may be told anew: they change what it bears, and what it learns in rounding at most."""

CLOSING = 4.0
"""Seconds that the report at the end of a run takes, about; a run by the clock keeps them free."""


class Run(ABC):
    """One run from its loaders to its report: `objective` learns from `splits` as `recipe` says."""

    task: str = "classify"
    score: str = "top1"

    def __init__(
        self, folder: RunFolder, splits: Splits, recipe: Recipe, objective: Objective, world: World, quiet: bool
    ):
        self.folder, self.splits, self.recipe, self.objective = folder, splits, recipe, objective
        self.world, self.quiet = world, quiet
        self.precision = pick_precision(recipe.settings.precision, world.device)

    @abstractmethod
    def evaluate(self, network: nn.Module, heed: Callable[[], None]) -> dict[str, float]:
        """The figures of a network; `heed` is called between batches."""

    @abstractmethod
    def finished(self, outcome: Outcome, record: dict[str, Any]) -> Any:
        """Weighs what was learned where that is still to do, writes everything that stays, and gives the result."""

    def labels(self) -> Labels | None:
        """The classes that are learned, where they are."""
        train, val = self.splits.train, self.splits.val
        return Labels(train.classes, tuple(train.counts().values()), tuple(val.counts().values()))

    def tell(self, say: Callable[[str], None]) -> None:  # noqa: B027  (most runs read nothing else)
        """Lets `say` hear what befalls whatever the run reads besides its batches."""

    def go(self, resume: bool, record: dict[str, Any], remarks: Sequence[str], spent: float) -> Any:
        """Teaches until the plan is done, and finishes; `spent` are the seconds that went before."""
        recipe, settings = self.recipe, self.recipe.settings
        record = record if resume else self.record()
        names, unsaid = self.splits.train.samples.names, dict(record)
        task = Task(
            self.objective,
            settings,
            self.batches,
            len(self.splits.train),
            steps_per_epoch(len(self.splits.train), settings.batch_size),
            self.evaluate,
            name=lambda i: names[i],
            labels=self.labels(),
            begin=lambda: self.begin(unsaid),
            score=self.score,
            aside=spent + CLOSING,
        )
        loop = Loop(task, self.world, self.folder.path, precision=self.precision, resume=resume, quiet=self.quiet)
        for line in [*self.splits.notes, *recipe.describe(), *remarks]:
            loop.journal.say(line)
        self.tell(loop.journal.say)
        with breaking_off():
            try:
                outcome = loop.run()
            except WorkError:
                if self.world.first and loop.doctor.findings:
                    self.folder.write(unsaid | {"findings": [asdict(finding) for finding in loop.doctor.findings]})
                raise
            return self.finished(outcome, record)

    def begin(self, record: dict[str, Any]) -> None:
        """Writes what the run needs to go on, the record last."""
        self.folder.write(record)

    def batches(self, step: int, say: Callable[[str], None]) -> TrainLoader:
        """The training batches from a step on."""
        settings = self.recipe.settings
        return TrainLoader(
            self.splits.train,
            self.transform(),
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

    def transform(self) -> Any:
        """What the loader makes of a training image."""
        return self.objective.views(self.recipe.augment, self.recipe.preprocess)

    def record(self) -> dict[str, Any]:
        """The record of the run at its beginning."""
        return {
            "status": "begun",
            "task": self.task,
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


def hold(held: ExitStack, folder: RunFolder, world: World, recipe: Recipe, *, resume: bool) -> None:
    """Takes a folder for one run until `held` is left, and as many threads as the recipe wants."""
    world.agree(None)  # nobody writes before everybody has looked
    if world.first:
        held.enter_context(locked(folder.path))
        if not resume:
            folder.require_fresh()  # somebody may have been quicker
    held.enter_context(computing_with(recipe.settings.threads))
    (give_back_at_once if recipe.settings.checkpointing or recipe.settings.memory else keep_for_next)()


def require_same_data(splits: Splits, record: dict[str, Any], folder: RunFolder) -> None:
    """Raises UserError where the images are not those with which the run of this record began."""
    now = {"train": splits.train.fingerprint(), "val": splits.val.fingerprint()}
    if now != record["data"]["fingerprint"]:
        raise UserError(
            f"the images of {splits.source} have changed since the run in {folder.path} began; it can only go on with "
            "the same images. Start a new run with another --out."
        )


def stem(data: str | Path) -> str:
    """What a run on this data is called where nobody says."""
    if str(data).startswith("builtin:"):
        return str(data).split(":")[1]
    return re.sub(r"[-_.]*\{[^{}]*\}", "", Path(data).resolve().stem) or "shards"
