"""What every objective offers to the loop that runs it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from sightline.images.augment import Augment
from sightline.images.preprocess import Preprocess
from sightline.network import Network
from sightline.types import Batch, Step


@dataclass(frozen=True)
class NoConfig:
    """The settings of an objective that has none."""


class Objective(nn.Module, ABC):
    """Batch to `Step`. The loop knows nothing else of what it trains.

    `Config` is the frozen dataclass of its settings; an objective is made as `(network, config)` and raises UserError
    for a network that it cannot teach. Decoders, projectors and teachers belong to the objective, and all that it
    remembers from update to update stands in its parameters and buffers; only `kept` stays when training ends.
    """

    Config: ClassVar[Any] = NoConfig
    labelled: ClassVar[bool] = False
    """Whether it reads the labels of a batch."""

    task: ClassVar[str | None] = None
    """The key of a task whose own runs teach it, on data of its own; None where any images will do."""

    compares: ClassVar[bool] = False
    """Whether the images of a batch are held against each other, so that parts of it teach something else."""

    first: ClassVar[Mapping[str, str]] = {}
    """Settings that name a model, and the objective that learns one first where the user names none."""

    network: Network

    @abstractmethod
    def forward(self, batch: Batch) -> Step:
        """The loss of a batch, or of some of its samples, and figures to report."""

    @property
    def by_labels(self) -> bool:
        """Whether the loss is the cross-entropy of the labels, so that they tell what knowing nothing would cost."""
        return False

    @property
    def kept(self) -> Network:
        """The network that is weighed and kept: the one that learns, or a teacher that follows it."""
        return self.network

    def views(self, augment: Augment, preprocess: Preprocess) -> Callable[..., Any]:
        """How a training image becomes what `forward` reads: a function of the image and a key (see `Transform`)."""
        return augment.bind(preprocess)

    def prepare(self, pixels: Float[Tensor, "b c h w"]) -> None:
        """Called before the first update with some training images as evaluation sees them, to begin in their measure.

        Called again where a run goes on, before its state is read. Every process is given the same images.
        """

    def before_update(self, progress: float) -> None:
        """Called before the loss of an update is computed, with the share of the run that is done, 0 to 1.

        Where memory does not suffice it is called again for the same update, which then begins anew.
        """

    def after_backward(self) -> None:
        """Called when the gradient of an update is complete, before it is clipped: some of it may be withheld."""

    def after_update(self, progress: float) -> None:
        """Called after every update with the share of the run that is done, for teachers that follow a student."""
