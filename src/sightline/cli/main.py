"""The command `sightline`: finds the verbs, reads the request, and turns faults into plain messages.

Each verb is a file of this folder with `SUMMARY`, `EXAMPLE`, `arguments(parser)` and `run(request)`. Nothing heavy is
imported before a verb runs.
"""

import argparse
import importlib
import os
import pkgutil
import re
import signal
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from types import ModuleType
from typing import Any, NoReturn

import sightline
import sightline.cli
from sightline.errors import UserError, WorkError, printable, suggest


class Parser(argparse.ArgumentParser):
    """A parser whose complaints name the nearest thing that exists, and which never abbreviates."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, formatter_class=_Help, **settings)

    def error(self, message: str) -> NoReturn:
        if choice := re.search(r"argument VERB: invalid choice: '(.*?)'", message):
            message = f"unknown verb '{choice[1]}'.{suggest(choice[1], verbs())}"
        self.exit(2, f"sightline: {message}\n`{self.prog} --help` shows what it takes.\n")

    def refuse(self, word: str) -> NoReturn:
        """Ends with a complaint about a word that nothing takes."""
        kind = "unknown option" if word.startswith("-") else "one argument too many:"
        self.error(f"{kind} {printable(word)}.{suggest(word.split('=')[0], self._option_string_actions)}")


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default in (None, False, argparse.SUPPRESS) or action.nargs == 0
        return action.help if plain or "%(default)" in (action.help or "") else f"{action.help} (default: %(default)s)"


def verbs() -> dict[str, str]:
    """The verbs by name, with their module: every file of this folder that has a `SUMMARY`."""
    names = [module.name for module in pkgutil.iter_modules(sightline.cli.__path__)]
    return {name.removesuffix("_"): name for name in names if name not in ("main", "options")}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs one command and leaves with its status: 0 done, 1 tried and failed, 2 the request or input is at fault."""
    words = [_hyphens(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without some letter is no reason to stop
    request = _parse(words)
    try:
        with _terminable():
            status = request.verb.run(request) or 0
            sys.stdout.flush()
    except (UserError, WorkError) as fault:
        if request.debug:
            raise
        _complain(str(fault))
        status = fault.status
    except KeyboardInterrupt as stop:
        number = signal.Signals(stop.args[0] if stop.args else signal.SIGINT)
        _complain(f"stopped by {number.name}; what was finished is kept, and the same command begins anew")
        status = 128 + number
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except MemoryError:
        if request.debug:
            raise
        _complain(
            "memory does not suffice; free some, or ask for less at a time (--batch-size, --image-size, --workers 0)"
        )
        status = 1
    except Exception as fault:
        if request.debug:
            raise
        cause = f"{fault.filename}: {fault.strerror}" if isinstance(fault, OSError) and fault.filename else str(fault)
        _complain(f"{type(fault).__name__}: {printable(cause, 500)}. This was not foreseen; --debug shows where it is")
        status = 1
    raise SystemExit(status)


@contextmanager
def _terminable() -> Generator[None]:
    """SIGTERM ends a command as Ctrl-C does: files are closed whole, and the last line says what it was."""

    def stop(number: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parse(words: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="sightline",
        description="Vision Transformers, from a folder of images to a model its owner can trust.",
        epilog="example: sightline train photos --minutes 10\n\n`sightline VERB --help` explains a verb.",
    )
    parser.add_argument("--version", action="version", version=f"sightline {sightline.__version__}")
    subparsers = parser.add_subparsers(metavar="VERB", required=True, title="verbs")
    for verb, name in verbs().items():
        module = importlib.import_module(f"sightline.cli.{name}")
        _add(subparsers, verb, module)
    if "" in words:
        parser.error("one of the arguments is empty; was a variable not set?")
    request, rest = parser.parse_known_args(_with_values(words, subparsers.choices))
    take = getattr(request.verb, "further", None)
    for word in rest:
        if take is None or not take(request, word):
            request.parser.refuse(word if word in words else word.partition("=")[0])
    return request


def _with_values(words: list[str], parsers: dict[str, Any]) -> list[str]:
    """The words, with `=` between an option that the verb's parser does not know and the value that follows it.

    It would be taken for an argument otherwise.
    """
    verb = parsers.get(words[0]) if words else None
    if verb is None or not hasattr(verb.get_default("verb"), "further"):
        return words
    joined = words[:1]
    for word in words[1:]:
        last = joined[-1]
        open_ = last.startswith("--") and "=" not in last and last not in verb._option_string_actions
        if open_ and not word.startswith("--"):
            joined[-1] = f"{last}={word}"
        else:
            joined.append(word)
    return joined


def _add(subparsers: Any, verb: str, module: ModuleType) -> None:
    parser = subparsers.add_parser(
        verb, help=module.SUMMARY, description=module.SUMMARY, epilog=f"example: {module.EXAMPLE}"
    )
    module.arguments(parser)
    group = parser.add_argument_group("every verb")
    group.add_argument("--json", action="store_true", help="print exactly one JSON document on stdout")
    group.add_argument("--quiet", action="store_true", help="no progress on stderr")
    group.add_argument("--debug", action="store_true", help="show the traceback of a fault")
    parser.set_defaults(verb=module, parser=parser)


def _hyphens(word: str) -> str:
    """`--batch_size` for those whose fingers know other tools."""
    return re.sub(r"^--[a-z0-9_]+", lambda name: name[0].replace("_", "-"), word)


def _complain(message: str) -> None:
    print(f"sightline: {message}", file=sys.stderr)
