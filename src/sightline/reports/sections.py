"""Parts of a page about a run that are the same whatever was learned."""

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from sightline.images.preprocess import Preprocess
from sightline.network import Network, count_parameters


def table(rows: Mapping[str, Any]) -> str:
    """Names and values, one a row."""
    cells = (f"<tr><th>{escape(str(key))}</th><td>{escape(str(value))}</td></tr>" for key, value in rows.items())
    return f"<table>{''.join(cells)}</table>"


def summary(rows: Mapping[str, Any], network: Network, preprocess: Preprocess, record: Mapping[str, Any]) -> str:
    """What was reached, in `rows`, by which network in what time, and why the run was as it was."""
    told = {
        "network": f"{network.architecture.name}, {count_parameters(network):,} parameters",
        "pixels": preprocess.describe(),
        "time in training": _time(record["seconds"]),
    }
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in record["recipe"]["reasons"])
    return f"{table({**rows, **told})}<h2>Why this recipe</h2><ul>{reasons}</ul>"


def _time(seconds: Mapping[str, float]) -> str:
    waited = seconds.get("waiting")
    share = "" if waited is None else f", {waited / max(seconds['train'], 1e-9):.1%} of it waiting for images"
    return f"{seconds['train']:.0f} s{share}"


def doctor(record: Mapping[str, Any]) -> str:
    """What the doctor named."""
    if not (findings := record.get("findings")):
        return "<h2>Doctor</h2><p>Nothing stood out in the training.</p>"
    rows = (
        f"<tr><th>{escape(f['kind'])}</th><td>{f['step']:,}</td><td>{escape(f['severity'])}</td>"
        f"<td>{escape(f['words'])}.</td><td>{escape(f['advice'])}</td></tr>"
        for f in findings
    )
    head = "<tr><th>finding</th><th>step</th><th>weight</th><th>what was seen</th><th>what helps</th></tr>"
    return f'<h2>Doctor</h2><div class="wide"><table>{head}{"".join(rows)}</table></div>'


def curves(charts: Iterable[tuple[str, str]]) -> str:
    """Charts with their captions, those left out of which there is nothing to show."""
    figures = (f"<figure>{chart}<figcaption>{name}</figcaption></figure>" for name, chart in charts if chart)
    return f'<h2>Curves</h2><div class="row charts">{"".join(figures)}</div>'


def settings(record: Mapping[str, Any]) -> str:
    """Everything that the run was told."""
    parts = {
        "Training": record["recipe"]["settings"],
        "Variation of the images": record["recipe"]["augment"],
        "Network": record["recipe"]["architecture"]["backbone"],
        "Machine": record["environment"],
    }
    if options := record["recipe"].get("options"):
        parts = {"Objective": {"objective": record["recipe"]["objective"], **options}, **parts}
    details = "".join(f"<details><summary>{name}</summary>{table(values)}</details>" for name, values in parts.items())
    return f"<h2>Settings</h2>{details}"
