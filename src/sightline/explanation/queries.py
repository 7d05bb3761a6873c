"""Whose attention is asked for: the tokens of a layer by name, and the rows that ask for them."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sightline.errors import UserError, printable, suggest
from sightline.explanation.grids import Grid, Seats, cover

CLASS, DISTILLATION, BOTH, MEAN = (
    "class token",
    "distillation token",
    "class and distillation tokens",
    "mean of patches",
)

Query = str
"""A token by its name (`token_names`), `BOTH`, `MEAN`, or `patch ROW,COLUMN`, from 1 on the first layer's grid."""

_SHORT = {"class": CLASS, "distillation": DISTILLATION, "patches": MEAN, "mean": MEAN}


def token_names(backbone: nn.Module, prefix: int) -> tuple[str, ...]:
    """What the tokens before the patches are called: class token, distillation token, `register 1` and so on.

    By the settings of the backbone where it has such; a first token is a class token unless they deny it.
    """
    config: Any = getattr(backbone, "config", None)
    names = [CLASS] if getattr(config, "class_token", True) else []
    names += [DISTILLATION] if getattr(config, "distillation_token", False) else []
    names += [f"register {number + 1}" for number in range(prefix - len(names))]
    return tuple(names[:prefix])


def settled(query: str | tuple[int, int], names: Sequence[str], grid: Grid) -> Query:
    """A request for a token as a `Query`: by its full or short name, or a patch as (row, column) or `ROW,COLUMN`.

    In words, rows and columns of `grid` are counted from 1, as people do; as a pair of numbers from 0, as arrays do.
    `names` are those of the prefix tokens. Raises UserError for what is not there.
    """
    if isinstance(query, tuple):
        place: tuple[int, int] | None = query
    else:
        words = " ".join(query.lower().replace("-", " ").replace("_", " ").split())
        query = _SHORT.get(words, words)
        found = re.fullmatch(r"(?:patch )?(\d+) ?, ?(\d+)", query)
        place = (int(found[1]) - 1, int(found[2]) - 1) if found else None
    if place is not None:
        if not all(0 <= at < cells for at, cells in zip(place, grid, strict=True)):
            raise UserError(
                f"there is no patch {place[0] + 1},{place[1] + 1}: the grid has {grid[0]} rows and {grid[1]} columns, "
                "counted from 1"
            )
        return f"patch {place[0] + 1},{place[1] + 1}"
    known = [*names, MEAN, *([BOTH] if DISTILLATION in names else [])]
    if query not in known:
        raise UserError(
            f"this model has no token '{printable(str(query))}'.{suggest(str(query), known)} It can be asked for: "
            f"{', '.join(known)}, or a patch as ROW,COLUMN"
        )
    return str(query)


def query_row(
    seats: Seats, query: Query, names: Sequence[str] = (CLASS, DISTILLATION), *, finest: Grid | None = None
) -> Float[Tensor, "1 1 n"]:
    """The row that asks for one result of a layer whose tokens are `seats`: it weighs these, and sums to 1.

    `names` are those of the prefix tokens. A patch is named on the grid `finest`, the layer's own unless given; the
    cell that covers it is asked. Zeros where the layer has no such token.
    """
    row = torch.zeros(1, 1, seats.tokens)
    if query == MEAN:
        row[..., seats.prefix :] = 1 / (seats.tokens - seats.prefix)
    elif query.startswith("patch "):
        at = [int(number) - 1 for number in query.removeprefix("patch ").split(",")]
        fine = seats.grid if finest is None else finest
        r, c = (
            min(int(place / cover(long, short)), short - 1)
            for place, long, short in zip(at, fine, seats.grid, strict=True)
        )
        row[..., seats.prefix + r * seats.grid[1] + c] = 1.0
    else:
        asked = [names.index(name) for name in ((CLASS, DISTILLATION) if query == BOTH else (query,))]
        row[..., [place for place in asked if place < seats.prefix]] = 1 / len(asked)
    return row
