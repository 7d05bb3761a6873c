"""`sightline check`: what is wrong with a dataset."""

import argparse
import json
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sightline.datasets.check import Checked

SUMMARY = "Find what is wrong with a dataset: broken files, classes, duplicates, leaks between parts."
EXAMPLE = "sightline check photos --html check.html"

SHOWN = 3
"""Findings of a kind that the table shows."""


def arguments(parser: Any) -> None:
    """The verb's own arguments."""
    parser.add_argument("data", metavar="DATA", help="what `sightline train` takes, for whatever task")
    parser.add_argument("--html", metavar="FILE", help="write a page with pictures of what was found")
    parser.add_argument("--quick", action="store_true", help="names and headers alone; no duplicates are sought")
    parser.add_argument("--model", metavar="MODEL", help="a trained model, whose features tell suspicious labels")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read images (default: one per core)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the held-out part, where DATA has none of its own")
    parser.add_argument("--device", default="auto", help="where the model computes: auto, cpu, cuda, cuda:N or mps")


def run(request: argparse.Namespace) -> int:
    """Checks, prints what was found, and answers 2 where training would be wrong."""
    from sightline.recipes.check import check

    with _progress(request.quiet) as progress:
        checked = check(
            request.data,
            seed=request.seed,
            workers=request.workers,
            quick=request.quick,
            model=request.model,
            html=request.html,
            device=request.device,
            progress=progress,
        )
    document = checked.to_json()
    if request.html is not None and not request.quiet:
        print(f"wrote {request.html}", file=sys.stderr)
    if request.json:
        print(json.dumps(document))
    else:
        _print(checked, document)
    return 0 if document["fit"] else 2


def _print(checked: "Checked", document: dict[str, Any]) -> None:
    from sightline.datasets.findings import KINDS, SEVERITIES, by_kind
    from sightline.datasets.naming import some
    from sightline.errors import printable

    for name, classes in checked.parts.items():
        sizes = f" of {len(classes):,} classes ({min(classes.values()):,} to {max(classes.values()):,} each)"
        told = sizes if classes and any(classes) else " without classes"
        print(f"{printable(name, 24):12} {sum(classes.values()):9,} images{told}")
    counts, seen = document["counts"], document["statistics"]
    if seen:
        sides = "  ".join("{} {min:g} to {max:g} (median {median:g})".format(s, **seen[s]) for s in ("width", "height"))
        print(f"{'readable':12} {counts['readable']:9,} images: {sides}")
        told = ", ".join(f"{name} {count:,}" for what in ("formats", "modes") for name, count in seen[what].items())
        print(f"{'':12} {told}")
    for kind, found in by_kind(checked.findings).items():
        severity, title, remedy = KINDS[kind]
        print(f"\n{severity:8} {len(found):6,}  {title}")
        for finding in found[:SHOWN]:
            named = f": {some(finding.files, 4)}" if finding.files else ""
            print(f"{'':17}{printable(finding.reason, 300)}{named}")
        if len(found) > SHOWN:
            print(f"{'':17}and {len(found) - SHOWN:,} more (--json names all)")
        print(f"{'':17}→ {remedy}")
    told = ", ".join(f"{counts[s]:,} {s}{'' if counts[s] == 1 else 's'}" for s in SEVERITIES)
    verdict = "nothing that would make training wrong" if document["fit"] else "training on it would be wrong"
    print(f"\n{told}: {verdict} ({document['seconds']:.1f} s)")


@contextmanager
def _progress(quiet: bool) -> Generator[Callable[[str, int, int], None]]:
    """Tells how far the work is: a bar on a terminal, a line for each stage elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    live = not quiet and sys.stderr.isatty()
    stages: dict[str, Any] = {}
    with Progress(disable=not live, console=Console(file=sys.stderr), transient=True) as bars:

        def tell(what: str, done: int, total: int) -> None:
            if what not in stages:
                stages[what] = bars.add_task(what)
                if not live and not quiet:
                    print(f"{what} {total:,} images" if total else what, file=sys.stderr, flush=True)
            bars.update(stages[what], completed=done, total=total or None)

        yield tell
