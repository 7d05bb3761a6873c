"""The queue before a model: bounded, by number and by the time it would take; and the processes that empty it."""

import asyncio
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from sightline.errors import UserError, WorkError
from sightline.serving.jobs import Job, Reply
from sightline.serving.metrics import Metrics
from sightline.serving.process import Process
from sightline.serving.rejection import Rejection
from sightline.serving.settings import Settings

_EXPLAINED = 8.0
"""How many times as long an explanation is thought to take as a prediction, until one has been measured."""
_LOOK = 0.5


class Desk:
    """Where the requests for one model wait, and who sees that they are answered.

    A request is taken or refused at once: it is taken where fewer than `queue` images wait, and where what is there
    already will be done within `max_wait` by what images took so far. A process that dies costs the requests that it
    has; the others wait for the next one. A model that changes on disk is loaded beside the old one, which answers
    until the new one is ready, and stays where that cannot be loaded.
    """

    def __init__(self, name: str, source: str, options: Mapping[str, Any], settings: Settings, metrics: Metrics):
        self.name, self.source, self.settings, self.metrics = name, source, settings, metrics
        self.options = {**options, "batch_size": settings.batch_size}
        self.waiting: deque[Job] = deque()
        self.process: Process | None = None
        self.rates: dict[str, float] = {}
        self.finished = 0.0
        self.tasks: set[asyncio.Task[None]] = set()
        self.retired: set[Process] = set()
        self.seen = _state(source)
        self.reload_now = asyncio.Event()
        self.closed = False

    @property
    def ready(self) -> bool:
        """Whether a process stands by."""
        return self.process is not None and not self.process.lost.is_set()

    @property
    def facts(self) -> dict[str, Any]:
        """What the model is; empty until it is loaded."""
        return {} if self.process is None else self.process.facts

    @property
    def queued(self) -> int:
        """How many images wait."""
        return sum(job.images for job in self.waiting if not job.future.done())

    def wait(self) -> float:
        """How many seconds it will take until what is there already is done."""
        there = [job for job in self.waiting if not job.future.done()]
        there += [] if self.process is None else self.process.jobs.values()
        return sum(job.images * self.rates.get(job.kind, 0.0) for job in there)

    async def start(self) -> None:
        """Loads the model. Raises UserError or WorkError where that cannot be done."""
        await self._take_over(await self._started())
        self._run(self._watch())

    async def ask(self, header: dict[str, Any], parts: Sequence[bytes]) -> Reply:
        """The answer to one request. Raises Rejection where it is not taken, or comes too late."""
        wait, queued = self.wait(), self.queued
        if queued + len(parts) > max(self.settings.queue, len(parts)) or wait > self.settings.max_wait:
            raise Rejection(
                503,
                "busy",
                f"{queued} images wait already, for about {wait:.1f} seconds; try again later",
                retry_after=max(wait - self.settings.max_wait / 2, 1),
            )
        job = Job(header | {"name": self.name}, parts, asyncio.get_running_loop().create_future())
        self.waiting.append(job)
        self._pump()
        try:
            async with asyncio.timeout(self.settings.deadline):
                return await job.future
        except TimeoutError:
            seconds = f"{self.settings.deadline:g} seconds"
            raise Rejection(
                503, "deadline", f"there was no answer within {seconds}; try again later", retry_after=self.wait()
            ) from None
        finally:
            job.future.cancel()  # nothing is computed for a client that has gone
            with suppress(ValueError):
                self.waiting.remove(job)

    async def end(self) -> None:
        """Ends the processes."""
        self.closed = True
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*(process.end() for process in (self.process, *self.retired) if process is not None))

    def _pump(self) -> None:
        while self.waiting and self.process is not None and self.process.free:
            job = self.waiting.popleft()
            if not job.future.done():
                job.sent = time.monotonic()
                self.process.send(job)

    async def _started(self) -> Process:
        process = Process(self.source, self.options)
        try:
            await process.start()
        except BaseException:
            await process.end()
            raise
        return process

    async def _take_over(self, process: Process) -> None:
        """A new process takes what waits; the one before finishes what it has."""
        before, self.process = self.process, process
        seconds = process.facts["seconds"]
        self.rates = {"predict": seconds, "explain": _EXPLAINED * seconds}
        if before is not None:
            before.closing = True
            self.retired.add(before)
        self._run(self._collect(process))
        self._pump()
        if before is not None and not before.jobs:
            await before.end()

    async def _collect(self, process: Process) -> None:
        """Hands out the answers of a process; when it dies, sees to another."""
        async for job, header, body in process.answers():
            now = time.monotonic()
            spent = (now - max(job.sent, self.finished)) / job.images
            self.rates[job.kind] = 0.8 * self.rates.get(job.kind, spent) + 0.2 * spent
            self.finished = now
            self.metrics.computed(self.name, job.kind, job.images, header["batch"])
            if not job.future.done():
                job.future.set_result(Reply(header["status"], body))
            self._pump()
            if process.closing and not process.jobs:
                break
        self.retired.discard(process)
        for job in process.jobs.values():
            if not job.future.done():
                words = "the process that computed the answer has died; another one takes over"
                job.future.set_exception(Rejection(503, "worker_lost", words, retry_after=1))
        process.jobs.clear()
        await process.end()
        if process is self.process and not self.closed:
            self.metrics.restarts.labels(self.name).inc()
            self._say("the process that computes has died; another one is started")
            self._run(self._replace())

    async def _replace(self) -> None:
        """Starts processes until one stands, more and more patiently."""
        pause = 0.0
        while not self.closed:
            try:
                await self._take_over(await self._started())
                return
            except (UserError, WorkError) as fault:
                self._say(str(fault))
                pause = min(max(2 * pause, 1), 30)
                await asyncio.sleep(pause)

    async def _watch(self) -> None:
        """Loads the model anew when its files have changed and stay as they are for two looks, or when told to."""
        last = self.seen
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.reload_now.wait(), _LOOK)
            now, before = _state(self.source), last
            last = now
            if not self.reload_now.is_set() and (now is None or now == self.seen or now != before):
                continue
            self.reload_now.clear()
            self.seen = now
            try:
                await self._take_over(await self._started())
                self.metrics.reloads.labels(self.name, "loaded").inc()
                self._say("loaded anew")
            except (UserError, WorkError) as fault:
                self.metrics.reloads.labels(self.name, "refused").inc()
                self._say(f"the old model stays, for the new one cannot be loaded: {fault}")

    def _run(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def _say(self, words: str) -> None:
        print(f"sightline: {self.name}: {words}", file=sys.stderr, flush=True)


def _state(source: str) -> tuple[Any, ...] | None:
    """What tells whether a model on disk has changed; None where there is none."""
    paths = [source]
    if os.path.isdir(source):  # noqa: PTH112  (a `Path` would choke on a name that no path can have)
        paths = sorted(entry.path for entry in os.scandir(source) if entry.name.endswith((".json", ".safetensors")))
    try:
        found = [os.stat(path) for path in paths]  # noqa: PTH116
    except (OSError, ValueError):
        return None
    return tuple((entry.st_ino, entry.st_size, entry.st_mtime_ns) for entry in found)
