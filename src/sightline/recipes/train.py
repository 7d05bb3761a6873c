"""From a folder of images to a model directory: the whole run, as one function."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sightline.checkpoints.atomic import write_atomic
from sightline.checkpoints.directory import write_model
from sightline.datasets.loader import OrderedLoader
from sightline.datasets.preflight import quick
from sightline.datasets.split import Splits
from sightline.device import pick_device
from sightline.errors import printable
from sightline.evaluation.measure import Measure, weigh
from sightline.model import Model, load
from sightline.network import Network
from sightline.recipes.autopilot import autopilot
from sightline.recipes.recipe import Recipe
from sightline.recipes.running import RETOLD, Run, hold, require_same_data, stem
from sightline.recipes.task import Task, task_of
from sightline.reports.card import model_card
from sightline.schema import require
from sightline.training.chart import Finding, Labels
from sightline.training.distributed import World, join, leave
from sightline.training.loop import Outcome
from sightline.training.run import RunFolder


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
    folder = RunFolder(Path(out) if out is not None else Path("runs") / stem(data))
    with ExitStack() as held:
        world = join(pick_device(device))
        held.callback(leave)
        if resume:
            record = folder.read()
            ours = record.get("task") != "pretrain"
            require(ours, f"{printable(folder.path)} holds a run of `sightline pretrain`: go on with that")
            what = task_of(str(record.get("task")))
            splits = what.open(record["data"]["source"], record["seed"])
            require_same_data(splits, record, folder)
            what = what.bound(splits, kept=folder.path)
            chosen = Recipe.from_json(record["recipe"], str(folder.record_file))
            chosen = chosen.told({name: settings[name] for name in RETOLD if name in settings}, {})
            record["recipe"] = chosen.to_json()
            taught = chosen.architecture.build()
        else:
            record = {}
            what = task_of(task)
            folder.require_fresh()
            splits = what.open(data, int(settings.get("seed", 0)))
            what = what.bound(splits, weights)
            chosen, taught, remarks = autopilot(
                what,
                splits.train,
                world,
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
        hold(held, folder, world, chosen, resume=resume)
        spent = time.monotonic() - began
        return _Training(what, folder, splits, chosen, taught, world, quiet).go(resume, record, remarks, spent)


class _Training(Run):
    """One run that learns a task and is judged by held-out images."""

    def __init__(
        self,
        what: Task,
        folder: RunFolder,
        splits: Splits,
        recipe: Recipe,
        network: Network,
        world: World,
        quiet: bool,
    ):
        super().__init__(folder, splits, recipe, what.objective(network, recipe.settings), world, quiet)
        self.what, self.task, self.score = what, what.name, what.score
        self.latest: Measure | None = None
        self.validation = OrderedLoader(
            splits.val,
            what.prepared(recipe.preprocess),
            batch_size=max(recipe.settings.batch_size, 64),
            rank=world.rank,
            world=world.size,
            workers=recipe.settings.workers if splits.val.samples.arrays is None else 0,
        )

    def begin(self, record: dict[str, Any]) -> None:
        for name, content in self.what.kept().items():
            write_atomic(self.folder.path / name, content)
        super().begin(record)

    def tell(self, say: Callable[[str], None]) -> None:
        self.validation.tell(say)

    def labels(self) -> Labels | None:
        return self.what.labels(self.splits)

    def transform(self) -> Any:
        return self.what.varied(self.recipe.augment, self.recipe.preprocess)

    def finished(self, outcome: Outcome, record: dict[str, Any]) -> Trained:
        settings = self.recipe.settings
        fresh = self.latest if settings.patience is None else None  # patience may have gone back to older weights
        counts = fresh or self._weigh(outcome.network)
        metrics = counts.metrics()
        trained = Trained(
            self.folder.path,
            self.task,
            metrics,
            {"evaluated": counts.evaluated, "refused": len(counts.refused)},
            {"train": round(outcome.seconds, 2), "waiting": round(outcome.waited, 2)},
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

    def evaluate(self, network: nn.Module, heed: Callable[[], None]) -> dict[str, float]:
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
            self.what.measure(self.splits.val, self.recipe.preprocess),
            device=self.world.device,
            precision=self.precision,
            heed=heed,
        )
        first, *others = self.world.gather(part)
        return first.merge(others)

    def _write(self, network: Network, counts: Measure, record: dict[str, Any]) -> None:
        network = network.to("cpu").eval()
        labels = self.splits.train.classes
        about = self.folder.path, network, self.recipe.preprocess, labels, self.splits.val, counts, record
        report = self.what.report(*about)
        write_model(self.folder.path, network, self.recipe.preprocess, labels, vocabulary=self.what.vocabulary)
        report.write()
        model_card(self.folder.path, labels, record, report.card)
        self.folder.write(record)
