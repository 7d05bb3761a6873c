"""Learning without labels: from a folder of images to a model directory that training goes on from."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline.checkpoints.directory import write_model
from sightline.datasets.loader import OrderedLoader
from sightline.datasets.open import open_dataset
from sightline.datasets.order import steps_per_epoch
from sightline.datasets.split import Splits
from sightline.datasets.unlabelled import open_images
from sightline.device import pick_device
from sightline.errors import UserError, printable
from sightline.evaluation.features import embedded
from sightline.evaluation.knn import knn_accuracy
from sightline.network import Network
from sightline.objectives.objective import Objective
from sightline.recipes.autopilot import sharing
from sightline.recipes.ingredients import gathered, made
from sightline.recipes.memory import Noise, within_memory
from sightline.recipes.pace import class_indices
from sightline.recipes.pretraining import beside, chosen
from sightline.recipes.recipe import Recipe, facts
from sightline.recipes.running import RETOLD, Run, hold, require_same_data, stem
from sightline.recipes.train import Trained, train
from sightline.registry import find
from sightline.reports.card import pretrained_card
from sightline.reports.pretrained import PretrainedReport
from sightline.schema import from_json, require
from sightline.training.chart import Labels
from sightline.training.distributed import World, join, leave
from sightline.training.loop import Outcome
from sightline.training.run import RunFolder
from sightline.training.vitals import spread
from sightline.types import Batch

NEIGHBOURS = 4000
"""Training images that are known to the nearest-neighbour classifier, evenly taken: enough to judge by."""

SHARE = 1 / 3
"""The part of a run's minutes in which the model that it learns first is taught."""

WORKERS_WAIT = 64
"""Images of a batch of evaluation, at least."""


@dataclass(frozen=True)
class Pretrained(Trained):
    """What a run without labels left behind; `metrics` has `knn_top1` where there are labels to judge by."""

    objective: str = ""

    def to_json(self) -> dict[str, Any]:
        """The document of `pretrain --json`."""
        return {**super().to_json(), "objective": self.objective}


