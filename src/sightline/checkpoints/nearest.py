"""What a file of no known layout lacks of the one that it comes closest to."""

import re
from collections.abc import Iterator

from sightline.checkpoints.library import Library, renamed
from sightline.checkpoints.rules import Found
from sightline.checkpoints.scheme import Stored
from sightline.layout import Layout, TransformersLayout
from sightline.network import Architecture, describe
from sightline.registry import table, variant, variants

_CLOSE, _SHOWN = 0.8, 4


def lacking(stored: Stored, architecture: str | None) -> str | None:
    """The tensors that are missing, as a phrase; None where no layout's names are much like those in the file.

    Names are compared without their numbers, because it is not known how deep the network is; a numbered tensor is
    missed where others of its layer are there.
    """
    best: tuple[float, list[str], str] = (_CLOSE, [], "")
    for library, layout, network in _candidates(architecture):
        found = renamed(library.clean(stored), layout)
        rules = layout.rules(network.backbone, network.head)
        names = [_based(name, layout, found) for rule in rules for name in rule.theirs]
        there = [name for name in found.tensors if not re.fullmatch(layout.dropped, name)]
        kinds, mine, layers = set(map(_kind, names)), set(map(_kind, there)), set(map(_layer, there))
        missed = [n for n in names if n not in found.tensors and (_kind(n) not in mine or _layer(n) in layers - {""})]
        score = len(kinds & mine) / len(kinds | mine)
        if missed and score > best[0]:
            best = score, [found.named(name) for name in missed[:_SHOWN]], library.name
    _, missed, name = best
    return f"as weights of {name} it lacks {', '.join(missed)}" if missed else None


def _candidates(architecture: str | None) -> Iterator[tuple[Library, Layout, Architecture]]:
    """Every layout with a network of its family: the one that is named, or else the first of every paper."""
    rows = variants() if architecture is None else {architecture: variant(architecture)}
    papers = {(row.family, row.task, row.paper): name for name, row in reversed(rows.items())}
    networks = [
        describe(name, classes)
        for (_, task, _), name in papers.items()
        for classes in ((None, 0) if task == "classify" else (None,))
    ]
    for library in table("checkpoints", "SCHEMES").values():
        for layout in library.layouts() if isinstance(library, Library) else ():
            for network in networks:
                if (network.family, network.task) != (layout.family, layout.task):
                    continue
                if architecture is not None or not layout.refusals(network.backbone, network.head):
                    yield library, layout, network


def _kind(name: str) -> str:
    """A name without its numbers."""
    return re.sub(r"\d+", "#", name)


def _layer(name: str) -> str:
    """A name up to the last number that stands alone; empty where none does."""
    match = re.match(r"(.*[./_]\d+)[./]", name)
    return match[1] if match else ""


def _based(name: str, layout: Layout, found: Found) -> str:
    """A name of transformers as it stands in a file with a head."""
    if not isinstance(layout, TransformersLayout) or name.startswith(layout.outside):
        return name
    base = f"{layout.base}."
    return base + name if any(other.startswith(base) for other in found.tensors) else name
