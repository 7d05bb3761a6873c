"""A whole run of `sightline bench`: what there is to measure, the figures, and the page that shows them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any, NamedTuple

from sightline.benching.cases import CASES, USUAL
from sightline.benching.ceilings import Machine, machine
from sightline.benching.contenders import PRECISIONS, PROGRAMS
from sightline.benching.peers import PEERS
from sightline.benching.rounds import as_json
from sightline.benching.tables import Plan, Table
from sightline.errors import UserError, printable, suggest
from sightline.explanation.page import document
from sightline.reports.charts import line_chart
from sightline.reports.sections import curves


class Benched(NamedTuple):
    """What a run found: the machine, the peers with their versions (None where not installed), and the tables."""

    model: str
    machine: Machine
    peers: Mapping[str, str | None]
    tables: Sequence[Table]

    def to_json(self) -> dict[str, Any]:
        """The document of `bench --json`."""
        return {
            "model": self.model,
            "machine": as_json(self.machine),
            "peers": dict(self.peers),
            "tables": [{name: as_json(value) for name, value in vars(table).items()} for table in self.tables],
        }

    def html(self) -> str:
        """The page: tables, and curves of what larger images cost; nothing is loaded from elsewhere."""
        parts = [f"<p>{escape(line)}</p>" for line in described(self.machine)]
        for table in self.tables:
            cells = [[escape(cell) for cell in row] for row in _cells(table)]
            head = "".join(f"<th>{cell}</th>" for cell in cells[0])
            rows = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells[1:])
            parts.append(f"<h2>{escape(table.title)}</h2>")
            parts.append(f'<div class="wide"><table class="figures"><tr>{head}</tr>{rows}</table></div>')
            parts += [f"<p>{escape(note)}</p>" for note in (*table.notes, *_grown(table))]
            seconds = [(point.side, point.seconds) for point in table.points]
            memory = [(point.side, point.megabytes) for point in table.points if point.megabytes is not None]
            drawn = [(seconds, "Seconds"), (memory, "Megabytes above the model's own")]
            charts = [(line_chart(ends, "pixels along the side", words, zero=True), words) for ends, words in drawn]
            parts += [curves(charts)] if table.points else []
        return document(f"sightline bench: {self.model}", "\n".join(parts))


def bench(
    plan: Plan, cases: Sequence[str] = USUAL, *, tell: Callable[[Sequence[str]], None] = lambda lines: None
) -> Benched:
    """Measures the machine and the cases; `tell` is given the lines for people as they come.

    What is not installed is left out. Raises UserError for cases, peers, precisions and runtimes that there are not.
    """
    for kind, asked, known in (
        ("case", cases, CASES),
        ("peer", plan.peers, PEERS),
        ("precision", plan.precisions, PRECISIONS),
        ("runtime", plan.runtimes, PROGRAMS),
    ):
        for name in asked:
            if name not in known:
                listed = ", ".join(known)
                raise UserError(f"unknown {kind} '{printable(name)}'.{suggest(name, known)} There are {listed}.")
    versions = {name: PEERS[name].version for name in plan.peers}
    present = replace(plan, peers=[name for name, version in versions.items() if version is not None])
    here = machine(plan.device, {name: PRECISIONS[name].own or PRECISIONS[name].dtype for name in plan.precisions})
    absent = [f"{name} is not installed, and is left out" for name, version in versions.items() if version is None]
    tell([*described(here), *absent])
    tables = []
    for case in cases:
        for table in CASES[case](present, here):
            tell(lines(table))
            tables.append(table)
    return Benched(plan.model, here, versions, tables)


def described(here: Machine) -> list[str]:
    """The machine in a sentence or two."""
    products = ", ".join(f"{value:,.0f} GFLOP/s in {name}" for name, value in here.products.items())
    return [
        f"{here.processor}; {here.threads} threads; torch {here.torch} on {here.device}",
        f"at best: products of matrices {products}; copies {here.copies:.0f} GB/s",
    ]


def lines(table: Table) -> list[str]:
    """The table for a terminal."""
    cells = _cells(table)
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    rows = [
        "  ".join(cell.rjust(w) if k else cell.ljust(w) for k, (cell, w) in enumerate(zip(r, widths, strict=True)))
        for r in cells
    ]
    return ["", table.title, *(row.rstrip() for row in rows), *table.notes, *_grown(table)]


def _grown(table: Table) -> list[str]:
    return [f"{name} grow with the side to the power of {power:.2f}" for name, power in table.exponents.items()]


def _cells(table: Table) -> list[list[str]]:
    if table.points:
        head = ["pixels", "tokens", "ms", "MB above the model's own"]
        return [
            head,
            *(
                [
                    f"{point.side}×{point.side}",
                    f"{point.tokens:,}",
                    f"{point.seconds * 1e3:,.1f}",
                    "" if point.megabytes is None else f"{point.megabytes:,.1f}",
                ]
                for point in table.points
            ),
        ]
    shown = {"images/s": [f"{row.images_per_second:,.2f}" for row in table.rows]}
    shown["of the peak"] = ["" if row.share_of_peak is None else f"{row.share_of_peak:.0%}" for row in table.rows]
    shown["time over sightline's"] = [str(row.ratio) if i else "" for i, row in enumerate(table.rows)]
    shown["MB"] = ["" if row.megabytes is None else f"{row.megabytes:,.0f}" for row in table.rows]
    shown["parameters"] = [f"{row.parameters:,}" for row in table.rows]
    shown = {"": [row.name for row in table.rows]} | {name: cells for name, cells in shown.items() if any(cells)}
    return [list(shown), *map(list, zip(*shown.values(), strict=True))]
