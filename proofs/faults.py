"""Signals, full disks, lost workers and too little memory: what each did to a run, and how long it took.

    python proofs/faults.py [--quick]

Every row is a training by the command, in a process forked from this one, into which the fault is planted at a known
place; afterwards it goes on with `--resume` where it stopped, and has to end with the bits of an undisturbed run. The
disks are tmpfs of 8 MB, and need the right to mount. The status is 1 where a row is not as promised.
"""

import argparse
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from hashlib import pbkdf2_hmac
from pathlib import Path

import torch
from kills import draw, ended  # the program beside this one

from sightline.cli.main import main as command
from sightline.datasets.loader import OrderedLoader
from sightline.recipes import classify
from sightline.reports.classes import ClassesReport as Report
from sightline.training.journal import read
from sightline.training.state import Store
from sightline.training.update import Updater

HARD = ("--embed-dim", 32, "--depth", 3, "--num-heads", 2, "--drop-path-rate", 0.2, "--ema", 0.9, "--mixup", 0.3)
HARD += ("--batch-size", 64, "--lr", 0.003, "--threads", 1)
DIGITS = ("builtin:digits", "--workers", 0, "--epochs", 2, *HARD)
SLOW = 0.5
"""Seconds that a step, a save or a batch of an evaluation is made to take."""

ALLOWED = 2.0
"""Seconds beside those of a step and a save that a run may take to leave."""


