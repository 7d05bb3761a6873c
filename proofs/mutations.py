"""Tests have teeth: each guard is removed in turn, and a test has to turn red for every one.

    python proofs/mutations.py [--only NAME …] [--list]

The guards stand in `proofs/guards/*.txt`, one block each: `## name`, the file below `src/sightline`, the text that is
taken out (lines that begin with `-`), what stands there instead (`+`), and the tests that should notice. The text has
to stand in the file exactly once, so that the table cannot rot. Everything happens in a copy of the tree in a temporary
folder, whose package is the one imported; what runs unharmed first has to be green. A mutation counts as caught where a
test fails or is refused its fixture, or hangs, but not where the package cannot be imported any more.
"""

import argparse
import importlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GUARDS = Path(__file__).resolve().parent / "guards"
COPIED = ("src", "tests", "docs", "benchmarks", "proofs", "pyproject.toml", "README.md", "CONTRIBUTING.md", "LICENSE")
HEAVY = (
    *("pytest", "hypothesis.extra.numpy", "jaxtyping", "beartype", "numpy.testing", "PIL.Image", "torch", "einops"),
    *("torchvision.transforms.v2", "safetensors.torch", "torch.utils.tensorboard", "sklearn.datasets", "rich.progress"),
)
"""Libraries that are loaded once, before the processes of the tests are forked."""

BROKEN = ("NameError", "SyntaxError", "IndentationError", "ImportError", "ModuleNotFoundError", "UnboundLocalError")
HOOK = 'install_import_hook("sightline", "typecheck.check")'
HUNG = -1
LIMIT = 90
"""Seconds after which a mutated program counts as hanging."""


@dataclass(frozen=True)
class Mutation:
    """A guard and its removal."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self, root: Path) -> str:
        """The file's text without the guard. Raises ValueError where the guard does not stand there exactly once."""
        text = (root / "src/sightline" / self.file).read_text(encoding="utf-8")
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"'{self.name}': its text stands {found} times in {self.file}, not once:\n{self.old}")
        return text.replace(self.old, self.new)


def table(folder: Path = GUARDS) -> list[Mutation]:
    """All mutations in order of files and rows. Raises ValueError for a block that is not one."""
    found = []
    for file in sorted(folder.glob("*.txt")):
        for block in re.split(r"^## ", file.read_text(encoding="utf-8"), flags=re.M)[1:]:
            name, where, *lines = [line for line in block.splitlines() if line]
            old, new = ("\n".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
            tests = tuple(line for line in lines if line.startswith("tests/"))
            if not old or old == new or not tests or len(lines) != sum(line[0] in "-+t" for line in lines):
                raise ValueError(f"{file.name}: '{name}' lacks a part, or has a line that belongs to none")
            found.append(Mutation(name, where, old, new, tests))
    if len({mutation.name for mutation in found}) != len(found):
        raise ValueError("two mutations have one name")
    return found


class Watch:
    """Notes the first test that fails and how, and whether the package is the one in `root`."""

    def __init__(self, root: Path):
        self.root, self.failed, self.ran, self.foreign = root, "", 0, ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.ran += report.when == "call"
        if report.failed and not self.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            words = crash.message.splitlines()[0] if crash and crash.message else ""
            self.failed = f"{report.nodeid}\n{words}"

    def pytest_sessionfinish(self) -> None:
        package = sys.modules.get("sightline")
        place = str(getattr(package, "__file__", "nowhere"))
        self.foreign = "" if place.startswith(str(self.root)) else place


def run(root: Path, tests: Iterable[str], limit: float = LIMIT) -> dict[str, Any]:
    """Runs tests of the tree in `root` in a process of their own, which has the heavy libraries loaded already.

    Gives pytest's `status` (`HUNG` where the process hung or died), the first test that `failed` with its message, and
    how many `ran`.
    """
    answer = root / "answer.json"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.setsid()
        _child(root, list(tests), answer)
    began = time.monotonic()
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() - began > limit:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"status": HUNG, "failed": f"it hung\nkilled after {limit:.0f} s", "ran": 0}
        time.sleep(0.05)
    if not answer.exists():
        return {"status": HUNG, "failed": "the process of the tests ended at once\n", "ran": 0}
    return json.loads(answer.read_text())


