"""The model card: what a stranger has to know before using the model."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from sightline.checkpoints.atomic import write_atomic
from sightline.errors import UserError, printable

_CARD = """---
library_name: sightline
pipeline_tag: {tag}
tags: [vision-transformer, {tag}]
---
# {name}

{what} trained with Sightline {version} on `{source}`.

| | |
|---|---|
{figures}
| training images | {train:,} |
{classes}| recipe | {recipe}, seed {seed}, {seconds:.0f} s |
| data fingerprint | `{fingerprint}` |

## Use

```python
import sightline

model = sightline.load("{folder}")
print(model.predict({arguments})[0].{attribute})
```

Pixels are prepared as `config.json` says; the same code prepares them in training, evaluation and prediction.

## Limits

{limits}.
The held-out images come from the same source as the training images; on images of another source expect less.
"""


@dataclass(frozen=True)
class Card:
    """What a model card says of a task.

    The hub's `tag` for it, `what` such a model is, the `attribute` of an answer that is shown, its `limits` before the
    names of the classes, the metrics by their public names with what people call them, and the `arguments` of the call.
    """

    tag: str
    what: str
    attribute: str
    limits: str
    figures: Mapping[str, str]
    arguments: str = '["image.jpg"]'


def model_card(folder: Path, labels: Sequence[str], record: Mapping[str, Any], card: Card) -> None:
    """Writes `README.md` of a model directory from its run record."""
    counts = f" ({record['counts']['evaluated']:,} images, {record['counts']['refused']} refused)"
    figures = [f"| {name}, held out | {record['metrics'][key]:.2%}" for key, name in card.figures.items()]
    shown = [escape(printable(label, 40)) for label in labels[:50]]
    names = ", ".join(shown) + (f" and {len(labels) - 50} more" if len(labels) > 50 else "")
    text = _CARD.format(
        name=escape(printable(folder.name)),
        folder=printable(folder.name).replace("`", "'"),
        version=record["environment"]["packages"]["sightline"],
        source=printable(record["data"]["source"]).replace("`", "'"),  # it stands between such marks
        tag=card.tag,
        what=card.what,
        attribute=card.attribute,
        limits=f"{card.limits}: {names}" if labels else card.limits,
        arguments=card.arguments,
        figures="\n".join(f"{row}{counts if i == 0 else ''} |" for i, row in enumerate(figures)),
        train=record["data"]["train"],
        classes=f"| classes | {record['data']['classes']} |\n" if labels else "",
        recipe=record["recipe"]["name"],
        seed=record["seed"],
        seconds=record["seconds"]["train"],
        fingerprint=record["data"]["fingerprint"]["train"][:16],
    )
    write_atomic(folder / "README.md", text.encode())


def add_section(folder: Path, heading: str, text: str) -> bool:
    """Puts a section into `README.md` of a model directory of this project, in the place of one with the same heading.

    Says whether it did: other people's cards are left as they are. Raises WorkError where the disk refuses, and
    UserError where the card cannot be read.
    """
    path = folder / "README.md"
    if not (folder / "config.json").is_file() or not path.is_file():
        return False
    try:
        card = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise UserError(f"cannot read {printable(path)}: {getattr(fault, 'strerror', None) or 'not UTF-8'}") from fault
    if not card.startswith("---\nlibrary_name: sightline\n"):
        return False
    written = f"## {heading}\n\n{text}\n"
    parts = re.split(r"^(?=## )", card, flags=re.M)
    before = [part for part in parts if not part.startswith(f"## {heading}\n")]
    whole = "".join(before).rstrip("\n") + "\n\n" + written
    write_atomic(path, whole.encode())
    return True


_PRETRAINED = """---
library_name: sightline
pipeline_tag: image-feature-extraction
tags: [vision-transformer, {objective}]
---
# {name}

A backbone taught with Sightline {version} on `{source}` by the objective `{objective}`, to be trained further.

| | |
|---|---|
{metrics}
| training images | {train:,} |
| recipe | {recipe}, seed {seed}, {seconds:.0f} s |
| data fingerprint | `{fingerprint}` |

## Use

    sightline train IMAGES --weights {folder}

```python
import sightline

vectors = sightline.load("{folder}").embed(["image.jpg"])
```

Pixels are prepared as `config.json` says; the same code prepares them everywhere.

## Limits

{limits} What it has learned to see, it has learned from images of one source; others may need more.
"""

_TOLD = {
    "knn_top1": "top-1 of the 20 nearest neighbours, held out",
    "effective_rank": "effective rank of the features",
    "feature_std": "deviation of the features",
}
_FEATURES_ONLY = "It names no classes before it has been trained on some."


def pretrained_card(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes `README.md` of a model directory that was learned without labels."""
    rows = (f"| {_TOLD[name]} | {value:.4g} |" for name, value in record["metrics"].items() if name in _TOLD)
    text = _PRETRAINED.format(
        name=escape(printable(folder.name)),
        folder=printable(folder.name).replace("`", "'"),
        version=record["environment"]["packages"]["sightline"],
        source=printable(record["data"]["source"]).replace("`", "'"),
        objective=record["recipe"]["objective"],
        metrics="\n".join(rows),
        train=record["data"]["train"],
        recipe=record["recipe"]["name"],
        seed=record["seed"],
        seconds=record["seconds"]["train"],
        fingerprint=record["data"]["fingerprint"]["train"][:16],
        limits=_FEATURES_ONLY,
    )
    write_atomic(folder / "README.md", text.encode())
