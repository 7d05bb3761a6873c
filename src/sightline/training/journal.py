"""What a run writes down as it goes: figures for programs, TensorBoard, and a line for whoever watches."""

import json
import sys
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Journal:
    """`metrics.jsonl`, TensorBoard event files and the progress display of one run.

    `metrics.jsonl` holds only what follows from the data and the seed, so that a resumed run writes the same file as
    an undisturbed one; times and speeds go to TensorBoard and the display. `kept` is the number of the last step whose
    figures stay when a run is resumed. Without a directory it writes nothing: of many processes, one keeps the journal.
    """

    def __init__(
        self, directory: Path | None, *, total: int, kept: int = 0, quiet: bool = False, stream: IO[str] | None = None
    ):
        self.stream = stream or sys.stderr
        self.file, self.events = None, None
        if directory is not None:
            path = directory / "metrics.jsonl"
            _keep_until(path, kept)
            self.file = path.open("a", encoding="utf-8")
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
        self.task = self.progress.add_task("training", total=total, completed=kept, loss="", speed="")
        self.progress.start()

    def record(self, step: int, **figures: Any) -> None:
        """Appends one line of figures to `metrics.jsonl`, and the scalars among them to TensorBoard."""
        if self.file is not None:
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
        if self.file is not None:
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
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None  # an optional extra: metrics.jsonl holds the same figures
    return SummaryWriter(str(directory), purge_step=kept + 1 if kept else None)


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a `metrics.jsonl` in order; an empty list where there is none."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
