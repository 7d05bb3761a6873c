"""What a task brings to a run. One more task is one more file here with a `TASKS` table, and a head of the same name.

`train` and `evaluate` know nothing else of what is being learned.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from sightline.datasets.image_set import ImageSet
from sightline.datasets.loader import Joint
from sightline.datasets.naming import some
from sightline.datasets.open import open_dataset
from sightline.datasets.split import Splits
from sightline.errors import UserError
from sightline.evaluation.measure import Measure
from sightline.images.augment import Augment
from sightline.images.preprocess import Preprocess
from sightline.model import Model
from sightline.network import Network
from sightline.objectives.objective import Objective
from sightline.objectives.supervised import Supervised
from sightline.recipes.recipe import Facts, Recipe
from sightline.registry import find
from sightline.reports.report import Report
from sightline.schema import require
from sightline.texts.byte_pairs import Vocabulary
from sightline.training.chart import Labels
from sightline.training.settings import Settings


class Task(ABC):
    """One thing that a network can be taught: `name` is the key of its head in `HEADS`, and what `--task` says.

    `score` names the figure that is better when it is larger, `report` the kind of page about a run, `vocabulary` the
    words of a network that reads texts.
    """

    name: ClassVar[str]
    score: ClassVar[str]
    report: ClassVar[type[Report]]
    vocabulary: Vocabulary | None = None
    warm: ClassVar[bool] = False
    """Whether the weights that ship were measured to be the better start for it."""

    def open(self, source: str | Path, seed: int) -> Splits:
        """The images of a dataset with what is marked in them. Raises UserError."""
        return open_dataset(source, task=self.name, seed=seed)

    def bound(self, splits: Splits, weights: Any = None, kept: Path | None = None) -> "Task":
        """The task with what it has to know of its data, of the weights it starts from, or of the run it goes on with.

        `kept` is the folder of such a run. Raises UserError where the data is not what the task learns from.
        """
        return self

    def kept(self) -> Mapping[str, bytes]:
        """Files by name that the folder of a run needs from its beginning, so that it can go on."""
        return {}

    def for_model(self, model: Model, templates: Sequence[str] | None = None) -> "Task":
        """The task with what it has to know of a model to weigh it; `templates` are prompts for what reads texts."""
        require(templates is None, f"a model for '{self.name}' reads no texts, so there is no use for prompts")
        return self

    def aligned(self, labels: Sequence[str], images: ImageSet, data: str) -> ImageSet:
        """The images with their classes numbered as a model's `labels` are. Raises UserError for other classes."""
        require(len(labels) > 0, "the model has no classifier; its features are judged with --protocol knn")
        missing, extra = set(labels) - set(images.classes), set(images.classes) - set(labels)
        if missing or extra:
            gaps = [f"only the model knows {some(sorted(missing))}"] if missing else []
            gaps += [f"only {data} has {some(sorted(extra))}"] if extra else []
            raise UserError(f"the classes of {data} are not those of the model: {'; '.join(gaps)}")
        return images.renumbered(tuple(labels))

    @abstractmethod
    def varied(self, augment: Augment, preprocess: Preprocess) -> Callable | Joint:
        """What a training loader makes of a sample."""

    @abstractmethod
    def prepared(self, preprocess: Preprocess) -> Callable | Joint:
        """What an evaluation's loader makes of a sample."""

    @abstractmethod
    def from_scratch(
        self,
        facts: Facts,
        *,
        model: str | None = None,
        minutes: float | None = None,
        pace: Callable[[Recipe], float] | None = None,
        **overrides: Any,
    ) -> Recipe:
        """The recipe for random weights at first; `pace` tells the seconds that an update of a recipe takes here."""

    def head(self, facts: Facts) -> Mapping[str, Any]:
        """Settings of the head that follow from the data."""
        return {"num_classes": facts.classes}

    def adapted(self, recipe: Recipe) -> Recipe:
        """A recipe of fine-tuning as this task needs it, when it was made for classes."""
        return recipe

    def objective(self, network: Network, settings: Settings) -> Objective:
        """What is minimised. Raises UserError for settings that only images with one class each can have."""
        for name in ("mixup", "cutmix", "smoothing"):
            require(not getattr(settings, name), f"{name} is for images with one class each, not for '{self.name}'")
        return Supervised(network)

    @abstractmethod
    def noise(self, images: int, size: tuple[int, int]) -> Any:
        """Targets for so many images of noise of this size: what the pace of an update is measured on."""

    @abstractmethod
    def measure(self, images: ImageSet, preprocess: Preprocess) -> Measure:
        """What counts how good the answers for these images are."""

    def labels(self, splits: Splits) -> Labels | None:
        """What the doctor may know of the classes; None where an image has not one class."""
        return None


def task_of(name: str) -> Task:
    """The task called so. Raises UserError with near names where there is none."""
    return find("recipes", "TASKS", name, "task")
