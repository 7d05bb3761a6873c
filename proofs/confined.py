"""Runs something in a process of its own, with bounded memory and few rights, and notes what it should never do."""

import contextlib
import ctypes
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sightline
import sightline.images.decode as reader

PATIENCE = 120
"""Seconds after which a run is ended."""


@dataclass
class Said:
    """What came of one run; `odd` is what a run must never do."""

    status: int | None
    out: str
    err: str
    seconds: float
    megabytes: float
    odd: list[str]
    read: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return self.out + self.err


def memory(key: str) -> float:
    """A line of /proc/self/status, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise AssertionError(key)


def forget_peak() -> float:
    """Resets the peak of the resident memory, and returns what is resident now, in MiB."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def unprivileged() -> None:
    """Takes the superuser's right to read what is closed, for this process."""
    if os.geteuid() == 0:
        header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        libc = ctypes.CDLL(None, use_errno=True)
        libc.capget(header, sets)
        for i in range(3):
            sets[i] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        assert libc.capset(header, sets) == 0


def watch(home: Path, kit: Path, odd: list[str]) -> None:
    """Notes sockets, programs and changes outside of `home`."""
    own = f"{tempfile.gettempdir()}/torchinductor_"  # torch makes it as soon as its compiler is imported
    allowed = (str(home), own, "/dev/null", "/dev/shm", "/proc/self", "/dev/tty")
    changing = {"os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link", "os.rmdir", "shutil.rmtree", "os.chmod"}

    def look(event: str, args: tuple) -> None:
        if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname"):
            if event[7:] not in ("connect", "bind") or args[0].family.name != "AF_UNIX":
                odd.append(f"{event} {args[1:]}")
        elif event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"):
            odd.append(f"{event} {args[:2]}")
        elif event == "open" and isinstance(args[0], str | bytes | os.PathLike) and isinstance(args[2], int):
            if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) and not inside(args[0]):
                odd.append(f"writes {os.fsdecode(args[0])}")
        elif event in changing and not inside(args[0]):
            odd.append(f"{event} {args[0]!r}")
        elif event == "exec" and str(kit) in getattr(args[0], "co_filename", ""):
            odd.append(f"runs {args[0].co_filename}")

    def inside(path: Any) -> bool:
        return isinstance(path, int) or os.path.abspath(os.fsdecode(path)).startswith(allowed)  # noqa: PTH100

    sys.addaudithook(look)


def measured(log: int) -> None:
    """Has the reader note what every file costs, also in the processes that it is forked into."""
    decode = reader._decode

    def noted(source: Any, *rest: Any) -> Any:
        name = str(getattr(source, "where", source)) if isinstance(source, str | os.PathLike | reader.Stored) else ""
        before, began = forget_peak(), time.perf_counter()
        try:
            return decode(source, *rest)
        finally:
            cost = (name, time.perf_counter() - began, memory("VmHWM") - before)
            os.write(log, (json.dumps(cost) + "\n").encode())

    reader._decode = noted


def run(home: Path, kit: Path, work: Callable[[], object], *, measure: bool = False) -> Said:
    """What `work` does in a fork of this process, in the folder `home`; a command leaves with its status."""
    home.mkdir(parents=True, exist_ok=True)
    aside = home.parent / f"{home.name}.said"
    aside.mkdir(exist_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if not child:
        status: object = 70
        try:
            status = _child(home, kit, aside, work, measure)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status if isinstance(status, int) else 70)
    began = time.monotonic()
    ended = 0
    while not ended and time.monotonic() - began < PATIENCE:
        ended, code = os.waitpid(child, os.WNOHANG)
        time.sleep(0.002)
    if not ended:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    facts = json.loads(text) if (text := _read(aside / "facts")) else {"seconds": PATIENCE, "megabytes": 0, "odd": []}
    status = os.waitstatus_to_exitcode(code) if ended else None
    read: dict[str, tuple[float, float]] = {}
    for line in _read(aside / "read").splitlines():
        name, seconds, megabytes = json.loads(line)
        worst = read.get(name, (0.0, 0.0))
        read[name] = max(worst[0], seconds), max(worst[1], megabytes)
    odd = facts["odd"] + ([] if ended else [f"no end within {PATIENCE} s"])
    said = Said(status, _read(aside / "out"), _read(aside / "err"), facts["seconds"], facts["megabytes"], odd, read)
    shutil.rmtree(aside)
    return said


def _read(path: Path) -> str:
    return path.read_text(errors="backslashreplace") if path.exists() else ""


def _child(home: Path, kit: Path, aside: Path, work: Callable[[], object], measure: bool) -> int:
    os.setpgid(0, 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(aside / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb"), write_through=True, errors="backslashreplace")
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb"), write_through=True, errors="backslashreplace")
    os.chdir(home)
    unprivileged()
    space = max(2**32, int(memory("VmSize") * 2**20) + 2**29)
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    if measure:
        measured(os.open(aside / "read", os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    odd: list[str] = []
    watch(home, kit, odd)
    before, began, status = forget_peak(), time.perf_counter(), 0
    try:
        work()
    except SystemExit as left:
        status = int(left.code or 0)
    except sightline.errors.UserError as fault:
        print(f"refused: {fault}", file=sys.stderr)
        status = 2
    except BaseException:
        traceback.print_exc()
        status = 70
    facts = {"seconds": time.perf_counter() - began, "megabytes": memory("VmHWM") - before, "odd": list(odd)}
    facts["odd"] += [
        f"imported {module.__file__}"
        for module in list(sys.modules.values())
        if str(getattr(module, "__file__", "") or "").startswith(str(kit))
    ]
    (aside / "facts").write_text(json.dumps(facts))
    return status
