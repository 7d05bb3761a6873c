"""What an objective needs besides its network and its settings: a codebook, a teacher's answers, chosen images."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sightline.checkpoints.atomic import write_atomic
from sightline.checkpoints.files import read_tensors, safetensors_of
from sightline.datasets.image_set import ImageSet, Names, Samples
from sightline.datasets.loader import OrderedLoader
from sightline.datasets.naming import some
from sightline.datasets.open import open_dataset
from sightline.datasets.split import Splits
from sightline.errors import UserError, printable
from sightline.images.preprocess import Preprocess
from sightline.model import load
from sightline.network import Network
from sightline.objectives.beit import Words
from sightline.objectives.distill import DistillConfig, Teacher
from sightline.objectives.noisy_student import selected, targets_of
from sightline.objectives.objective import Objective
from sightline.recipes.recipe import Recipe
from sightline.registry import find
from sightline.schema import from_json, require

CACHE = ".teacher.safetensors"
"""The teacher's answers in the folder of a run; hidden, so that the folder still counts as empty."""

FEW = 64
"""Images that an objective is prepared with."""

_TIMM = "timm:"


def made(recipe: Recipe, network: Network, splits: Splits, folder: Path, device: torch.device) -> Objective:
    """The objective of a recipe for its network.

    Raises UserError for settings that the objective does not have, for a teacher or a codebook that does not fit, and
    where the objective cannot teach this network.
    """
    kind: type[Objective] = find("objectives", "OBJECTIVES", recipe.objective, "objective")
    config: Any = from_json(kind.Config, recipe.options, recipe.objective)
    given: dict[str, Any] = {}
    if hasattr(config, "codebook"):
        given["words"] = Words(load(config.codebook).network)
    if hasattr(config, "labelled"):
        given["answers"] = targets_of(_known(splits.train, config, folder, device), config.kind)
    elif isinstance(config, DistillConfig) and config.teacher_sees == "views":
        require(recipe.preprocess.resize != "native", "images of unlike sizes need --teacher-sees images")
        asked, own, order = teacher(config.teacher, splits.train.classes)
        given["teacher"] = Teacher(asked, own, recipe.preprocess, order)
    elif isinstance(config, DistillConfig):
        given["answers"] = answers(config.teacher, splits.train, folder, device)
    objective = kind(network, config, **given)
    if kind.prepare is not Objective.prepare:
        few = splits.train.select(np.linspace(0, len(splits.train) - 1, min(FEW, len(splits.train))).astype(int))
        for _, batch, _ in OrderedLoader(few, recipe.preprocess, batch_size=FEW):
            if batch is not None:
                objective.prepare(batch.pixels)
    return objective


def gathered(recipe: Recipe, splits: Splits, folder: Path, device: torch.device) -> Splits:
    """The images that an objective learns from: for self-training, those with labels and the best of those without."""
    kind: type[Objective] = find("objectives", "OBJECTIVES", recipe.objective, "objective")
    config: Any = from_json(kind.Config, recipe.options, recipe.objective)
    if not hasattr(config, "labelled"):
        return splits
    require(bool(config.labelled), "noisy-student needs the data with labels: --labelled DATA")
    labelled, strangers = open_dataset(config.labelled, seed=recipe.settings.seed), _without_labels(splits.train)
    said = answers(config.teacher, replace(strangers, classes=labelled.train.classes), folder, device)
    rows = selected(said.softmax(dim=1).numpy(), config.threshold, config.per_class)
    require(
        len(rows) > 0,
        f"the teacher is surer than {config.threshold:g} of no image: lower --threshold, or teach it more",
    )
    chosen = strangers.select(rows)
    train = _together(labelled.train, replace(chosen, classes=labelled.train.classes))
    told = f"{len(set(rows.tolist())):,} of {len(strangers):,} images without labels are called by the teacher"
    return Splits(train, labelled.val, splits.source, [*splits.notes, *labelled.notes, told], splits.drawn)


def _known(images: ImageSet, config: Any, folder: Path, device: torch.device) -> Float[Tensor, "n k"]:
    """The probabilities of each image's classes: one for its label, or the teacher's."""
    targets, classes = torch.from_numpy(images.targets), len(images.classes)
    known = torch.nn.functional.one_hot(targets.clamp(min=0), classes).float()
    rows = np.flatnonzero(images.targets < 0)
    said = answers(config.teacher, images.select(rows), folder, device, name=".chosen.safetensors")
    known[torch.from_numpy(rows)] = said.softmax(dim=1)
    return known


