"""`sightline models`: what can be made."""

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sightline.registry import Variant

SUMMARY = "List the architectures: parameters, multiply-adds at their resolution, paper, sources of weights."
EXAMPLE = "sightline models 'vit_*_224'"


def arguments(parser: Any) -> None:
    """The verb's own arguments."""
    parser.add_argument("pattern", nargs="?", default="*", help="names to list, with * and ? as in a shell")


def run(request: argparse.Namespace) -> None:
    """Prints the table, or the same as JSON."""
    from sightline.errors import UserError, printable, suggest
    from sightline.registry import variants

    rows = variants(request.pattern)
    if not rows:
        wider = f"*{request.pattern}*"
        near = f" Did you mean '{wider}'?" if variants(wider) else suggest(request.pattern, variants())
        raise UserError(f"no model matches '{printable(request.pattern)}'.{near}")
    table = (_row(name, row) for name, row in rows.items())
    if request.json:
        print(json.dumps({"models": list(table)}))
        return
    print(f"{'name':34} {'parameters':>13} {'GMACs':>8} {'pixels':>9}  {'paper':16} weights from")
    for row in table:
        pixels = "×".join(map(str, row["image_size"]))
        print(
            f"{row['name']:34} {row['parameters']:13,} {row['gmacs']:8.3f} {pixels:>9}  {row['paper']:16} "
            f"{', '.join(row['weights'])}",
            flush=True,  # counting the largest takes a while, and the first ones may be what was looked for
        )


def _row(name: str, row: "Variant") -> dict[str, Any]:
    from sightline.network import count_macs, describe

    architecture = describe(name)
    return {
        "name": name,
        "parameters": row.parameters,
        "gmacs": round(count_macs(architecture) / 1e9, 3),
        "image_size": list(architecture.backbone.image_size),
        "paper": f"arXiv:{row.paper}",
        "weights": list(row.sources),
    }
