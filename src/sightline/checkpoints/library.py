"""A library whose files are read and written by layouts: one for each kind of network that it has."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from sightline.checkpoints.files import bare_file
from sightline.checkpoints.measure import Facts, stored_architecture
from sightline.checkpoints.rules import Found
from sightline.checkpoints.scheme import Bundle, Content, Reading, Request, Scheme, Stored
from sightline.errors import UserError, printable
from sightline.images.preprocess import Preprocess
from sightline.layout import Layout, Rule, Shapes
from sightline.network import Architecture
from sightline.registry import layouts, variants

_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
_HALF = (0.5, 0.5, 0.5)


class Library(Scheme):
    """A scheme made of the `LAYOUTS` entries that name it. Bare files are recognised by the names of their tensors."""

    name: ClassVar[str]

    def layouts(self) -> list[Layout]:
        """The layouts of this library, whichever files they stand in."""
        return list(layouts(self.name).values())

    def clean(self, stored: Stored) -> Found:
        """The tensors under the names that rules use, without what wrappers put before all of them."""
        return unprefixed(stored)

    def recognises(self, stored: Stored) -> bool:
        return stored.config is None and self.matching(self.clean(stored)) is not None

    def matching(self, found: Found) -> Layout | None:
        """The layout whose tensors these are; None where it is none's."""
        matches = [layout for layout in self.layouts() if layout.recognises(shapes_of(renamed(found, layout)))]
        assert len(matches) < 2, f"{found.where} is claimed by {len(matches)} layouts of {self.name}"
        return matches[0] if matches else None

    def read(self, stored: Stored, request: Request) -> Reading:
        found = self.clean(stored)
        layout = self.matching(found)
        assert layout is not None, "what nobody recognises comes to no scheme"
        return self.reading(found, layout, request, notes=said(found))

    def reading(
        self,
        found: Found,
        layout: Layout,
        request: Request,
        *,
        architecture: str | None = None,
        image_size: tuple[int, int] | None = None,
        told: Mapping[str, Any] | None = None,
        tell: "Callable[[Architecture], tuple[Preprocess, tuple[str, ...] | None]] | None" = None,
        notes: tuple[str, ...] = (),
    ) -> Reading:
        """A checkpoint of this layout understood; `architecture`, `image_size` and `told` are what lies beside it."""
        found = renamed(found, layout)
        shapes = shapes_of(found)
        unused = layout.unused(shapes)
        dropped = tuple(found.on_disk(name) for name in unused)
        kept = {name: tensor for name, tensor in found.tensors.items() if name not in unused}
        found = replace(found, tensors=kept, dropped=(*found.dropped, *dropped))
        known_size = image_size or request.source_size or request.image_size
        settings = layout.measure(shapes, known_size)
        patches = settings.pop("patches", None)
        measured_size = settings.pop("image_size", None)
        facts = Facts(
            found.where, len(kept), layout, settings, patches, image_size or measured_size, architecture, told or {}
        )
        stored = stored_architecture(facts, request)
        preprocess, labels = usual_pixels(stored) if tell is None else tell(stored)
        return Reading(stored, layout.rules(stored.backbone, stored.head), found, preprocess, labels, notes)

    def layout_of(self, architecture: Architecture) -> tuple[Layout | None, list[str]]:
        """The layout that can express a network; where none can, the family's plainest, and what it refuses."""
        family = architecture.family
        kinds = {key: layout for key, layout in layouts(self.name).items() if layout.family == family}
        mine = {key: layout for key, layout in kinds.items() if layout.task == architecture.task}
        if not mine:
            what = f"the {family} family" if not kinds else f"a head for '{architecture.task}'"
            return None, [f"{self.name} has no names for the weights of {what}"]
        tried = {key: layout.refusals(architecture.backbone, architecture.head) for key, layout in mine.items()}
        plain = f"{self.name}/{family}"
        best = min(tried, key=lambda key: (bool(tried[key]), key != plain, len(tried[key])))
        return mine[best], tried[best]

    def layout(self, architecture: Architecture) -> Layout:
        """The layout for a network that this library can express."""
        layout, _ = self.layout_of(architecture)
        assert layout is not None, f"{self.name} cannot express a network of the {architecture.family} family"
        return layout

    def rules(self, architecture: Architecture) -> list[Rule]:
        return self.layout(architecture).rules(architecture.backbone, architecture.head)

    def refusals(self, architecture: Architecture, out: Path) -> list[str]:
        return self.layout_of(architecture)[1]

    def extras(self, architecture: Architecture) -> dict[str, Tensor]:
        return self.layout(architecture).extras(architecture.backbone, architecture.head)

    def files(self, bundle: Bundle, tensors: Mapping[str, Tensor], out: Path) -> dict[Path, Content]:
        bare = bare_file(tensors, out)
        if not bare:
            raise UserError(f"{printable(out)}: weights of {self.name} are one file, in .safetensors or .pth")
        return bare

    def remarks(self, bundle: Bundle, out: Path) -> list[str]:
        architecture = bundle.architecture
        remarks = self.layout(architecture).remarks(architecture.backbone, architecture.head)
        return [*super().remarks(bundle, out), *remarks, *([_ALONE] if out.suffix else [])]


_ALONE = "a bare file holds weights alone: class names and the pixel contract are not in it"


class Torchvision(Library):
    """torchvision's models, whose weights are bare files."""

    name = "torchvision"


class Original(Library):
    """The repositories that the papers came with, each under its own names."""

    name = "original"


def unprefixed(stored: Stored, prefixes: Sequence[str] = _PREFIXES) -> Found:
    """The names without what wrappers put before all of them."""
    names, prefix = list(stored.contents.tensors), ""
    while outer := next((p for p in prefixes if all(name.startswith(prefix + p) for name in names)), None):
        prefix += outer
    tensors = {name.removeprefix(prefix): tensor for name, tensor in stored.contents.tensors.items()}
    return Found(stored.where, tensors, prefix)


def renamed(found: Found, layout: Layout) -> Found:
    """The tensors under the names that a layout's rules use, where older files of its kind call them otherwise."""
    now = {name: layout.current(name) for name in found.tensors}
    if len(set(now.values())) < len(now):
        return found  # two tensors of one name: no file of this layout
    disk = {now[name]: found.disk.get(name, found.prefix + name) for name in now if now[name] != name}
    disk |= {name: known for name, known in found.disk.items() if now.get(name) == name}
    return replace(found, tensors={now[name]: tensor for name, tensor in found.tensors.items()}, disk=disk)


def said(found: Found) -> tuple[str, ...]:
    """What was taken off, for the report."""
    return (f"the prefix '{found.prefix}' taken off every name",) * bool(found.prefix)


def shapes_of(found: Found) -> Shapes:
    """The shapes of the tensors, with their names on disk for messages."""
    return Shapes({name: tuple(tensor.shape) for name, tensor in found.tensors.items()}, found.where, found.named)


def usual_pixels(architecture: Architecture) -> tuple[Preprocess, None]:
    """The pixel contract that published weights of an architecture expect, and no class names."""
    row = variants().get(architecture.name)
    usual = row.preprocess if row is not None else {"crop_pct": 1.0, "mean": _HALF, "std": _HALF}
    settings = {"kernel": "pillow", **usual}
    return Preprocess.from_json({"size": architecture.backbone.image_size, **settings}), None


SCHEMES: Mapping[str, Scheme] = {"torchvision": Torchvision(), "original": Original()}