def answers(
    source: str, images: ImageSet, folder: Path, device: torch.device, *, name: str = CACHE
) -> Float[Tensor, "n k"]:
    """A teacher's logits for every image, as evaluation prepares it; kept in `folder` and read again from there.

    Raises UserError as `teacher` does, and for an image that cannot be read.
    """
    file, key = folder / name, hashlib.sha256(json.dumps([source, images.fingerprint()]).encode()).hexdigest()
    if file.is_file():
        kept = read_tensors(file).tensors
        if f"answers.{key}" in kept:
            return kept[f"answers.{key}"].clone()
    network, preprocess, order = teacher(source, images.classes)
    network = network.to(device).eval()
    said: list[Tensor] = []
    with torch.inference_mode():
        for _, batch, refused in OrderedLoader(images, preprocess, batch_size=64):
            for where, why in refused:
                raise UserError(f"the teacher cannot read {printable(where)}: {printable(why)}; mend or remove it")
            if batch is not None:
                said.append(network(batch.pixels.to(device)).float().cpu()[:, order])
    together = torch.cat(said) if said else torch.zeros(0, len(images.classes))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(file, safetensors_of({f"answers.{key}": together.contiguous()}), together.nbytes)
    return together.clone()


def teacher(source: str, classes: tuple[str, ...]) -> tuple[nn.Module, Preprocess, list[int]]:
    """A network that maps pixels to logits, its pixels, and where among its answers each of the classes stands.

    `timm:NAME@FILE` is a network of timm with the weights of a file, its classes in our order. Raises UserError where
    none is named, and for one that cannot be read or does not know all classes.
    """
    require(bool(source), "a teacher is needed: --teacher MODEL, or timm:NAME@FILE")
    if source.startswith(_TIMM):
        return *_of_timm(source.removeprefix(_TIMM), len(classes)), list(range(len(classes)))
    model = load(source)
    places = {label: i for i, label in enumerate(model.labels)}
    if missing := [label for label in classes if label not in places]:
        raise UserError(f"the teacher {printable(source)} does not know the classes {some(missing)}")
    return model.network, model.preprocess, [places[label] for label in classes]


def _of_timm(name: str, classes: int) -> tuple[nn.Module, Preprocess]:
    name, _, file = name.partition("@")
    try:
        import timm
        from timm.data import resolve_data_config
    except ImportError as fault:
        raise UserError("a teacher of timm needs timm: pip install timm") from fault
    if not timm.is_model(name):
        raise UserError(f"timm knows no model '{printable(name)}'")
    network = timm.create_model(name, num_classes=classes)
    require(bool(file), f"name the weights of the teacher too: timm:{printable(name)}@FILE")
    try:
        network.load_state_dict(dict(read_tensors(Path(file)).tensors))
    except RuntimeError as fault:
        raise UserError(f"{printable(file)} does not fit timm's {printable(name)}: {fault}") from fault
    told = resolve_data_config({}, model=network)
    size = told["input_size"][1:]
    kernel = {"interpolation": told["interpolation"]} if told["interpolation"] in ("bilinear", "bicubic") else {}
    contract = Preprocess(size, crop_pct=told["crop_pct"], mean=told["mean"], std=told["std"], **kernel)
    return network, contract


def _without_labels(images: ImageSet) -> ImageSet:
    return ImageSet((), replace(images.samples, targets=np.full(len(images), -1, dtype=np.int64)))


def _together(first: ImageSet, second: ImageSet) -> ImageSet:
    """Two sets wherever they lie. Raises UserError where one is on disk and the other is not."""
    a, b = first.samples, second.samples
    targets = np.concatenate([a.targets, b.targets])
    if a.arrays is not None and b.arrays is not None:
        names = Names([*a.names, *b.names])
        return ImageSet(first.classes, Samples(names, targets, arrays=[*a.arrays, *b.arrays]))
    if any(samples.arrays is not None or samples.stored is not None for samples in (a, b)):
        raise UserError("the images with labels and those without have to lie in folders, both")
    names = Names(str((samples.root / name).absolute()) for samples in (a, b) for name in samples.names)
    return ImageSet(first.classes, Samples(names, targets))