def pretrain(
    data: str | Path,
    *,
    objective: str = "mae",
    model: str | None = None,
    out: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    recipe: str = "small",
    resume: bool = False,
    device: str = "auto",
    quiet: bool = True,
    network: Mapping[str, Any] | None = None,
    augment: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Trained:
    """Teaches a backbone by an objective that needs no labels, or few, and writes a model directory to go on from.

    `data` is whatever `train` takes, or a folder of images without any order; labels, where there are some, only judge
    (`knn_top1`), unless the objective is one that learns from them. `objective` is a key of `OBJECTIVES`, `options` are
    its settings. `recipe` is small, which minutes on two cores suffice for, or published. The rest is as for `train`.
    An objective with a task of its own (clip) is taught by `train` on the data of that task, captions. Raises
    UserError, WorkError, and Interrupted after a signal.
    """
    began = time.monotonic()
    folder = home(data, objective, out)
    options = dict(options or {})
    kind: type[Objective] = find("objectives", "OBJECTIVES", objective, "objective")
    if kind.task is not None:
        require(not options, f"{objective} has no settings of its own: {', '.join(map(printable, options))}")
        return train(
            data,
            task=kind.task,
            model=model,
            out=folder.path,
            image_size=image_size,
            resume=resume,
            device=device,
            quiet=quiet,
            network=network,
            augment=augment,
            **settings,
        )
    if not resume:
        folder.require_fresh()
        machine = {"device": device, "quiet": quiet}
        told = {"model": model, "image_size": image_size, "recipe": recipe, "network": network, "augment": augment}
        splits = open_images(data, seed=int(settings.get("seed", 0)))
        size = {} if image_size is None else {"image_size": image_size}
        plan = _planned(splits, objective, recipe, model, {**(network or {}), **size}, settings, augment or {}, options)
        found = _learned_first(data, plan, options, folder, machine, {**told, **settings})
        plan = replace(plan, options={**plan.options, **found})
    with ExitStack() as held:
        world = join(pick_device(device))
        held.callback(leave)
        if resume:
            record = folder.read()
            ours = record.get("task") == "pretrain"
            require(ours, f"{printable(folder.path)} holds a run of `sightline train`: go on with that")
            splits = open_images(record["data"]["source"], seed=record["seed"])
            plan = Recipe.from_json(record["recipe"], str(folder.record_file))
            plan = plan.told({name: settings[name] for name in RETOLD if name in settings}, {})
            record["recipe"] = plan.to_json()
        else:
            record = {}
            plan = sharing(plan, plan.architecture.build(), len(splits.train), world)
        hold(held, folder, world, plan, resume=resume)
        splits = gathered(plan, splits, folder.path, world.device)
        if resume:
            require_same_data(splits, record, folder)
        torch.manual_seed(plan.settings.seed)
        taught = plan.architecture.build()
        ready, remarks = made(plan, taught, splits, folder.path, world.device), []
        if not resume:
            plan, words = within_memory(plan, ready, _noise(plan, ready), world)
            remarks += [words] if words else []
        run = _Pretraining(folder, splits, plan, ready, world, quiet)
        return run.go(resume, record, remarks, time.monotonic() - began)


def home(data: str | Path, objective: str, out: str | Path | None) -> RunFolder:
    """The folder of a run: `out`, or one that is named after data and objective."""
    return RunFolder(Path(out) if out is not None else Path("runs") / f"{stem(data)}-{objective}")


def _learned_first(
    data: str | Path,
    plan: Recipe,
    options: Mapping[str, Any],
    folder: RunFolder,
    machine: Mapping[str, Any],
    told: Mapping[str, Any],
) -> dict[str, Any]:
    """Models that a planned run needs and that the user names none of, learned beside `folder` before it begins.

    A run that was stopped goes on, and one that is finished is used as it is. Of a run by the clock they take `SHARE`.
    """
    objective = plan.objective
    kind: type[Objective] = find("objectives", "OBJECTIVES", objective, "objective")
    found: dict[str, Any] = {}
    for option, other in kind.first.items():
        if not options.get(option):
            few = {name: told[name] for name in ("seed", "epochs", *RETOLD) if name in told}
            few |= {"minutes": told["minutes"] * SHARE} if told.get("minutes") else {}
            few["image_size"] = beside(other, plan.architecture)
            found[option] = _finished(folder, other, data, other, {**machine, **few})
    rounds = options.get("rounds", 1)
    require(type(rounds) is int and rounds > 0, f"rounds has to be a positive whole number, not {printable(rounds)}")
    for number in range(1, rounds):
        found["rounds"] = 1
        earlier = {**told, "options": {**options, **found}}
        found["teacher"] = _finished(folder, f"round-{number}", data, objective, {**machine, **earlier})
    return found


def _finished(folder: RunFolder, what: str, data: str | Path, objective: str, rest: Mapping[str, Any]) -> str:
    """The model directory of a run beside a folder, which is begun, or gone on with, where it is not finished."""
    near = RunFolder(folder.path.with_name(f"{folder.path.name}-{what}"))
    begun = near.record_file.is_file()
    if not begun or near.read().get("status") != "finished":
        pretrain(data, objective=objective, out=near.path, resume=begun, **rest)
    return str(near.path)


def _planned(
    splits: Splits,
    objective: str,
    recipe: str,
    model: str | None,
    network: Mapping[str, Any],
    settings: Mapping[str, Any],
    augment: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Recipe:
    """The recipe with what the user said in it. Raises UserError for what does not go together."""
    kind: type[Objective] = find("objectives", "OBJECTIVES", objective, "objective")
    taught = splits.train
    if "labelled" in kind.Config.__dataclass_fields__:
        require(bool(options.get("labelled")), f"{objective} needs the data with labels too: --labelled DATA")
        taught = open_dataset(options["labelled"], seed=int(settings.get("seed", 0))).train
    classes = len(taught.classes)
    if kind.labelled and not classes:
        raise UserError(f"{objective} learns from labels, and {splits.source} has none: put images into class folders")
    known = facts(taught, int(settings.get("seed", 0)), reflections=classes > 0)
    known = replace(known, classes=classes if kind.labelled else 0)
    plan = chosen(recipe, objective, known, model, network).told(settings, augment)
    require(plan.settings.patience is None or classes > 0, "patience needs labels to judge by, and there are none")
    config = from_json(kind.Config, {**plan.options, **options}, objective)
    return replace(plan, options=vars(config))


def _noise(recipe: Recipe, objective: Objective) -> Noise:
    """What makes batches of one image of noise, as the objective reads them, without memory for each."""
    rows, columns = recipe.preprocess.size
    image = np.random.default_rng(0).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    seen = objective.views(recipe.augment, recipe.preprocess)(image, 0)

    def drawn(images: int) -> Batch:
        pixels, *views = (view.expand(images, *view.shape) for view in (seen if isinstance(seen, tuple) else (seen,)))
        index = torch.arange(images)
        return Batch(pixels, class_indices(images, (rows, columns)), index, index, None, tuple(views))

    return drawn


class _Pretraining(Run):
    """One run that learns features and is judged by how they lie."""

    task = "pretrain"

    def __init__(
        self, folder: RunFolder, splits: Splits, recipe: Recipe, objective: Objective, world: World, quiet: bool
    ):
        super().__init__(folder, splits, recipe, objective, world, quiet)
        self.judged = len(splits.train.classes) > 1
        self.score = "knn_top1" if self.judged else "effective_rank"
        labelled = np.flatnonzero(splits.train.targets >= 0)
        even = np.linspace(0, len(labelled) - 1, min(NEIGHBOURS, len(labelled))).astype(int)
        parts = {"known": splits.train.select(labelled[np.unique(even)])} if self.judged else {}
        self.loaders = {
            name: OrderedLoader(
                images,
                recipe.preprocess,
                batch_size=max(recipe.settings.batch_size, WORKERS_WAIT),
                workers=recipe.settings.workers if images.samples.arrays is None else 0,
            )
            for name, images in {**parts, "asked": splits.val}.items()
        }
        self.refused: dict[str, str] = {}
        self.say: Callable[[str], None] = lambda line: None

    def labels(self) -> Labels | None:
        return super().labels() if self.objective.by_labels else None

    def tell(self, say: Callable[[str], None]) -> None:
        self.say = say
        for loader in self.loaders.values():
            loader.tell(say)

    def evaluate(self, network: nn.Module, heed: Callable[[], None]) -> dict[str, float]:
        assert isinstance(network, Network)
        asked, wanted = self.features(network, "asked", heed)
        figures = spread(asked)
        if self.judged:
            known, labels = self.features(network, "known", heed)
            figures = {"knn_top1": knn_accuracy(known, labels, asked, wanted)} | figures
        return figures

    def features(
        self, network: Network, part: str, heed: Callable[[], None]
    ) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
        """The features of each image that can be read, in float32, and its class."""
        vectors, labels, training, most = [], [], network.training, 2**62
        network.eval()
        for batch in self._read(part):
            found, most = embedded(network, batch, self.world.device, self.precision, most)
            vectors.append(found)
            labels.append(batch.targets)
            heed()
        network.train(training)
        require(bool(vectors), f"none of the images of {self.splits.source} that judge the features can be read")
        return torch.cat(vectors), torch.cat(labels)

    def _read(self, part: str) -> Iterator[Any]:
        for _, batch, refused in self.loaders[part]:
            for name, reason in refused:
                if name not in self.refused:
                    self.refused[name] = reason
                    self.say(f"not judged by {printable(name)}: {printable(reason)}")
            if batch is not None:
                yield batch

    def finished(self, outcome: Outcome, record: dict[str, Any]) -> Pretrained:
        metrics = dict(outcome.metrics)
        refused = self.refused.keys() & set(self.splits.val.samples.names)
        done = Pretrained(
            self.folder.path,
            "classify",
            metrics,
            {"evaluated": len(self.splits.val) - len(refused), "refused": len(refused)},
            {"train": round(outcome.seconds, 2), "waiting": round(outcome.waited, 2)},
            outcome.findings,
            objective=self.recipe.objective,
        )
        if self.world.first:
            record |= {
                "status": "finished",
                "steps": outcome.steps,
                "epochs": outcome.steps / steps_per_epoch(len(self.splits.train), self.recipe.settings.batch_size),
                "metrics": metrics,
                "counts": dict(done.counts),
                "seconds": dict(done.seconds),
                "findings": [asdict(finding) for finding in done.findings],
                "refused": {"train": sorted(outcome.refused.items()), "val": sorted(self.refused.items())},
            }
            network = outcome.network.to("cpu").eval()
            labels = self.splits.train.classes if self.objective.labelled else ()
            write_model(self.folder.path, network, self.recipe.preprocess, labels)
            PretrainedReport(self.folder.path, network, self.recipe.preprocess, record).write()
            pretrained_card(self.folder.path, record)
            self.folder.write(record)
        self.world.agree(None)  # nobody leaves before the files are there
        return done
