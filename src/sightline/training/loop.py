"""The one training loop. It knows batches, an objective and a clock, and nothing of what is being learned."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sightline.errors import WorkError, printable
from sightline.network import Network
from sightline.objectives.objective import Objective
from sightline.training.average import Average
from sightline.training.distributed import World
from sightline.training.journal import Journal
from sightline.training.schedule import UNMEASURED, Plan, rate
from sightline.training.settings import Settings
from sightline.training.signals import Interrupted, Request, listening
from sightline.training.snapshot import restore, snapshot
from sightline.training.state import State, Store
from sightline.training.update import Update, Updater
from sightline.types import Batch

Batches = Iterable[tuple[int, Batch | None, Sequence[tuple[str, str]]]]

CLOCK_LOOKS = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9)
"""Shares of the time of a run by the clock at which the rest is planned anew."""

FIRST_LOOK = 10
"""Steps of one process after which a run by the clock is planned for the first time."""

SLOW_START = 3
"""Steps of each process that say nothing of its pace: caches are cold and worker processes begin."""

INFINITE_LIMIT = 5
"""Updates in a row that may be left out because the gradient is not finite."""

LISTEN_EVERY = 16
"""Steps between looks at the other processes' signals."""


@dataclass(frozen=True)
class Task:
    """What the loop needs of a run.

    `batches(step)` yields (step, batch, refused samples) from any step on, without end, as a pure function of the
    seed. `evaluate` gives a network's figures; `score` names the one that is better when it is larger. `name` turns
    the index of a sample into words.
    """

    objective: Objective
    settings: Settings
    batches: Callable[[int], Batches]
    steps_per_epoch: int
    evaluate: Callable[[nn.Module], dict[str, float]]
    score: str = "top1"
    name: Callable[[int], str] = str


@dataclass(frozen=True)
class Outcome:
    """The network to keep (the average of weights where there is one), its figures, and how the run went."""

    network: Network
    metrics: dict[str, float]
    steps: int
    seconds: float
    refused: list[tuple[str, str]]


