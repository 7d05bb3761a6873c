"""The task that gives an image one class."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sightline.datasets.image_set import ImageSet
from sightline.datasets.split import Splits
from sightline.evaluation.accuracy import Accuracy
from sightline.images.augment import Augment, Augmented
from sightline.images.preprocess import Preprocess
from sightline.network import Network
from sightline.objectives.supervised import Supervised, SupervisedConfig
from sightline.recipes.from_scratch import from_scratch
from sightline.recipes.recipe import Facts, Recipe
from sightline.recipes.task import Task
from sightline.reports.classes import ClassesReport
from sightline.training.chart import Labels
from sightline.training.settings import Settings


class Classification(Task):
    """Classes, told apart by cross-entropy."""

    name = "classify"
    score = "top1"
    warm = True
    report = ClassesReport

    def varied(self, augment: Augment, preprocess: Preprocess) -> Augmented:
        return augment.bind(preprocess)

    def prepared(self, preprocess: Preprocess) -> Callable[..., Float[Tensor, "3 h w"]]:
        return preprocess

    def from_scratch(
        self,
        facts: Facts,
        *,
        model: str | None = None,
        minutes: float | None = None,
        pace: Callable[[Recipe], float] | None = None,
        **overrides: Any,
    ) -> Recipe:
        return from_scratch(facts, model=model, minutes=minutes, pace=pace, **overrides)

    def objective(self, network: Network, settings: Settings) -> Supervised:
        config = SupervisedConfig(settings.smoothing, settings.mixup, settings.cutmix, settings.switch_prob)
        return Supervised(network, config)

    def noise(self, images: int, size: tuple[int, int]) -> Int[Tensor, " b"]:
        return torch.zeros(images, dtype=torch.int64)

    def measure(self, images: ImageSet, preprocess: Preprocess) -> Accuracy:
        return Accuracy(len(images.classes))

    def labels(self, splits: Splits) -> Labels:
        train, val = splits.train, splits.val
        return Labels(train.classes, tuple(train.counts().values()), tuple(val.counts().values()))


TASKS = {"classify": Classification()}