def _child(root: Path, tests: list[str], answer: Path) -> None:
    status: int | None = None
    watch = Watch(root)
    try:
        log = os.open(root / "log.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(root)
        sys.path.insert(0, str(root / "src"))
        os.environ["PYTHONPATH"] = str(root / "src")
        import pytest

        quiet = ("-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore:Module already imported")
        status = int(pytest.main([*quiet, *tests], plugins=[watch]))
    except BaseException:
        traceback.print_exc()
    finally:
        found = {"status": status, "failed": watch.failed, "ran": watch.ran, "foreign": watch.foreign}
        answer.write_text(json.dumps(found))
        sys.stdout.flush()
        os._exit(0)


@contextmanager
def copied() -> Generator[Path]:
    """A copy of the tree that may be harmed."""
    folder = Path(tempfile.mkdtemp(prefix="sightline-mutations-"))
    try:
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".hypothesis"))
            elif source.exists():
                shutil.copy2(source, folder / name)
        # Types are not checked at run time here: it takes seconds, and a guard should be missed by what a test says.
        conftest = folder / "tests/conftest.py"
        conftest.write_text(conftest.read_text().replace(HOOK, ""))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tried(root: Path, mutation: Mutation, stamp: int) -> tuple[bool, str]:
    """Whether the removal of a guard was noticed, and by which test.

    `stamp` is a time no other state of the file has had, so that no compiled file of another state is taken.
    """
    file = root / "src/sightline" / mutation.file
    whole, times = file.read_text(encoding="utf-8"), file.stat()
    try:
        file.write_text(mutation.applied(root), encoding="utf-8")
        os.utime(file, (stamp, stamp))
        found = run(root, mutation.tests)
    finally:
        file.write_text(whole, encoding="utf-8")
        os.utime(file, (times.st_atime, times.st_mtime))
    test, _, words = found["failed"].partition("\n")
    if found.get("foreign"):
        raise SystemExit(f"'{mutation.name}' ran another package: {found['foreign']}")
    if found["status"] not in (0, 1, HUNG) or words.startswith(BROKEN):
        return False, f"BROKEN (status {found['status']}): {test} {words}"
    return found["status"] != 0, f"{test}  ({words[:80]})" if found["status"] != 0 else "NO TEST NOTICED"


def main() -> int:
    """Prints the table and gives the exit status: 0 where every removal was noticed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these guards alone (parts of names will do)")
    parser.add_argument("--list", action="store_true", help="print the guards and leave")
    asked = parser.parse_args()
    rows = [m for m in table() if not asked.only or any(part in m.name for part in asked.only)]
    if asked.list:
        print("\n".join(f"{m.name:<48} {m.file:<32} {' '.join(m.tests)}" for m in rows))
        return 0
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for name in HEAVY:
        importlib.import_module(name)
    began = time.monotonic()
    with copied() as root:
        for mutation in rows:
            mutation.applied(root)
        tests = sorted({test for mutation in rows for test in mutation.tests})
        whole = run(root, tests, limit=3600)
        if whole["status"] != 0 or whole["foreign"]:
            sys.stdout.write((root / "log.txt").read_text()[-4000:])
            print(f"unharmed, the tests are not green: {whole}")
            return 1
        print(f"unharmed: {whole['ran']} tests are green ({time.monotonic() - began:.0f} s)", flush=True)
        caught = 0
        for number, mutation in enumerate(rows):
            noticed, how = tried(root, mutation, stamp=1_000_000_000 + 10 * number)
            caught += noticed
            print(
                f"{'caught' if noticed else 'MISSED':<7} {mutation.name:<48} {how.removeprefix('tests/')}", flush=True
            )
    print(f"{caught} of {len(rows)} removals were noticed, in {time.monotonic() - began:.0f} s")
    return 0 if caught == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
