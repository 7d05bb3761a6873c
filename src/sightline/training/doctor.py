"""What goes wrong in a training, named while it happens, with advice.

Nothing that a doctor does changes the run: it draws no random number and touches no weight. What it knows it has from
the lines of the journal, to which its own measurements go, so that a resumed run reads them again and repeats nothing.
Only times are in no journal; they are measured anew by each process.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from sightline.datasets.effort import Effort
from sightline.device import out_of_memory
from sightline.network import Network
from sightline.training.chart import Chart, Finding, Labels
from sightline.training.collapse import COLLAPSES
from sightline.training.schedule import Plan
from sightline.training.settings import Settings
from sightline.training.symptoms import AT_BATCHES, AT_EVALUATIONS, AT_ONCE, COMPARED, Rule, patch_too_large
from sightline.training.vitals import kernels, likeness, still_heads, tokens_of, update_ratio
from sightline.types import Batch

LONG_WAIT = 0.05
"""Share of a run that may go into waiting for images."""

WAITS = ((0.8, 5.0), (0.5, 30.0), (LONG_WAIT, 60.0))
"""Shares of the time beyond which waiting counts as lost, and the seconds lost from which it is worth a word: the
slower reading is, the sooner."""

WAITED = 15.0
"""Seconds of waiting of a whole run that are no harm, whatever share they are."""

CROWDED, HELD_UP = 0.3, 0.3
"""Shares of the readers' time, in waiting for a core or for a disk, that are the cause of slow reading."""

PLACES = 32
"""Measurements of the network along a run, besides those at powers of two."""

APART = 16
"""Updates between them at least, so that they cost less than a hundredth of the time."""


class Doctor:
    """Reads the journal of a run and names what is wrong, each kind of finding once.

    `labels` says what there is to learn, where that is classes; without it the first losses stand for those of knowing
    nothing, and rules about labels are silent. `findings` are those so far, in order; `say` hears each new one.
    `reading` is what the readers of images are at, where that is known.
    """

    def __init__(self, settings: Settings, steps_per_epoch: int, labels: Labels | None = None):
        self.chart = Chart(settings, steps_per_epoch, labels)
        self.findings: list[Finding] = []
        self.say: Callable[[str], None] | None = None
        self.reading: Effort | None = None
        self._lost = [0.0] * len(WAITS)

    def attend(
        self, network: Network, plan: Plan, past: Iterable[Mapping[str, Any]], say: Callable[[str], None]
    ) -> None:
        """Looks at what is known before the first step, and reads the journal of a resumed run, which was said."""
        past = list(past)
        self.say, self.chart.plan = None if past else say, plan
        if finding := patch_too_large(self.chart, tokens_of(network), network.architecture.backbone.image_size):
            self._find(finding)
        self._apply(AT_ONCE)
        for record in past:
            self.hear(record)
        self.say = say

    def hear(self, record: Mapping[str, Any]) -> None:
        """One line of the journal."""
        self.chart.take(record)
        self._apply(COLLAPSES)
        self._apply(AT_EVALUATIONS if "val_loss" in record else AT_BATCHES)

    def measures(self, step: int) -> bool:
        """Whether the effect of update `step`, counted from 0, is to be measured: a function of the plan alone."""
        if step >= 8 and step & (step - 1) == 0:
            return True
        plan = self.chart.plan
        return step > 0 and step % APART == 0 and int(PLACES * plan.at(step)) > int(PLACES * plan.at(step - APART))

    def watches(self, step: int) -> bool:
        """Whether the features are to be looked at before update `step`, where no labels say what is learned."""
        return self.chart.labels is None and (step == 0 or self.measures(step))

    def measure(self, network: Network, before: Sequence[Tensor], batch: Batch, rate: float) -> dict[str, Any]:
        """What an update at a learning rate did to the kernels, and how the heads do; figures for the journal.

        Heads are left out where memory does not suffice to look at them.
        """
        moved = {"update_ratio": update_ratio(before, kernels(network)), "rate": rate}
        try:
            return moved | {"still_heads": [list(head) for head in still_heads(network, batch)]}
        except (RuntimeError, MemoryError) as fault:
            if not out_of_memory(fault):
                raise
        return moved

    @property
    def suspicious(self) -> bool:
        """Whether the labels of batches are to be compared."""
        return self._found("loss-at-chance") and self.chart.labels is not None and self.chart.likeness[0] < COMPARED

    def compare(self, batch: Batch) -> dict[str, Any]:
        """Whether images of a batch that look alike share labels; figures for the journal."""
        return {"likeness": list(likeness(batch.pixels, batch.targets, batch.index))}

    def time(self, step: int, waited: float, worked: float) -> None:
        """Seconds that a step waited for its images, and then computed."""
        pairs = zip(self._lost, WAITS, strict=True)
        self._lost = [_lost(before, waited, worked, limit, share) for before, (share, limit) in pairs]
        for lost, (share, limit) in zip(self._lost, WAITS, strict=True):
            if lost >= limit and not self._found("slow-input"):
                self._find(slow_input(step, f"more than {share:.0%}", self.chart.settings, self.reading))

    def conclude(self, step: int, waited: float, share: float) -> None:
        """Seconds that a whole run waited for images, and their share of its steps' time."""
        if share > LONG_WAIT and waited >= WAITED and not self._found("slow-input"):
            self._find(slow_input(step, f"{share:.0%}", self.chart.settings, self.reading))

    def summary(self) -> str:
        """One line about the whole run."""
        if not self.findings:
            return "doctor: nothing stood out"
        named = ", ".join(f"{f.kind} (step {f.step})" if f.step else f.kind for f in self.findings)
        return f"doctor: {len(self.findings)} finding{'s' * (len(self.findings) > 1)}: {named}"

    def _apply(self, rules: Mapping[str, Rule]) -> None:
        for kind, rule in rules.items():
            if not self._found(kind) and (finding := rule(self.chart)) is not None:
                self._find(finding)

    def _find(self, finding: Finding) -> None:
        self.findings.append(finding)
        if self.say is not None:
            self.say(str(finding))

    def _found(self, kind: str) -> bool:
        return any(finding.kind == kind for finding in self.findings)


