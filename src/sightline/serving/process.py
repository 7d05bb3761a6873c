"""The server's side of one process that computes."""

import asyncio
import multiprocessing
import socket
from collections.abc import Mapping
from typing import Any

from sightline.errors import UserError, WorkError
from sightline.serving import wire
from sightline.serving.jobs import Job

_PRELOADED = "sightline.serving.worker"


class Process:
    """One process with one model, and the jobs that it has.

    Processes are forked from one that has loaded the libraries and done nothing else: a new one stands in a fraction
    of the time that importing torch takes, and inherits neither connections nor threads.
    """

    def __init__(self, source: str, options: Mapping[str, Any]):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([_PRELOADED])
        ours, theirs = socket.socketpair()
        self.line = ours
        self.jobs: dict[int, Job] = {}
        self.facts: dict[str, Any] = {}
        self.lost = asyncio.Event()
        self.closing = False
        self.writer: asyncio.StreamWriter | None = None
        self._process: Any = context.Process(target=_work, args=(theirs, source, dict(options)), daemon=True)
        self._theirs = theirs

    async def start(self) -> None:
        """Starts the process and waits for its model. Raises UserError or WorkError where it cannot be loaded."""
        await asyncio.to_thread(self._process.start)
        self._theirs.close()
        self.reader, self.writer = await asyncio.open_connection(sock=self.line, limit=2**20)
        said = await wire.receive_soon(self.reader)
        if said is None:
            raise WorkError("the process that loads the model has died; does memory suffice?")
        self.facts = said[0]
        if "failed" in self.facts:
            kind = UserError if self.facts["status"] == 2 else WorkError
            raise kind(self.facts["failed"])

    @property
    def pid(self) -> int | None:
        """The number of the process."""
        return self._process.pid

    @property
    def images(self) -> int:
        """How many images it has."""
        return sum(job.images for job in self.jobs.values())

    @property
    def free(self) -> bool:
        """Whether it can take one more job: some wait there already, so that it never has to wait."""
        return not self.closing and not self.lost.is_set() and self.images < self.facts["look_ahead"]

    def send(self, job: Job) -> None:
        """Gives it a job."""
        assert self.writer is not None, "the process has been started"
        self.jobs[job.id] = job
        self.writer.writelines(wire.packed(job.header | {"id": job.id}, job.parts))

    async def answers(self) -> Any:
        """Its answers as they come: the job, the header and the body; it ends when the process does."""
        while (said := await wire.receive_soon(self.reader)) is not None:
            header, parts = said
            job = self.jobs.pop(header["id"])
            yield job, header, parts[0]
        self.lost.set()

    async def end(self) -> None:
        """Ends the process, whatever it does."""
        self.closing = True
        if self.writer is not None:
            self.writer.close()
        await asyncio.to_thread(self._join)

    def _join(self) -> None:
        if self._process.pid is not None:
            self._process.join(2)
            self._process.kill()
            self._process.join(2)


def _work(line: socket.socket, source: str, options: dict[str, Any]) -> None:
    from sightline.serving.worker import work

    work(line, source, options)
