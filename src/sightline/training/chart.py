"""What a doctor knows of a run: the figures so far, and what they would be if nothing were learned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, log, sqrt
from statistics import fmean
from typing import Any, Literal, NamedTuple

from sightline.training.schedule import UNMEASURED, Plan, rate
from sightline.training.settings import Settings

WINDOW = 20
"""Recorded batches in a mean: about an epoch where epochs are long, as many steps where they are short."""

SURE = 4.0
"""Standard errors for a verdict on a mean: a run is looked at thousands of times, and 2 would be exceeded by luck."""

Severity = Literal["note", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a run: its name, the step at which it was noticed, and what to change.

    `step` counts finished updates, 0 before the first. An "error" makes the result worthless, a "warning" makes it
    worse, a "note" is good to know.
    """

    kind: str
    step: int
    severity: Severity
    words: str
    advice: str

    def __str__(self) -> str:
        when = f"step {self.step}: " if self.step else ""
        return f"doctor: {when}{self.kind}: {self.words}. {self.advice}"


@dataclass(frozen=True)
class Labels:
    """What classes a run learns: names, and images of each in the training and the held-out part."""

    names: Sequence[str]
    train: Sequence[int]
    val: Sequence[int]

    def share(self, index: int) -> float:
        """The share of a class in the training images."""
        return self.train[index] / max(sum(self.train), 1)

    @property
    def commonest(self) -> int:
        """The class with most training images."""
        return max(range(len(self.train)), key=lambda i: self.train[i])

    def chance(self, smoothing: float) -> tuple[float, float]:
        """Mean training loss of the best answer that ignores the image, and of a perfect one, in nats.

        The best constant answer is the mean label, smoothed like the labels. Mixing images in pairs changes neither
        that mean nor, as the loss is linear in the label, this loss; it raises the loss of a perfect answer, so that
        what is learned is rated too low rather than too high.
        """
        classes, total = len(self.train), max(sum(self.train), 1)
        mean = [(1 - smoothing) * count / total + smoothing / classes for count in self.train]
        perfect = [1 - smoothing + smoothing / classes, *[smoothing / classes] * (classes - 1)]
        return _entropy(mean), _entropy(perfect)

    def held_out_chance(self) -> float:
        """Mean loss on the held-out images, labels not smoothed, of answering the training part's mean label."""
        total = max(sum(self.val), 1)
        return -sum(count / total * log(self.share(i)) for i, count in enumerate(self.val) if count and self.train[i])


def _entropy(shares: Sequence[float]) -> float:
    return -sum(p * log(p) for p in shares if p > 0)


