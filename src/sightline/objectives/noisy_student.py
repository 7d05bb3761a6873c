"""Noisy Student (arXiv 1911.04252): a teacher labels images that have none, and a student learns them under noise."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sightline.network import Network
from sightline.objectives.supervised import Supervised, SupervisedConfig
from sightline.schema import require
from sightline.types import Batch, Step


@dataclass(frozen=True)
class NoisyStudentConfig(SupervisedConfig):
    """The settings of `NoisyStudent`, and those of `Supervised`.

    `teacher` names a model that knows the classes, `labelled` the data with labels, as `train` takes it. Images of
    which the teacher is surer than `threshold` are taken, at most `per_class` for each class, those of rarer ones
    several times; `kind` is whether its probabilities ("soft") or answers ("hard") are learned. `rounds` repeats it,
    each student being the next one's teacher. Raises UserError for values out of range.
    """

    teacher: str = ""
    labelled: str = ""
    threshold: float = 0.3
    per_class: int = 130_000
    kind: Literal["soft", "hard"] = "soft"
    rounds: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.threshold < 1, f"threshold must lie in [0, 1), not {self.threshold}")
        for name in ("per_class", "rounds"):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")


class NoisyStudent(Supervised):
    """Cross-entropy against labels where there are some, and against a teacher's answers elsewhere.

    L = mean over labelled and unlabelled images together of H(y, softmax(z)), y the label or the teacher's answer to
    the image without noise (arXiv 1911.04252, algorithm 1). The noise is that of the run: variation of the images,
    dropout and stochastic depth. `answers` are the targets of all training images by index.
    """

    Config = NoisyStudentConfig
    config: NoisyStudentConfig

    def __init__(
        self, network: Network, config: NoisyStudentConfig = NoisyStudentConfig(), *, answers: Float[Tensor, "n k"]
    ):
        super().__init__(network, config)
        self.answers: Tensor
        self.register_buffer("answers", answers, persistent=False)

    @property
    def by_labels(self) -> bool:
        return False  # most targets are a teacher's, and what it says of them is balanced

    def forward(self, batch: Batch) -> Step:
        return super().forward(batch._replace(targets=self.answers[batch.index]))


def selected(probabilities: Float[np.ndarray, "n k"], threshold: float, per_class: int) -> Int64[np.ndarray, " m"]:
    """The rows of images that a student learns, balanced (arXiv 1911.04252, section 3.1).

    Of the images that a class is the most probable one for, those above `threshold` count, the surest `per_class` at
    most; every class with any then gets as many as the largest has, its images repeated in turn.
    """
    called, sure = probabilities.argmax(axis=1), probabilities.max(axis=1)
    found = []
    for target in range(probabilities.shape[1]):
        rows = np.flatnonzero((called == target) & (sure > threshold))
        rows = rows[np.argsort(-sure[rows], kind="stable")[:per_class]]
        found.append(rows)
    most = max((len(rows) for rows in found), default=0)
    return np.concatenate([np.resize(rows, most) for rows in found if len(rows)] or [np.zeros(0)]).astype(np.int64)


def targets_of(probabilities: Float[Tensor, "n k"], kind: str) -> Float[Tensor, "n k"]:
    """What is learned of a teacher: its probabilities, or all of it for its answer."""
    if kind == "soft":
        return probabilities
    return torch.nn.functional.one_hot(probabilities.argmax(dim=1), probabilities.shape[1]).float()


OBJECTIVES = {"noisy-student": NoisyStudent}
