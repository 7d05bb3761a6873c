"""The one training loop. It knows batches, an objective and a clock, and nothing of what is being learned."""

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sightline.checkpoints.atomic import sweep
from sightline.errors import UserError, WorkError, printable
from sightline.network import Network, recompute
from sightline.objectives.objective import Objective
from sightline.training.average import Average
from sightline.training.chart import Finding, Labels
from sightline.training.distributed import World
from sightline.training.doctor import LONG_WAIT, Doctor
from sightline.training.journal import Journal, read
from sightline.training.saver import Saver
from sightline.training.schedule import UNMEASURED, Plan, rate
from sightline.training.settings import Settings
from sightline.training.signals import Interrupted, Request, listening
from sightline.training.snapshot import expected_size, restore, snapshot
from sightline.training.state import State, Store
from sightline.training.symptoms import UNSAID
from sightline.training.update import Update, Updater
from sightline.training.vitals import kernels, spread_of
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

NAMED = 3
"""Images that a complaint names."""


def _nothing() -> None:
    """Does nothing."""


@dataclass(frozen=True)
class Task:
    """What the loop needs of a run.

    `batches(step, say)` yields (step, batch, refused samples) from any step on, without end, as a pure function of the
    seed, and says what befell the reading; its `effort`, where it has one, tells what reading takes.
    `evaluate(network, heed)` gives a network's figures, and calls `heed` between batches, which raises where the run is
    asked to end. `score` names the figure that is better when it is larger. `name` turns the index of one of the
    `images` samples into words. `begin` is called once the state before the first step is safe, so that a run of which
    anything is known can always go on. `aside` are seconds of a run by the clock that go into other things than
    teaching.
    """

    objective: Objective
    settings: Settings
    batches: Callable[[int, Callable[[str], None]], Batches]
    images: int
    steps_per_epoch: int
    evaluate: Callable[[nn.Module, Callable[[], None]], dict[str, float]]
    begin: Callable[[], None] = _nothing
    score: str = "top1"
    name: Callable[[int], str] = str
    labels: Labels | None = None
    aside: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """The network to keep (the average of weights where there is one), its figures, and how the run went.

    Of the `seconds`, `waited` went into waiting for images.
    """

    network: Network
    metrics: dict[str, float]
    steps: int
    seconds: float
    refused: dict[str, str]
    findings: list[Finding]
    waited: float = 0.0


