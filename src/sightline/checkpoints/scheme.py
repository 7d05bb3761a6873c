"""What a naming scheme has to say for itself. One more scheme is one more file with a `SCHEMES` table."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sightline.checkpoints.files import Contents
from sightline.checkpoints.rules import Found
from sightline.errors import UserError, printable, suggest
from sightline.images.preprocess import Preprocess
from sightline.layout import Rule
from sightline.network import Architecture, Network
from sightline.registry import find
from sightline.schema import from_json
from sightline.texts.byte_pairs import Vocabulary

Grid = tuple[int, int]


@dataclass(frozen=True)
class Stored:
    """What lies on disk before anyone interprets it: tensors by name, the JSON files beside them, and their folder."""

    where: str
    contents: Contents
    config: Mapping[str, Any] | None = None
    processor: Mapping[str, Any] | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class Request:
    """What the user said about a checkpoint. Sizes are (height, width) in pixels; `source_size` is that of the file."""

    architecture: str | None = None
    image_size: tuple[int, int] | None = None
    source_size: tuple[int, int] | None = None
    num_classes: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """A checkpoint understood: the network as it was stored, the rules that fill it, and what came beside them."""

    architecture: Architecture
    rules: Sequence[Rule]
    found: Found
    preprocess: Preprocess | None = None
    labels: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    vocabulary: Vocabulary | None = None


class Scheme(ABC):
    """A naming scheme: how to know it, to read it and to write it."""

    @abstractmethod
    def recognises(self, stored: Stored) -> bool:
        """Whether the configuration, or without one the names of the tensors, are of this scheme."""

    @abstractmethod
    def read(self, stored: Stored, request: Request) -> Reading:
        """Understands a checkpoint. Raises UserError where it cannot, and says what would help."""

    @abstractmethod
    def rules(self, architecture: Architecture) -> list[Rule]:
        """The table for an architecture that this scheme can express, under the names that it writes."""

    @abstractmethod
    def refusals(self, architecture: Architecture, out: Path) -> list[str]:
        """Settings that the target cannot express, each as a phrase; empty where it can."""

    def extras(self, architecture: Architecture) -> dict[str, Tensor]:
        """Tensors that the target wants to find beside those of the rules."""
        return {}

    @abstractmethod
    def files(self, bundle: "Bundle", tensors: Mapping[str, Tensor], out: Path) -> "dict[Path, Content]":
        """What to write, in order; the last file completes the checkpoint."""

    def remarks(self, bundle: "Bundle", out: Path) -> list[str]:
        """What is not carried over although the outputs are the same, for the report."""
        if getattr(bundle.architecture.backbone, "partial_patches", "drop") == "drop":
            return []
        return ["partial_patches='pad', which acts at other image sizes only, becomes 'drop'"]

    def reference(self, bundle: "Bundle", out: Path) -> Callable[..., Any] | None:
        """The written checkpoint as the other library computes it, where that is installed.

        It takes what `Network.example` gives, and answers as the network does.
        """
        return None


Content = bytes | Callable[[Path], None]


@dataclass(frozen=True)
class Coverage:
    """Which tensors on disk became which parameters: `pairs` of (ours, theirs, shapes of theirs).

    Every parameter is filled and every tensor used, or its name stands in `dropped`; `notes` say what was changed on
    the way (positions resampled, head replaced, precision).
    """

    pairs: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[int, ...], ...]], ...]
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def tensors(self) -> int:
        """Number of tensors on the other side."""
        return sum(len(theirs) for _, theirs, _ in self.pairs)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {
            "tensors": self.tensors,
            "percent": 100.0,
            "pairs": [{"ours": list(o), "theirs": list(t), "shapes": [list(s) for s in k]} for o, t, k in self.pairs],
            "dropped": list(self.dropped),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Bundle:
    """A loaded checkpoint: the network in evaluation mode and all that is needed to use it.

    `labels` are the class names in order of the outputs, their numbers where the checkpoint names none. `source` says
    where it came from. `vocabulary` is what a network that reads texts has learned to read, where it is known.
    """

    network: Network
    preprocess: Preprocess
    labels: tuple[str, ...]
    coverage: Coverage
    source: str = ""
    vocabulary: Vocabulary | None = None

    @property
    def named(self) -> bool:
        """Whether the classes have names that are more than their numbers."""
        return self.labels != numbered(len(self.labels))

    @property
    def task(self) -> str:
        """What the head is for, a key of `HEADS`."""
        return self.network.architecture.task

    @property
    def architecture(self) -> Architecture:
        """The network as plain data."""
        return self.network.architecture


def numbered(count: int) -> tuple[str, ...]:
    """What classes without names are called: their numbers."""
    return tuple(map(str, range(count)))


def adjusted(architecture: Architecture, **settings: Any) -> Architecture:
    """The architecture with settings of its backbone or head replaced. Raises UserError for names that neither has."""
    settings = find("backbones", "FAMILIES", architecture.family, "family").settle(settings)
    parts = {"backbone": architecture.backbone, "head": architecture.head}
    known = [name for part in parts.values() for name in part.__dataclass_fields__]
    for name in settings:
        if name not in known:
            raise UserError(
                f"the {architecture.family} family has no setting '{printable(name)}'.{suggest(name, known)}"
            )
    changed = {}
    for role, part in parts.items():
        values = {name: settings.get(name, getattr(part, name)) for name in part.__dataclass_fields__}
        changed[role] = from_json(type(part), values, f"{architecture.family} {role}")
    return replace(architecture, **changed)