class Mean(NamedTuple):
    """A mean with its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """Of values that count as independent."""
        mean, count = fmean(values), len(values)
        spread = sum((value - mean) ** 2 for value in values)
        return cls(mean, sqrt(spread / (count - 1) / count) if count > 1 else 0.0)

    def at_most(self) -> float:
        """What the true value hardly exceeds."""
        return self.value + SURE * self.error

    def at_least(self) -> float:
        """What the true value hardly falls short of."""
        return self.value - SURE * self.error


@dataclass
class Chart:
    """A run's figures as the journal gives them, line by line.

    `moves` are the measured shares by which updates changed the kernels, each with the number of losses before it, and
    `pace` is the largest of them per unit of learning rate. `likeness` sums, over batches of suspected labels: images,
    those whose most similar neighbour in the batch has their label, how many chance would make it, and the variance of
    that. `still` are the heads out of work at the last two looks. Of a run without labels, `baselines` are the losses
    of answering without looking at what is asked for, `spreads` deviation and effective rank of the features at each
    look, `assignments` the teacher's entropy and how many prototypes it uses, `words` how many of a codebook are used.
    """

    settings: Settings
    steps_per_epoch: int
    labels: Labels | None = None
    plan: Plan = field(default_factory=lambda: Plan(UNMEASURED))
    step: int = 0
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    best: Mean | None = None
    moves: list[tuple[int, float]] = field(default_factory=list)
    pace: float = 0.0
    likeness: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    still: list[set[tuple[str, int, str]]] = field(default_factory=lambda: [set(), set()])
    left_out: list[str] = field(default_factory=list)
    baselines: list[float] = field(default_factory=list)
    spreads: list[tuple[float, float]] = field(default_factory=list)
    assignments: list[tuple[float, float]] = field(default_factory=list)
    words: list[float] = field(default_factory=list)
    _rates: float = 0.0
    _rated: int = 0

    def take(self, record: Mapping[str, Any]) -> None:
        """One line of the journal, in order."""
        self.step = record["step"]
        if record.get("update_ratio", 0) > 0:
            self.moves.append((len(self.losses), record["update_ratio"]))
            self.pace = max(self.pace, record["update_ratio"] / record["rate"])
        if "still_heads" in record:
            self.still = [self.still[1], {(layer, number, fault) for layer, number, fault in record["still_heads"]}]
        if "likeness" in record:
            a, b, c, d = (old + new for old, new in zip(self.likeness, record["likeness"], strict=True))
            self.likeness = a, b, c, d
        if "feature_std" in record:
            self.spreads.append((record["feature_std"], record["effective_rank"]))
        if "teacher_entropy" in record:
            self.assignments.append((record["teacher_entropy"], record["prototype_perplexity"]))
        if "codebook_perplexity" in record:
            self.words.append(record["codebook_perplexity"])
        if isfinite(record.get("baseline", float("nan"))):
            self.baselines.append(record["baseline"])
        if "left_out" in record:
            self.left_out = list(record["left_out"])
        if "lr" in record:
            self._rates, self._rated = self._rates + record["lr"] * (self.step - self._rated), self.step
        if isfinite(record.get("loss", float("nan"))):
            self.losses.append(record["loss"])
            self.accuracies.append(record.get("accuracy", 0.0))
            if len(self.losses) >= WINDOW:
                mean = Mean.of(self.losses[-WINDOW:])
                self.best = mean if self.best is None else min(self.best, mean, key=Mean.at_most)
        if "val_loss" in record:
            self.evaluations.append({"train": self.recent, **record})

    @property
    def progress(self) -> float:
        """How far the run has come along its plan, 0 to 1."""
        return self.plan.at(self.step)

    @property
    def recent(self) -> float:
        """The mean of the last recorded losses."""
        return fmean(self.losses[-WINDOW:] or [0.0])

    @property
    def learnable(self) -> bool:
        """Whether it is known what there is to learn, and it is something."""
        known = self.labels is not None or bool(self.baselines)
        return known and len(self.losses) >= WINDOW and self.scale[0] - self.scale[1] > 1e-6

    @property
    def scale(self) -> tuple[float, float]:
        """The losses of knowing nothing and of knowing everything.

        Without labels the first is what the objective calls its baseline or else the loss of the first batches, and the
        second is 0.
        """
        if self.labels is None and self.baselines:
            return fmean(self.baselines[-WINDOW:]), 0.0
        if self.labels is None:
            return fmean(self.losses[:5] or [0.0]), 0.0
        return self.labels.chance(self.settings.smoothing)

    def learned(self, window: int) -> Mean:
        """The share of what there is to learn, 0 to 1, that the losses of the last `window` records show."""
        (chance, floor), mean = self.scale, Mean.of(self.losses[-window:])
        span = max(chance - floor, 1e-9)
        return Mean((chance - mean.value) / span, mean.error / span)

    @property
    def travelled(self) -> float:
        """The shares by which updates so far changed the kernels, summed: an upper bound of the way."""
        return self.pace * self._rates

    @property
    def journey(self) -> float:
        """The same for the whole plan."""
        mean = fmean(rate(self.settings, (i + 0.5) / 200) for i in range(200))
        return self.pace * self.settings.lr * mean * self.plan.total

    @property
    def fitting_rate(self) -> str:
        """The learning rate at which an update would change kernels by a hundredth, in words."""
        return f"{0.01 / self.pace if self.pace else self.settings.lr / 10:.0e}".replace("e-0", "e-").replace(
            "e+00", ""
        )
