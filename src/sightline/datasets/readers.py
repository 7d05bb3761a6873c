"""Processes that read batches ahead. One that dies or hangs is replaced, and every batch still comes exactly once."""

import io
import mmap
import multiprocessing.util
import os
import pickle
import signal
import socket
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from heapq import heappop, heappush
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sightline.datasets.effort import Effort, measured
from sightline.device import keep_for_next
from sightline.errors import WorkError

Watch = Callable[[int], str | None]
"""Told the index of every image before it is read; says why it is better left alone, or None."""

Load = Callable[[int, Watch], Any]
"""Makes the batch of a step; the same for the same step, whoever makes it."""

AHEAD = 2
"""Batches that each process may be asked for before they are wanted."""

LOOK = 1.0
"""Seconds between looks at processes that owe a batch."""

STOPPED, SILENT = 8, 300
"""Looks after which a process that was stopped, or has not finished one image, is taken for hung."""

BLAMED = 3
"""Processes in a row that an image may cost before it is left out."""

TRIES = 10
"""Processes in a row that may be lost without one more batch."""

_KIND = socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_DGRAM  # messages come whole or not at all
_ALIGNED = 64


class Readers:
    """`count` processes that make the batches of `load`; `say` hears of those that had to be replaced.

    A batch that was lost with its process is read again by another. An image at which `BLAMED` processes in a row ended
    is left out, with the reason: a crash of a decoder costs that image and not the run. Batches come as file
    descriptors of anonymous memory, so that nothing more is needed of a process that has sent one.
    """

    def __init__(self, load: Load, count: int, say: Callable[[str], None]):
        self.load, self.count, self.say = load, count, say
        self.readers: list[_Reader] = []
        self.effort = Effort()
        self.left_out: dict[int, str] = {}
        self.blamed: Counter[tuple[int, int]] = Counter()
        self.lost = 0

    def read(self, steps: range) -> Iterator[Any]:
        """The batches of these steps, in order. Raises WorkError where processes die again and again."""
        whole = False
        try:
            yield from self._read(steps)
            whole = True
        finally:
            if not whole:  # what is under way would come to the next reading
                self.close()

    def close(self) -> None:
        """Ends the processes; reading again begins new ones."""
        for reader in self.readers:
            reader.end()
        self.readers = []

    def _read(self, steps: range) -> Iterator[Any]:
        coming, wanted, done = steps.start, [], {}
        self.blamed.clear()
        for step in steps:
            while True:
                while coming < min(step + AHEAD * self.count, steps.stop):
                    heappush(wanted, coming)
                    coming += 1
                self._hand_out(wanted)
                if step in done:
                    break
                self._collect(wanted, done)
            self.lost = 0
            yield done.pop(step)

    def _hand_out(self, wanted: list[int]) -> None:
        """Gives the lowest steps to the readers that owe the least."""
        try:
            while len(self.readers) < self.count:
                self.readers.append(_Reader(self.load))
        except OSError as fault:
            raise WorkError(f"cannot start a process that reads images ({fault.strerror}); {_REMEDY}") from fault
        while wanted:
            reader = min(self.readers, key=lambda reader: len(reader.owed))
            if len(reader.owed) == AHEAD:
                return
            reader.ask(heappop(wanted), self.left_out)

    def _collect(self, wanted: list[int], done: dict[int, Any]) -> None:
        """Waits a moment for batches; puts back what was owed by a reader that is lost."""
        owing = [reader for reader in self.readers if reader.owed]
        ready = wait([reader.line for reader in owing] + [reader.process.sentinel for reader in owing], LOOK)
        for reader in owing:
            if reader.line in ready and (answer := reader.answer()) is not None:
                done[reader.owed.pop(0)], took = answer
                self.effort.add(took)
            elif reader.line in ready or reader.process.sentinel in ready:
                self._replace(reader, reader.end_of(), wanted)
            elif not ready and (why := reader.hangs()):
                self._replace(reader, why, wanted)

    def _replace(self, reader: "_Reader", why: str, wanted: list[int]) -> None:
        reader.end()
        self.readers.remove(reader)
        self.lost += 1
        if self.lost >= TRIES:
            raise WorkError(f"{TRIES} processes that read images were lost in a row, the last one {why}; {_REMEDY}")
        self.say(f"a process that reads images {why}; another reads batch {reader.owed[0]} again")
        if (index := reader.at) is not None:
            at = (reader.owed[0], index)  # of this step: one loss now and one an epoch later are no row
            self.blamed[at] += 1
            if self.blamed[at] >= BLAMED:
                self.left_out[index] = f"each of {BLAMED} processes that read it {why}"
        for step in reader.owed:
            heappush(wanted, step)


_REMEDY = "free some memory, or read images without worker processes (--workers 0)"