class Loop:
    """Teaches `task.objective` until its plan is done; full state goes to `directory/checkpoints` along the way.

    With `resume` it goes on from the newest good checkpoint and ends with the same bits as an undisturbed run.
    """

    def __init__(self, task: Task, world: World, directory: Path, *, precision: torch.dtype, resume: bool, quiet: bool):
        self.task, self.settings, self.world = task, task.settings, world
        task.objective.to(world.device).train()
        self.network = task.objective.network
        if self.settings.checkpointing:
            for part in self.network.modules():
                setattr(part, "checkpointing", True)  # noqa: B010 (whoever has layers to recompute reads it)
        self.average = Average(self.network, self.settings.ema) if self.settings.ema else None
        self.updater = Updater(task.objective, self.settings, world, precision)
        self.store, self.best = Store(directory / "checkpoints"), Store(directory / "checkpoints" / "best")
        by_epochs = max(round(self.settings.epochs * task.steps_per_epoch), 1)
        self.state = State(Plan(by_epochs if self.settings.minutes is None else UNMEASURED))
        passed = self._resume() if resume else []
        place = directory if world.first else None
        self.journal = Journal(place, total=self.state.plan.total, kept=self.state.step, quiet=quiet)
        for words in passed:
            self.journal.say(f"passed over a checkpoint: {words}")
        self.entered, self.settled = self.state.step, self.state.seconds
        self.pulse = ""
        self.began, self.saved = time.monotonic() - self.state.seconds, time.monotonic()

    def run(self) -> Outcome:
        """Runs to the end of the plan. Raises Interrupted after a signal, WorkError where gradients stay infinite."""
        with closing(self.journal), listening() as request:
            ended = self.state.step >= self.state.plan.total
            for step, batch, refused in () if ended else self.task.batches(self.state.step):
                self._refuse(refused)
                before = self.state.plan.at(step)
                complete = self.world.sum(batch is not None) == self.world.size
                update = self._update(batch, step, before) if batch is not None and complete else None
                self.task.objective.after_update(before)
                self.state.step = step + 1
                self.state.seconds = time.monotonic() - self.began
                if update is not None:
                    self._record(update, step, before)
                if self.settings.minutes is not None:
                    self._replan(before)
                ended = self.state.step >= self.state.plan.total
                if ended or self._due():
                    ended = self._evaluate() or ended
                self._leave_if_asked(request)
                if ended or (self._listens() and self.world.agree(self._stale())):
                    self._keep()
                if ended:
                    break
        return self._outcome()

    def _update(self, batch: Batch, step: int, progress: float) -> Update:
        update = self.updater(batch, step, self.settings.lr * rate(self.settings, progress))
        if update.finite:
            self.state.infinite = 0
            if self.average is not None:
                self.average.update(self.network, step)
        elif not self.updater.scaler.is_enabled():
            self.state.infinite += 1
            names = ", ".join(printable(self.task.name(i)) for i in batch.index.tolist()[:8])
            self.journal.say(f"step {step}: the gradient is not finite; the update is left out. Images: {names} …")
            if self.state.infinite >= INFINITE_LIMIT:
                raise WorkError(
                    f"{INFINITE_LIMIT} updates in a row had no finite gradient, the last at step {step} with the "
                    f"images {names} … Try a smaller learning rate (--lr), and look at those images."
                )
        return update

    def _record(self, update: Update, step: int, progress: float) -> None:
        every = max(self.task.steps_per_epoch // 20, 1)
        if step % every:
            return
        parts = self.world.gather((update.loss, update.figures))
        loss = sum(part for part, _ in parts) / len(parts)
        figures = {name: sum(part[name] for _, part in parts) / len(parts) for name in update.figures}
        lr = self.settings.lr * rate(self.settings, progress)
        epoch = step / self.task.steps_per_epoch
        self.journal.record(step + 1, epoch=epoch, loss=loss, **figures, lr=lr, grad_norm=update.norm)
        speed = self.settings.batch_size * (step + 1) / self.state.seconds
        self.journal.scalars(step + 1, images_per_second=speed)
        self.journal.advance(step + 1, self.state.plan.total, loss, speed)
        self.pulse = f"loss {loss:.3f}  {speed:,.0f} images/s"

    def _replan(self, before: float) -> None:
        """Measures the pace since this process settled in, and plans what is left where it is time to look."""
        step, seconds, plan = self.state.step, self.state.seconds, self.state.plan
        paced = step - self.entered - SLOW_START
        if paced == 0:
            self.settled = seconds
        first = plan.total == UNMEASURED and step - self.entered >= FIRST_LOOK
        if paced > 0 and (first or any(before < share <= plan.at(step) for share in CLOCK_LOOKS)):
            left = 60 * (self.settings.minutes or 0) - seconds
            self.state.plan = self.world.agree(plan.replan(step, left, (seconds - self.settled) / paced))

    def _due(self) -> bool:
        """Whether this is the end of an epoch by which another of the run's evaluations should have been made."""
        if self.state.step % self.task.steps_per_epoch:
            return False
        wanted = int(self.state.plan.at(self.state.step) * self.settings.evaluations)
        wanted, self.state.evaluations = wanted > self.state.evaluations, max(wanted, self.state.evaluations)
        return wanted

    def _evaluate(self) -> bool:
        """Weighs the network to keep, notes the figures, and says whether patience is at an end."""
        kept = self.average.network if self.average is not None else self.network
        self.state.metrics = self.task.evaluate(kept)
        gained = self.state.metrics[self.task.score] > self.state.best
        self.state.best = max(self.state.best, self.state.metrics[self.task.score])
        self.state.stale = 0 if gained else self.state.stale + 1
        epoch = self.state.step / self.task.steps_per_epoch
        named = {f"val_{name}": value for name, value in self.state.metrics.items()}
        self.journal.record(self.state.step, epoch=epoch, **named)
        shown = "  ".join([self.pulse, *(f"{name} {value:.4f}" for name, value in named.items())])
        left = self.state.seconds / self.state.step * (self.state.plan.total - self.state.step)
        total = self.state.plan.total
        self.journal.say(f"epoch {epoch:.4g}  step {self.state.step}/{total}  {shown}  {left:.0f} s left")
        if gained and self.settings.patience is not None and self.world.first:
            self.best.save(self.state, {f"network.{k}": v for k, v in kept.state_dict().items()})
        return self.settings.patience is not None and self.state.stale >= self.settings.patience

    def _refuse(self, refused: Sequence[tuple[str, str]]) -> None:
        self.state.refused += refused
        for name, reason in refused:
            self.journal.say(f"left out {printable(name)}: {printable(reason)}")

    def _listens(self) -> bool:
        return self.world.size == 1 or self.state.step % LISTEN_EVERY == 0

    def _stale(self) -> bool:
        return time.monotonic() - self.saved > self.settings.save_seconds

    def _leave_if_asked(self, request: Request) -> None:
        if self._listens() and (number := max(self.world.gather(request.number))):
            self._keep()
            raise Interrupted(number, self.state.step)

    def _keep(self) -> None:
        if self.world.first:
            self.store.save(self.state, snapshot(self.task.objective, self.average, self.updater))
        self.saved = time.monotonic()

    def _resume(self) -> list[str]:
        """Goes back to the newest good checkpoint, where there is one; says which damaged ones were passed over."""
        found = self.store.newest()
        if found is None:
            return []
        self.state, tensors, passed = found
        restore(tensors, self.task.objective, self.average, self.updater)
        return passed

    def _outcome(self) -> Outcome:
        kept = self.average.network if self.average is not None else self.network
        metrics = self.state.metrics
        if self.settings.patience is not None and (best := self.best.newest()) is not None:
            state, tensors, _ = best
            kept.load_state_dict({name.removeprefix("network."): tensor for name, tensor in tensors.items()})
            metrics = state.metrics
        return Outcome(kept.eval(), metrics, self.state.step, self.state.seconds, self.state.refused)
