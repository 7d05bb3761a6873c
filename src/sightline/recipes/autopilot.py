"""Chooses what the user leaves open: by the images, by the machine, and by the time there is."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from sightline.checkpoints.load import load_bundle
from sightline.datasets.image_set import ImageSet
from sightline.device import computing_with, pick_precision
from sightline.errors import UserError, suggest
from sightline.network import Network, count_parameters
from sightline.recipes.fine_tune import RECIPES, SHIPPED, ahead_of_scratch, usual
from sightline.recipes.memory import within_memory
from sightline.recipes.pace import measure, noise_of
from sightline.recipes.recipe import Facts, Recipe, evaluations, facts
from sightline.recipes.task import Task
from sightline.registry import find
from sightline.schema import from_json
from sightline.training.distributed import World

SMALL_WORK = 2e10
"""Floating-point operations of an update below which one thread is faster than several."""


def autopilot(
    task: Task,
    images: ImageSet,
    world: World,
    *,
    model: str | None,
    weights: Any,
    recipe: str | None,
    resize: str | None,
    network: Mapping[str, Any],
    settings: Mapping[str, Any],
    augment: Mapping[str, Any],
) -> tuple[Recipe, Network, list[str]]:
    """The recipe for these images with what the user said in it, its network at the start, and what was measured.

    Only a run by the clock is shaped by the measured pace; any other is the same on every machine, but for images
    that go through the network in smaller parts, or twice, where memory is short.
    """
    seed = int(settings.get("seed", 0))
    told = {"horizontal_flip", "vertical_flip"} <= set(augment)
    known = facts(images, seed, reflections=not told and images.samples.marks is None)

    def pace(candidate: Recipe) -> float:
        candidate = sharing(candidate.told(settings, augment), candidate.architecture.build(), len(images), world)
        return _measured(task, candidate, candidate.architecture.build(), world)

    torch.manual_seed(seed)
    said = model or recipe or resize == "native" or set(network) - {"image_size"}
    if weights is None and not said and task.warm and ahead_of_scratch(known):
        weights = SHIPPED
    if weights is None or str(weights) == "none":
        if recipe not in (None, "from-scratch"):
            raise UserError(f"recipe '{recipe}' starts from weights: name them with --weights")
        if resize == "native" and model is None:
            network = {"tokenizer": "patch", **network}  # convolutions cannot read images of unlike sizes in one batch
        chosen = task.from_scratch(known, model=model, minutes=settings.get("minutes"), pace=pace, **network)
        torch.manual_seed(seed)
        taught = chosen.architecture.build()
    else:
        chosen, taught = _from_weights(task, known, model, weights, recipe, network)
        chosen = chosen.told({"evaluations": evaluations(settings.get("minutes"))}, {})
    chosen = sharing(chosen.resized(resize).told(settings, augment), taught, len(images), world)
    objective = task.objective(taught, chosen.settings)
    chosen, words = within_memory(chosen, objective, noise_of(taught, task.noise), world)
    seconds = _measured(task, chosen, taught, world)
    return chosen, taught, [_estimate(chosen, seconds, len(images)), *([words] if words else [])]


def _from_weights(
    task: Task, known: Facts, model: str | None, weights: Any, recipe: str | None, overrides: Mapping[str, Any]
) -> tuple[Recipe, Network]:
    if recipe is not None and recipe not in RECIPES:
        raise UserError(f"unknown recipe '{recipe}'.{suggest(recipe, RECIPES)} There are {', '.join(RECIPES)}.")
    kind = find("heads", "HEADS", task.name, "task").Config
    rest = {name: value for name, value in overrides.items() if name not in kind.__dataclass_fields__}
    bundle = load_bundle(weights, architecture=model, num_classes=known.classes, **rest)
    if bundle.task == task.name and len(rest) < len(overrides):
        bundle = load_bundle(weights, architecture=model, num_classes=known.classes, **overrides)
    learned = bundle.network.architecture
    preprocess = bundle.preprocess.at(learned.backbone.image_size)
    if learned.task != task.name:  # the backbone alone has learned before
        own = {name: value for name, value in overrides.items() if name not in rest}
        head = from_json(kind, {**task.head(known), **own}, f"the head for '{task.name}'")
        learned = replace(learned, task=task.name, head=head)
    chosen = task.adapted(RECIPES[recipe or usual(bundle.network)](known, learned, preprocess))
    network = chosen.architecture.build()
    network.backbone.load_state_dict(bundle.network.backbone.state_dict())
    if bundle.task == task.name:
        network.head.load_state_dict(bundle.network.head.state_dict())
        network.head.renew()
    return chosen, network


def sharing(recipe: Recipe, network: Network, images: int, world: World) -> Recipe:
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
    laid_out = recipe.architecture.lay_out().eval()
    with torch.no_grad():
        pixels = torch.zeros(1, recipe.architecture.backbone.in_chans, height, width, device="meta")
        tokens = laid_out.to("meta").backbone(pixels).x.shape[1]
    work = 6 * count_parameters(network) * tokens * batch / world.size
    threads = recipe.settings.threads or (1 if work < SMALL_WORK else torch.get_num_threads())
    return recipe.told({"batch_size": batch, "threads": threads}, {})


def _measured(task: Task, recipe: Recipe, network: Network, world: World) -> float:
    """Seconds of an update, as the first process finds them."""
    precision = pick_precision(recipe.settings.precision, world.device)
    with computing_with(recipe.settings.threads):
        settings = recipe.told({"compile": False}, {}).settings
        found = measure(
            network,
            settings,
            world.device,
            precision,
            teach=lambda copy: task.objective(copy, settings),
            targets=task.noise,
        )
    return world.agree(found / world.size)


def _estimate(recipe: Recipe, seconds: float, images: int) -> str:
    settings = recipe.settings
    pace = f"an update takes about {seconds:.2g} s here"
    if settings.minutes is not None:
        epochs = 60 * settings.minutes / seconds * settings.batch_size / images
        return f"{pace}, so that {settings.minutes:g} minutes show it each image about {epochs:.3g} times"
    minutes = settings.epochs * max(images // settings.batch_size, 1) * seconds / 60
    told = f"{minutes:.2g} minutes" if minutes < 100 else f"{minutes / 60:.0f} hours"
    return f"{pace}: about {told} in all, without reading and evaluation (--minutes N takes N)"