class _Reader:
    """One process, the line to it, and the steps that it was asked for and owes."""

    def __init__(self, load: Load):
        context = torch.multiprocessing.get_context()
        self.line, theirs = socket.socketpair(socket.AF_UNIX, _KIND)
        self.place = context.RawArray("q", 2)  # the image at work, -1 for none, and how many there were
        self.place[0] = -1
        self.process = context.Process(target=_serve, args=(load, theirs, self.place), daemon=True)
        with theirs:
            self.process.start()
        self.owed: list[int] = []
        self.looks, self.stopped, self.seen = 0, 0, 0
        self.ended = multiprocessing.util.Finalize(self, _kill, (self.process, self.line), exitpriority=10)

    @property
    def at(self) -> int | None:
        """The index of the image at work."""
        return None if self.place[0] < 0 else int(self.place[0])

    def ask(self, step: int, left_out: Mapping[int, str]) -> None:
        """Asks for a batch."""
        self.owed.append(step)
        with suppress(OSError):  # it is dead then, as the next look will find
            self.line.send(pickle.dumps((step, dict(left_out))))

    def answer(self) -> Any:
        """The batch that has come with its effort, None where the line is dead. Raises what the making of it raised."""
        try:
            said, files, _, _ = socket.recv_fds(self.line, 1, 1)
        except OSError:
            return None
        if not said:
            return None
        self.looks = self.stopped = 0
        made, answer = _unpacked(files[0])
        if not made:
            raise answer
        return answer

    def hangs(self) -> str | None:
        """Why a reader that owes a batch is taken for hung; None while it is not. Asked once in every look."""
        self.stopped = self.stopped + 1 if _is_stopped(self.process.pid) else 0
        self.looks = self.looks + 1 if self.place[1] == self.seen else 0
        self.seen = self.place[1]
        if self.stopped >= STOPPED:
            return "was stopped"
        return f"did not finish one image in {SILENT} seconds" if self.looks >= SILENT else None

    def end_of(self) -> str:
        """How the process ended."""
        self.process.join(LOOK)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"left with status {code}"

    def end(self) -> None:
        """Ends the process, also one that is stopped."""
        self.ended()


def _kill(process: Any, line: socket.socket) -> None:
    process.kill()
    process.join()
    line.close()


def _is_stopped(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except (OSError, IndexError):
        return False


# In the process that reads


def _serve(load: Load, line: socket.socket, place: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the main process, which still saves its work
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    keep_for_next()
    parent = os.getppid()
    while True:
        while not wait([line], LOOK):
            if os.getppid() != parent:
                return
        order = line.recv(2**20)
        if not order:
            return
        step, left_out = pickle.loads(order)

        def watch(index: int, left_out: Mapping[int, str] = left_out) -> str | None:
            place[0], place[1] = index, place[1] + 1
            return left_out.get(index)

        try:
            answer = (True, measured(partial(load, step, watch)))
        except Exception as fault:
            fault.add_note(traceback.format_exc())
            answer = (False, fault)
        place[0] = -1
        file = _packed(answer)
        socket.send_fds(line, [b"."], [file])
        os.close(file)


class _Pickler(pickle.Pickler):
    """Tensors leave as arrays, whose values are not copied into the pickle."""

    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, Tensor) else NotImplemented


def _packed(value: Any) -> int:
    """A value in anonymous memory, as a file descriptor: places, then the pickle, then the arrays that it names."""
    arrays: list[pickle.PickleBuffer] = []
    text = io.BytesIO()
    _Pickler(text, protocol=5, buffer_callback=arrays.append).dump(value)
    parts = [memoryview(text.getbuffer()), *(array.raw() for array in arrays)]
    file = _memory()
    with os.fdopen(os.dup(file), "wb") as out:
        places = [part.nbytes for part in parts]
        out.write(pickle.dumps(places).ljust(-(-len(pickle.dumps(places)) // _ALIGNED) * _ALIGNED, b"\0"))
        for part in parts:
            out.write(part)
            out.write(bytes(-part.nbytes % _ALIGNED))
    return file


def _memory() -> int:
    """A file descriptor of memory without a name; where there is no such thing, of a file without one."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("batch")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _unpacked(file: int) -> Any:
    """The value that `_packed` wrote; its arrays lie in the memory itself."""
    with os.fdopen(file, "rb") as held:
        memory = memoryview(mmap.mmap(held.fileno(), 0))
    sizes = pickle.loads(memory)
    start = -(-len(pickle.dumps(sizes)) // _ALIGNED) * _ALIGNED
    parts = []
    for size in sizes:
        parts.append(memory[start : start + size])
        start += -(-size // _ALIGNED) * _ALIGNED
    return pickle.loads(parts[0], buffers=parts[1:])
