"""What a run writes down as it goes: figures for programs, TensorBoard, and a line for whoever watches."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sightline.checkpoints.atomic import refusal
from sightline.errors import WorkError, printable


class Journal:
    """`metrics.jsonl`, TensorBoard event files and the progress display of one run.

    `metrics.jsonl` holds only what follows from the data and the seed, so that a resumed run writes the same file as
    an undisturbed one; times and speeds go to TensorBoard and the display. `kept` is the number of the last step that a
    resumed run has behind it, and `length` the bytes that `metrics.jsonl` had then: what follows is cut off, and
    written again. Without a directory it writes nothing: of many processes, one keeps the journal.
    """

    def __init__(
        self,
        directory: Path | None,
        *,
        total: int,
        kept: int = 0,
        length: int = 0,
        quiet: bool = False,
        stream: IO[str] | None = None,
    ):
        self.stream = stream or sys.stderr
        self.file, self.events, self.length = None, None, 0
        if directory is not None:
            self.path = directory / "metrics.jsonl"
            self.file = _entered(self.path, length)
            self.length = self.file.tell()
            self.events = _tensorboard(directory, kept)
        self.quiet = quiet or directory is None
        self.live = not self.quiet and self.stream.isatty()
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=not self.live,
            console=Console(file=self.stream),
            transient=True,
        )
        self.reader: Callable[[Mapping[str, Any]], None] | None = None
        self.task = self.progress.add_task("training", total=total, completed=kept, loss="", speed="")
        self.progress.start()

    def record(self, step: int, **figures: Any) -> None:
        """Appends one line of figures to `metrics.jsonl`, the scalars among them to TensorBoard, and tells `reader`.

        Raises WorkError where the disk refuses; what it took of the line is cut off when the run goes on.
        """
        if self.file is not None:
            line = json.dumps({"step": step, **figures}).encode() + b"\n"
            try:
                taken = self.file.write(line)  # unbuffered: a full disk takes a part, and the rest says why
                if taken != len(line):
                    self.file.write(line[taken:])
            except OSError as fault:
                raise WorkError(
                    f"cannot write {printable(self.path)}: {refusal(fault, self.path.parent, len(line))}. Checkpoints "
                    "are intact: mend the disk, or free some space, and go on with --resume."
                ) from fault
            self.length += len(line)
        self.scalars(step, **figures)
        if self.reader is not None:
            self.reader({"step": step, **figures})

    def scalars(self, step: int, **figures: Any) -> None:
        """Figures for TensorBoard alone: whatever depends on the machine."""
        if self.events is not None:
            try:
                for name, value in figures.items():
                    if isinstance(value, (int, float)):
                        self.events.add_scalar(name, value, step)
            except OSError as fault:  # metrics.jsonl holds the same figures
                self.events = None
                self.say(f"nothing more is written for TensorBoard: {fault.strerror}")

    def sync(self) -> None:
        """Returns when the figures so far are safely on disk."""
        if self.file is not None:
            os.fsync(self.file.fileno())

    def advance(self, step: int, total: int, loss: float, images_per_second: float) -> None:
        """Moves the progress bar."""
        self.progress.update(
            self.task, completed=step, total=total, loss=f"loss {loss:.3f}", speed=f"{images_per_second:,.0f} images/s"
        )

    def say(self, line: str) -> None:
        """A plain line for whoever watches; silent with `quiet`."""
        if self.live:
            self.progress.console.print(line, markup=False, highlight=False)
        elif not self.quiet:
            print(line, file=self.stream, flush=True)

    def close(self) -> None:
        """Ends the display and closes the files."""
        self.progress.stop()
        if self.file is not None:
            self.file.close()
        if self.events is not None:
            with suppress(OSError):
                self.events.close()


def _entered(path: Path, length: int) -> FileIO:
    """The file, open at its end after `length` bytes: figures that follow will be written again."""
    try:
        file = FileIO(path, "ab")
        if file.tell() > length:
            file.truncate(length)
            file.seek(length)
    except OSError as fault:
        raise WorkError(f"cannot write {printable(path)}: {refusal(fault, path.parent)}") from fault
    return file


def _tensorboard(directory: Path, kept: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None  # an optional extra: metrics.jsonl holds the same figures
    try:
        return SummaryWriter(str(directory), purge_step=kept + 1 if kept else None)
    except OSError:
        return None  # whatever ails the disk, metrics.jsonl will say


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a `metrics.jsonl` in order; an empty list where there is none."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