class Loop:
    """Teaches `task.objective` until its plan is done; full state goes to `directory/checkpoints` along the way.

    With `resume` it goes on from the newest good checkpoint and ends with the same bits as an undisturbed run.
    """

    def __init__(self, task: Task, world: World, directory: Path, *, precision: torch.dtype, resume: bool, quiet: bool):
        self.task, self.settings, self.world = task, task.settings, world
        task.objective.to(world.device).train()
        self.network = task.objective.network
        recompute(self.network, self.settings.checkpointing)
        self.average = Average(self.network, self.settings.ema) if self.settings.ema else None
        self.updater = Updater(task.objective, self.settings, world, precision)
        self.store, self.best = Store(directory / "checkpoints"), Store(directory / "checkpoints" / "best")
        by_epochs = max(round(self.settings.epochs * task.steps_per_epoch), 1)
        self.state = State(Plan(by_epochs if self.settings.minutes is None else UNMEASURED))
        passed = self._resume() if resume else []
        if world.first:
            sweep(directory)
            self.store.tidy(self.state.step)
            self.best.tidy(self.state.step)
            self.store.require_room(expected_size(task.objective, self.average, self.settings))
            if not resume:
                self.store.save(self.state, snapshot(task.objective, self.average, self.updater))
                task.begin()
        place = directory if world.first else None
        self.journal = Journal(
            place, total=self.state.plan.total, kept=self.state.step, length=self.state.journal, quiet=quiet
        )
        self.saver = Saver(self.store, first=self.journal.sync)
        self.request = Request()
        for words in passed:
            self.journal.say(f"passed over a checkpoint: {words}")
        self.doctor = Doctor(self.settings, task.steps_per_epoch, task.labels)
        if world.first:
            past = read(directory / "metrics.jsonl")
            self.doctor.attend(self.network, self.state.plan, past, self.journal.say)
            self.journal.reader = self.doctor.hear
        self.entered, self.settled = self.state.step, self.state.seconds
        self.pulse = ""
        self.began, self.saved = time.monotonic() - self.state.seconds, time.monotonic()

    def run(self) -> Outcome:
        """Runs to the end of the plan.

        Raises Interrupted after a signal, and WorkError where gradients stay infinite, too many images cannot be read,
        memory suffices for nothing, or the disk refuses.
        """
        with closing(self.journal), listening() as self.request, self._saving():
            ended = self.state.step >= self.state.plan.total
            if self.state.due:  # the run was stopped in an evaluation
                ended = self._evaluate() or ended
                self._keep()
            self._require_readable()
            batches = () if ended else self.task.batches(self.state.step, self.journal.say)
            self.doctor.reading = getattr(batches, "effort", None)
            asked = time.monotonic()
            for step, batch, refused in batches:
                given = time.monotonic()
                before = self.state.plan.at(step)
                complete = self._everywhere(batch, refused)
                update = self._update(batch, step, before) if batch is not None and complete else None
                self.task.objective.after_update(before)
                if step - self.entered >= SLOW_START:
                    self._clock(step + 1, given - asked, time.monotonic() - given)
                self.state.step = step + 1
                self.state.seconds = time.monotonic() - self.began
                if update is not None and batch is not None:
                    self._record(update, batch, step, before)
                if self.settings.minutes is not None:
                    self._replan(before)
                ended = self.state.step >= self.state.plan.total
                self.state.due = self._due() or ended
                self._heed()
                if self.state.due:
                    ended = self._evaluate() or ended
                self.saver.check()
                self._leave_if_asked()
                if ended or (self._listens() and self.world.agree(self._stale())):
                    self._keep()
                self._require_readable()
                if ended:
                    break
                asked = time.monotonic()
            self.doctor.conclude(self.state.step, self.state.waited, self.state.waiting)
            self.journal.say(self.doctor.summary())
        return self._outcome()

    def _clock(self, step: int, waited: float, worked: float) -> None:
        """Notes for how many seconds a step waited for its images, and then computed."""
        self.state.waited += waited
        self.state.worked += worked
        self.doctor.time(step, waited, worked)

    @contextmanager
    def _saving(self) -> Generator[None]:
        """Waits for the checkpoint that is being written before the run is left, however that comes."""
        try:
            yield
        except BaseException:
            with suppress(WorkError):  # the first fault counts
                self.saver.wait()
            raise
        self.saver.wait()

    def _everywhere(self, batch: Batch | None, refused: Sequence[tuple[str, str]]) -> bool:
        """Whether every process has a batch; notes the images that could not be read, whichever process met them."""
        if self.world.sum(batch is not None and not refused) == self.world.size:
            return True
        parts = self.world.gather((batch is not None, list(refused)))
        for name, reason in (image for _, images in parts for image in images):
            if name not in self.state.refused:
                self.state.refused[name] = reason
                self.journal.say(f"left out {printable(name)}: {printable(reason)}")
        return all(present for present, _ in parts)

    def _require_readable(self) -> None:
        """Raises WorkError where more of the training images cannot be read than the run may go without."""
        refused, limit = self.state.refused, self.settings.refused_limit
        if len(refused) <= limit * self.task.images:
            return
        self._keep()
        self.saver.wait()
        shown = "; ".join(f"{printable(n)}: {printable(why)}" for n, why in list(refused.items())[:NAMED])
        more = f"; and {len(refused) - NAMED} more" if len(refused) > NAMED else ""
        raise WorkError(
            f"{len(refused)} of the {self.task.images:,} training images cannot be read ({shown}{more}), which is more "
            f"than the {limit:.3g} of them that a run may go without. Everything so far is saved. Mend or remove those "
            "images and start anew, or go on without them: --resume with a higher --refused-limit."
        )

    def _update(self, batch: Batch, step: int, progress: float) -> Update:
        before = self.updater.micro_batch
        lr, self.doctor.chart.plan = self.settings.lr * rate(self.settings, progress), self.state.plan
        old = kernels(self.network) if self.world.first and self.doctor.measures(step) else None
        if self.world.first and self.doctor.watches(step):
            self.journal.record(step, **spread_of(self.network, batch))
        update = self.updater(batch, step, lr, progress)
        if old is not None and update.finite:
            self.journal.record(step + 1, **self.doctor.measure(self.network, old, batch, lr))
        if self.updater.micro_batch != before:
            self.state.micro_batch = self.updater.micro_batch
            self.journal.say(
                f"step {step}: memory does not suffice; from here on {self.state.micro_batch} images are computed at a "
                "time, and as many as before make an update"
            )
        if update.finite:
            self.state.infinite = 0
            if self.average is not None:
                self.average.update(self.network, step)
        elif not self.updater.scaler.is_enabled():
            self.state.infinite += 1
            names = ", ".join(printable(self.task.name(i)) for i in batch.index.tolist()[:8])
            self.journal.say(f"step {step}: the gradient is not finite; the update is left out. Images: {names} …")
            self.journal.record(step + 1, left_out=[self.task.name(i) for i in batch.index.tolist()[:8]])
            if self.state.infinite >= INFINITE_LIMIT:
                raise WorkError(
                    f"{INFINITE_LIMIT} updates in a row had no finite gradient, the last at step {step} with the "
                    f"images {names} … Try a smaller learning rate (--lr), and look at those images."
                )
        return update

    def _record(self, update: Update, batch: Batch, step: int, progress: float) -> None:
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
        self.journal.scalars(step + 1, images_per_second=speed, waiting=self.state.waiting)
        if self.doctor.suspicious:
            self.journal.record(step + 1, **self.doctor.compare(batch))
        self.journal.advance(step + 1, self.state.plan.total, loss, speed)
        watched = "" if self.task.labels else "".join(f"  {name} {value:.3g}" for name, value in figures.items())
        self.pulse = f"loss {loss:.3f}{watched}  {speed:,.0f} images/s"

    def _replan(self, before: float) -> None:
        """Measures the pace since this process settled in, and plans what is left where it is time to look."""
        step, seconds, plan = self.state.step, self.state.seconds, self.state.plan
        paced = step - self.entered - SLOW_START
        if paced == 0:
            self.settled = seconds
        first = plan.total == UNMEASURED and step - self.entered >= FIRST_LOOK
        if paced > 0 and (first or any(before < share <= plan.at(step) for share in CLOCK_LOOKS)):
            given = 60 * (self.settings.minutes or 0)
            left = given - min(self.task.aside, given / 2) - seconds
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
        kept = self.average.network if self.average is not None else self.task.objective.kept
        self.state.metrics = self.task.evaluate(kept, self._heed)
        self.state.due = False
        gained = self.state.metrics[self.task.score] > self.state.best
        self.state.best = max(self.state.best, self.state.metrics[self.task.score])
        self.state.stale = 0 if gained else self.state.stale + 1
        epoch = self.state.step / self.task.steps_per_epoch
        named = {f"val_{name}": value for name, value in self.state.metrics.items()}
        self.journal.record(self.state.step, epoch=epoch, **named)
        told = [f"val_{name} {value:.4f}" for name, value in self.state.metrics.items() if name not in UNSAID]
        shown = "  ".join([self.pulse, *told])
        left = self.state.seconds / self.state.step * (self.state.plan.total - self.state.step)
        total = self.state.plan.total
        waiting = f"  {self.state.waiting:.0%} waiting" if self.state.waiting >= LONG_WAIT else ""
        self.journal.say(f"epoch {epoch:.4g}  step {self.state.step}/{total}  {shown}{waiting}  {left:.0f} s left")
        if gained and self.settings.patience is not None and self.world.first:
            Saver(self.best).save(self.state, {f"network.{k}": v for k, v in kept.state_dict().items()})
        return self.settings.patience is not None and self.state.stale >= self.settings.patience

    def _listens(self) -> bool:
        return self.world.size == 1 or self.state.step % LISTEN_EVERY == 0

    def _stale(self) -> bool:
        return time.monotonic() - self.saved > self.settings.save_seconds and not self.saver.busy

    def _heed(self) -> None:
        """Leaves between two batches of an evaluation. Several processes wait for the end of it: they keep in step."""
        if self.world.size == 1:
            self._leave_if_asked()

    def _leave_if_asked(self) -> None:
        if self._listens() and (number := max(self.world.gather(self.request.number))):
            self._keep()
            self.saver.wait()
            raise Interrupted(number, self.state.step)

    def _keep(self) -> None:
        if self.world.first:
            self.state.journal = self.journal.length
            self.saver.start(self.state, snapshot(self.task.objective, self.average, self.updater))
        self.saved = time.monotonic()

    def _resume(self) -> list[str]:
        """Goes back to the newest good checkpoint; says which damaged ones were passed over."""
        found = self.store.newest()
        if found is None:
            where = printable(self.store.directory)
            raise UserError(f"{where} holds no checkpoint to go on from: they were removed. Start anew elsewhere.")
        self.state, tensors, passed = found
        where = f"{printable(self.store.directory)}, step {self.state.step}"
        restore(tensors, self.task.objective, self.average, self.updater, where)
        sizes = [size for size in (self.state.micro_batch, self.settings.micro_batch) if size is not None]
        self.updater.micro_batch = min(sizes, default=None)
        return passed

    def _outcome(self) -> Outcome:
        kept = self.average.network if self.average is not None else self.task.objective.kept
        metrics = self.state.metrics
        if self.settings.patience is not None and (best := self.best.newest()) is not None:
            state, tensors, _ = best
            kept.load_state_dict({name.removeprefix("network."): tensor for name, tensor in tensors.items()})
            metrics = state.metrics
        state, findings = self.state, self.doctor.findings
        return Outcome(kept.eval(), metrics, state.step, state.seconds, state.refused, findings, state.waited)
