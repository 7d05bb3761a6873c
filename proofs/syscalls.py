"""A process ended, or refused by the disk, at every system call of one save: there is always a good checkpoint.

    python proofs/syscalls.py [--quick]

Needs strace. A first pass lists the calls of one save that create, write, sync, rename and remove files. Then the save
is made once for every such call with SIGKILL as the process enters it, and once with the call failing: ENOSPC where
room is needed, EIO for syncs, EROFS for the others. After each, the folder is opened as a resumed run opens it. The
status is 1 where the newest good checkpoint is neither the new one nor the one before, where something is left that
keeps the next save from working, or where a failure was not reported as one.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from sightline.errors import WorkError
from sightline.training.schedule import Plan
from sightline.training.state import KEPT, State, Store

CALLS = ("openat", "write", "pwrite64", "ftruncate", "fallocate", "chmod", "fsync", "rename", "unlink")
CALLS += ("renameat", "renameat2", "linkat", "unlinkat", "mkdir", "rmdir")
REFUSALS = {"openat": "ENOSPC", "write": "ENOSPC", "pwrite64": "ENOSPC", "ftruncate": "ENOSPC", "fsync": "EIO"}
REPORTED = 3


def save(folder: Path, step: int) -> None:
    """One save of a few tensors of unlike sizes."""
    tensors = {f"layer {i}": torch.full((2 ** (4 * i),), float(step)) for i in range(5)}
    Store(folder).save(State(Plan(100), step=step, metrics={"top1": 0.5}), tensors)


def traced(folder: Path, *options: str) -> int:
    """The exit status of the save in a forked process, made while strace is attached to it."""
    heard, told = os.pipe()
    process = os.fork()
    if not process:
        os.close(told)
        os.read(heard, 1)
        try:
            save(folder, KEPT + 1)
            os._exit(0)
        except WorkError:
            os._exit(REPORTED)
        finally:
            os._exit(70)
    strace = subprocess.Popen(["strace", "-f", "-qq", *options, "-p", str(process)], stderr=subprocess.DEVNULL)
    while b"TracerPid:\t0\n" in Path(f"/proc/{process}/status").read_bytes():
        assert strace.poll() is None, "strace cannot be attached"
        time.sleep(0.005)
    os.write(told, b".")
    _, status = os.waitpid(process, 0)
    strace.wait()
    os.close(heard)
    os.close(told)
    return os.waitstatus_to_exitcode(status)


def calls_of_a_save(root: Path) -> list[tuple[str, int]]:
    """Each call of a save that changes something, as its name and its number among those of this name."""
    folder, log = begun(root, "listing"), root / "log"
    assert traced(folder, "-o", str(log), "-e", f"trace={','.join(CALLS)}") == 0
    counts, found = Counter(), []
    for line in log.read_text().splitlines():
        call = re.sub(r"^\d+\s+", "", line)
        if re.match(r"\w+\(", call):
            name = call.split("(")[0]
            counts[name] += 1
            if name != "openat" or re.search(r"O_WRONLY|O_RDWR|O_CREAT", call):
                found.append((name, counts[name]))
    return found


def begun(root: Path, name: str) -> Path:
    """A folder with as many checkpoints as are kept."""
    folder = root / name
    shutil.rmtree(folder, ignore_errors=True)
    for step in range(1, KEPT + 1):
        save(folder, step)
    return folder


def judge(folder: Path) -> tuple[int, str]:
    """The step of the newest good checkpoint, and what is wrong."""
    store = Store(folder)
    try:
        found = store.newest()
        if found is None:
            return 0, "no checkpoint is left"
        state, tensors, passed = found
        if passed:
            return state.step, f"passed over: {passed}"
        if not all(bool((values == state.step).all()) for values in tensors.values()):
            return state.step, "other values than were saved"
        store.tidy(state.step)
        if any(folder.glob(".partial-*")):
            return state.step, "unfinished files stay"
        save(folder, state.step + 1)
        return state.step, ""
    except Exception as fault:
        return 0, repr(fault)


def main() -> int:
    """Ends and refuses, judges, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every third call")
    request = parser.parse_args()
    torch.set_num_threads(1)
    save(Path(tempfile.mkdtemp()), 0)  # whatever is imported at the first use
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as root:
        calls = calls_of_a_save(Path(root))[:: 3 if request.quick else 1]
        rows: dict[str, Counter] = {}
        for name, number in calls:
            refusal = REFUSALS.get(name, "EROFS")
            for what in ("signal=KILL", f"error={refusal}"):
                folder = begun(Path(root), "run")
                status = traced(folder, "-e", f"trace={name}", "-e", f"inject={name}:{what}:when={number}")
                step, fault = judge(folder)
                row = rows.setdefault(f"{name:<10} {what}", Counter())
                row["times"] += 1
                row["new" if step == KEPT + 1 else "before"] += 1
                if what == "signal=KILL":
                    expected = status == -signal.SIGKILL
                else:  # where an old checkpoint cannot be removed, that is all that fails
                    expected = status == REPORTED or (status == 0 and step == KEPT + 1)
                    row["reported"] += status == REPORTED
                if fault or step not in (KEPT, KEPT + 1) or not expected:
                    wrong.append(f"{name} {number} {what}: status {status}, step {step}, {fault}")
            print(f"{name} {number}", file=sys.stderr, flush=True)
    print(f"{'call, and what befell it':<28} {'times':>6} {'newest is new':>14} {'the one before':>15} {'reported':>9}")
    for name, row in rows.items():
        print(f"{name:<28} {row['times']:>6} {row['new']:>14} {row['before']:>15} {row['reported']:>9}")
    print(f"{len(calls)} calls of a save, {2 * len(calls)} faults, {len(wrong)} without a good checkpoint or a report")
    print("\n".join(wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