def slow_input(step: int, share: str, settings: Settings, reading: Effort | None) -> Finding:
    """What it means that so large a share of the time goes into waiting for images: the cause, and what helps."""
    cores, workers = os.cpu_count() or 1, settings.workers
    processes = f"{workers} worker process{'es' * (workers > 1)}"
    words = f"{share} of the time goes into waiting for images, which "
    words += f"{processes} read{'s' * (workers == 1)}" if workers else "are read between the steps"
    smaller = "store the images at about the size at which the network reads them"
    more = f"Use more worker processes (--workers {max(2 * workers, 2)}), or {smaller}."
    if reading is None or not reading.batches or reading.seconds <= 0:
        return Finding("slow-input", step, "note", words, more)
    crowded, held_up = reading.queued / reading.seconds, reading.idle / reading.seconds
    words += f"; a batch takes {reading.seconds / reading.batches:.2g} s to read"
    if crowded > CROWDED:
        words += f", {crowded:.0%} of it without a core: other processes or threads hold all {cores}"
        advice = "Let nothing else run beside it, give the network fewer threads (--threads), or " + smaller + "."
    elif held_up > HELD_UP:
        words += f", {held_up:.0%} of it in waiting for the disk or the network that holds the images"
        advice = "Copy the images to a local disk or into shards, or use more worker processes (--workers "
        advice += f"{max(2 * workers, 2)})."
    else:
        words += ", nearly all of it in decoding and augmenting"
        advice = more if workers < cores else f"All {cores} cores are at it: {smaller}, or augment less."
    return Finding("slow-input", step, "note", words, advice)


def _lost(before: float, waited: float, worked: float, limit: float, share: float) -> float:
    """Seconds lost so far by waiting for longer than that share of the time, never less than none.

    One step counts for a tenth of the limit at most: a disk may hold its breath once.
    """
    return max(before + min(waited - share / (1 - share) * worked, limit / 10), 0.0)
