"""What a run writes down as it goes: figures for programs, TensorBoard, and a line for whoever watches."""

import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Journal:
    """`metrics.jsonl`, TensorBoard event files and the progress display of one run.

    `metrics.jsonl` holds only what follows from the data and the seed, so that a resumed run writes the same file as
    an undisturbed one; times and speeds go to TensorBoard and the display. `kept` is the number of the last step whose
    figures stay when a run is resumed.
    """

    def __init__(
        self, directory: Path, *, total: int, kept: int = 0, quiet: bool = False, stream: TextIO | None = None
    ):
        self.path = directory / "metrics.jsonl"
        self.stream = stream or sys.stderr
        self.started = time.monotonic()
        _keep_until(self.path, kept)
        self.file = self.path.open("a", encoding="utf-8")
        self.events = _tensorboard(directory, kept)
        self.live = not quiet and self.stream.isatty()
        self.quiet = quiet
        columns = ("[bold]{task.description}", "{task.fields[loss]}", "{task.fields[speed]}")
        self.progress = Progress(
            TextColumn(columns[0]),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(columns[1]),
            TextColumn(columns[2]),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=not self.live,
            console=_console(self.stream),
            transient=True,
        )
        self.task = self.progress.add_task("training", total=total, completed=kept, loss="", speed="")
        self.progress.start()

    def record(self, step: int, **figures: Any) -> None:
        """Appends one line of figures to `metrics.jsonl`, and the scalars among them to TensorBoard."""
        self.file.write(json.dumps({"step": step, **figures}) + "\n")
        self.file.flush()
        self.scalars(step, **figures)

    def scalars(self, step: int, **figures: Any) -> None:
        """Figures for TensorBoard alone: whatever depends on the machine."""
        if self.events is not None:
            for name, value in figures.items():
                if isinstance(value, (int, float)):
                    self.events.add_scalar(name, value, step)

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
        self.file.close()
        if self.events is not None:
            self.events.close()


def _keep_until(path: Path, step: int) -> None:
    """Cuts figures of steps after `step`, which a resumed run will write again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if len(kept) != len(lines):
        fresh = path.with_suffix(".jsonl.tmp")
        fresh.write_text("".join(kept), encoding="utf-8")
        fresh.replace(path)


def _tensorboard(directory: Path, kept: int) -> Any:
    try:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # noqa: F401
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None  # an optional extra: metrics.jsonl holds the same figures
    return SummaryWriter(str(directory), purge_step=kept + 1 if kept else None)


def _console(stream: TextIO) -> Any:
    from rich.console import Console

    return Console(file=stream)


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a `metrics.jsonl` in order; an empty list where there is none."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