def run(words: tuple, out: Path, log: Path, plant: Callable[[], None] = lambda: None, resume: bool = False) -> int:
    """The number of a forked process that plants a fault and trains."""
    process = os.fork()
    if process:
        return process
    os.setsid()
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    status = 70
    try:
        plant()
        command([str(word) for word in ("train", *words, "--out", out, *(["--resume"] if resume else []))])
    except SystemExit as left:
        status = int(left.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def before(
    owner: type | object, name: str, here: Path, seconds: float = SLOW, after: int = 4, begun: Path | None = None
) -> Callable[[], None]:
    """Plants a pause before the call number `after` of a function and all later ones; `here` appears then.

    Where `begun` is given, calls count from when it exists: the measurement before a run takes steps too.
    """

    def plant() -> None:
        plain, count = getattr(owner, name), 0

        def paused(*words, **names):
            nonlocal count
            count += begun is None or begun.exists()
            if count > after:
                here.touch()
                latest = time.monotonic() + seconds
                while (left := latest - time.monotonic()) > 0:
                    time.sleep(left)
            return plain(*words, **names)

        setattr(owner, name, paused)

    return plant


def same(one: Path, two: Path) -> bool:
    """Whether two finished runs have the same weights and figures."""
    names = ("model.safetensors", "metrics.jsonl")
    return all((two / name).exists() and (one / name).read_bytes() == (two / name).read_bytes() for name in names)


def appears(here: Path, process: int) -> None:
    """Waits for the planted place."""
    latest = time.monotonic() + 300
    while not here.exists():
        assert time.monotonic() < latest, "the planted place was not reached"
        assert ended(process, 0) is None, "the run ended before the planted place"
        time.sleep(0.005)


class Table:
    """Rows as they come, and whether each was as promised."""

    def __init__(self) -> None:
        self.bad = 0
        print(f"{'fault':<50} {'seconds':>8} {'status':>7}  {'then':<34} as promised")

    def row(self, fault: str, seconds: float | None, status: object, then: str, good: bool) -> None:
        """Prints one."""
        self.bad += not good
        shown = "" if seconds is None else f"{seconds:.2f}"
        print(f"{fault:<50} {shown:>8} {status!s:>7}  {then:<34} {'yes' if good else 'NO'}", flush=True)


def resumed(root: Path, words: tuple, out: Path, whole: Path) -> str:
    """How the run ends when it goes on."""
    with suppress(ValueError):
        if ended(run(words, out, root / "log", resume=True), 600) != 0:
            return (root / "log").read_text().strip().splitlines()[-1][:200]
    return "same bits" if same(whole, out) else "OTHER BITS"


def signals(root: Path, table: Table, whole: Path) -> None:
    """SIGTERM and SIGINT at each place of a run, and a second one."""
    places = {
        "SIGTERM while the data is looked at": (classify, "open_dataset", 0),
        "SIGTERM in a step": (Updater, "__call__", 4),
        "SIGTERM in a save": (Store, "write", 2),
        "SIGTERM in an evaluation": (OrderedLoader, "__iter__", 0),
        "SIGTERM while the report is written": (Report, "write", 0),
        "SIGINT in a step": (Updater, "__call__", 4),
    }
    for number, (fault, (owner, name, after)) in enumerate(places.items()):
        out, here = root / f"signal {number}", root / f"here {number}"
        words = (*DIGITS, "--save-seconds", 0.05) if name == "write" else DIGITS
        begun = out / "run.json" if owner is Updater else None
        process = run(words, out, root / "log", before(owner, name, here, after=after, begun=begun))
        appears(here, process)
        sent, kind = time.monotonic(), getattr(signal, fault.split()[0])
        os.kill(process, kind)
        status = ended(process, 60)
        took = time.monotonic() - sent
        if name == "open_dataset":  # nothing was begun, and the same command begins anew
            assert ended(run(words, out, root / "log"), 600) == 0
            then = "begun anew: same bits" if same(whole, out) else "OTHER BITS"
        else:
            then = resumed(root, words, out, whole)
        table.row(fault, took, status, then, took < 2 * SLOW + ALLOWED and status == 128 + kind and "same" in then)

    def endless(*words: object) -> object:
        if not (out / "run.json").exists():
            return step(*words)
        here.touch()
        return pbkdf2_hmac(
            "sha256", b"", b"", 2**31 - 1
        )  # many minutes in one operation, where no handler of Python's runs

    def plant() -> None:
        Updater._gradient = endless  # ty: ignore[invalid-assignment]

    step, out, here = Updater._gradient, root / "twice", root / "here twice"
    process = run(DIGITS, out, root / "log", plant)
    appears(here, process)
    os.kill(process, signal.SIGTERM)
    time.sleep(0.5)
    sent = time.monotonic()
    os.kill(process, signal.SIGTERM)
    status, took = ended(process, 60), time.monotonic() - sent
    then = resumed(root, DIGITS, out, whole)
    table.row("a second SIGTERM, in an endless step", took, status, then, took < 1 and status == 143 and "same" in then)


@contextmanager
def small_disk(place: Path):
    """A tmpfs of 8 MB."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def disks(root: Path, table: Table, whole: Path) -> None:
    """A disk that is full at the start or fills up in between, and checkpoints that become read-only."""
    words = (*DIGITS, "--save-seconds", 0.05)
    with small_disk(root / "disk") as disk:
        ballast, out = disk / "ballast", disk / "run"

        def fill(left: int) -> None:
            with suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            os.truncate(ballast, max(ballast.stat().st_size - left, 0))

        fill(500_000)
        status = ended(run(words, out, root / "log"), 60)
        said = (root / "log").read_text().strip().splitlines()[-1]
        good = status == 2 and "bytes" in said and str(out) in said
        table.row("disk too small at the start", None, status, "refused, with both numbers", good)
        ballast.unlink()
        for number, fault in enumerate(("disk full between saves", "read-only between saves")):
            out, here = disk / f"run {number}", root / f"here disk {number}"
            store = str(out / "checkpoints")
            process = run(words, out, root / "log", before(Store, "write", here, 0.2, after=2))
            appears(here, process)
            began = time.monotonic()
            if number:
                subprocess.run(["mount", "--bind", store, store], check=True)
                subprocess.run(["mount", "-o", "remount,bind,ro", store], check=True)
            else:
                fill(0)
            status = ended(process, 60)
            took, said = time.monotonic() - began, (root / "log").read_text().strip().splitlines()[-1]
            if number:
                subprocess.run(["umount", store], check=True)
            else:
                ballast.unlink()
            intact = Store(out / "checkpoints").newest()
            named = str(out) in said and ("free" in said or number)
            then = resumed(root, words, out, whole)
            good = status == 1 and intact is not None and not intact[2] and bool(named) and then == "same bits"
            table.row(fault, took, status, f"checkpoints intact; {then}", good)
            print(f"    {said}", flush=True)


def workers(root: Path, table: Table, data: Path) -> None:
    """Processes that read images, killed and stopped."""
    words = (data, "--workers", 2, "--epochs", 6, "--refused-limit", 0.1, *HARD)
    whole = root / "whole files"
    assert ended(run(words, whole, root / "log"), 600) == 0
    for number in (signal.SIGKILL, signal.SIGSTOP):
        out, here, log = root / f"worker {number}", root / f"here {number:d} worker", root / "log"
        process = run(words, out, log, before(Updater, "__call__", here, 0.02))
        appears(here, process)
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        for child in children:
            os.kill(int(child), number)
        sent, noticed = time.monotonic(), None
        while (status := ended(process, 0.02)) is None:
            if noticed is None and b"a process that reads images" in log.read_bytes():
                noticed = time.monotonic() - sent
        gone = not any(Path(f"/proc/{child}").exists() for child in children)
        then = f"{len(children)} replaced; {'same bits' if same(whole, out) else 'OTHER BITS'}"
        good = status == 0 and noticed is not None and noticed < 30 and gone and same(whole, out)
        table.row(f"{number.name} to every reading process", noticed, status, then, good)


def memory(root: Path, table: Table) -> None:
    """A limit on the memory of a process that the batch does not fit into."""
    network = ("--embed-dim", 192, "--depth", 4, "--num-heads", 3)
    words = ("builtin:digits", "--workers", 0, "--epochs", 2, "--batch-size", 768, *network, "--optimizer", "sgd")
    words += ("--lr", 0.01, "--threads", 1)
    whole, out = root / "whole memory", root / "memory"
    assert ended(run(words, whole, root / "log"), 600) == 0

    def plant() -> None:
        plain = Updater.__call__

        def limited(self, batch, step, lr):
            unlimited = resource.RLIM_INFINITY
            limit = unlimited  # what follows the first step needs memory of its own, to start threads and to draw
            if step == 0 and (out / "run.json").exists():  # not in the measurement before it
                limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 400 * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, unlimited))
            return plain(self, batch, step, lr)

        Updater.__call__ = limited  # ty: ignore[invalid-assignment]

    status = ended(run(words, out, root / "log", plant), 600)
    said = [line for line in (root / "log").read_text().splitlines() if "memory does not suffice" in line]
    ours, theirs = ([r["loss"] for r in read(place / "metrics.jsonl") if "loss" in r] for place in (out, whole))
    apart = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)) if len(ours) == len(theirs) else 1.0
    then = f"{len(said)} halvings; losses apart by {apart:.0e}"
    table.row(
        "400 MB more than before, in the first step (RLIMIT_AS)",
        None,
        status,
        then,
        status == 0 and bool(said) and apart < 1e-6,
    )


def main() -> int:
    """Plants, waits, compares, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="signals alone")
    request = parser.parse_args()
    torch.set_num_threads(1)
    table = Table()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw(root / "data")
        whole = root / "whole"
        assert ended(run(DIGITS, whole, root / "log"), 600) == 0, (root / "log").read_text()
        signals(root, table, whole)
        if not request.quick:
            disks(root, table, whole)
            workers(root, table, root / "data")
            memory(root, table)
    return int(bool(table.bad))


if __name__ == "__main__":
    sys.exit(main())
