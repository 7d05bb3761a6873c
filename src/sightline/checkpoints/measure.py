"""What the shapes of a file's tensors tell of the network in it, and what has to be asked."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from sightline.checkpoints.scheme import Request, adjusted
from sightline.errors import UserError
from sightline.layout import Layout
from sightline.network import Architecture, describe
from sightline.registry import find, variant, variants


@dataclass(frozen=True)
class Facts:
    """What a file says of the network in it: settings by name, and the rows of its position table that are patches.

    `tensors` counts those in the file. `told` are settings that a configuration names, and so are `image_size`
    (height, width) and `architecture`, a registered name. `measured` are the tensors whose shapes told the settings.
    """

    where: str
    tensors: int
    layout: Layout
    settings: Mapping[str, Any]
    patches: int | None = None
    image_size: tuple[int, int] | None = None
    architecture: str | None = None
    told: Mapping[str, Any] = field(default_factory=dict)
    measured: tuple[str, ...] = ()

    @property
    def structure(self) -> tuple[str, ...]:
        """The settings by which a network is known: those that its shapes tell, and those that they do not."""
        return (*self.layout.identity, *self.layout.untold)


def stored_architecture(facts: Facts, request: Request) -> Architecture:
    """The network as it lies in the file.

    A named architecture says how wide and deep it is (a file that differs is then refused, tensor by tensor);
    without a name the shapes say it, and what no shape tells, as the number of heads, is that of the registered models
    of equal width and depth. Raises UserError where that is not one number, or where the grid of positions is open.
    """
    name = request.architecture or facts.architecture
    settings, usual = dict(facts.settings), None
    if name is not None:
        row = variant(name)
        if (row.family, row.task) != (facts.layout.family, facts.layout.task):
            raise UserError(f"{facts.where} does not hold a {name}: its tensors are those of another kind of network")
        given = {**row.settings, **(row.head if row.task == facts.layout.task else {})}
        usual = given.pop("image_size", None)
        usual = (usual, usual) if isinstance(usual, int) else usual
        own = {key: settings[key] for key in facts.layout.habits if key in settings}
        own |= {key: {**settings.get(key, {}), **value} for key, value in given.items() if isinstance(value, Mapping)}
        settings = {key: value for key, value in settings.items() if not key.startswith("mlp_")} | given | own
    settings |= {**facts.told, **request.overrides}
    for key in facts.layout.untold:
        if key not in settings:
            settings[key] = _usual(key, settings, facts)
    settings = facts.layout.settle(settings)
    backbone = find("backbones", "FAMILIES", facts.layout.family, "family")
    task = facts.layout.task
    head = find("heads", "HEADS", task, "task")
    base = Architecture(name or _known_as(settings, facts), facts.layout.family, backbone.Config(), task, head.Config())
    try:
        architecture = adjusted(base, **settings)
    except UserError as fault:
        read = f" (the shapes of {', '.join(facts.measured)} say so)" if facts.measured else ""
        raise UserError(f"{facts.where}: {fault}{read}") from fault
    _require_tensors(architecture.backbone, facts)
    refuse_other(architecture, request, facts.where, facts.structure)
    size = _stored_size(_counted(facts, architecture), request, usual, architecture)
    return adjusted(architecture, image_size=size)


def _counted(facts: Facts, architecture: Architecture) -> Facts:
    """The facts, with rows of positions that were taken for those of tokens counted as those of patches."""
    wrong = facts.settings.get("class_position") and not getattr(architecture.backbone, "class_position", True)
    if facts.patches is None or not wrong:
        return facts
    rows = int(facts.settings["class_token"]) + int(facts.settings.get("distillation_token", False))
    return replace(facts, patches=facts.patches + rows)


def divides(config: Any) -> bool:
    """Whether whole patches fill the image, so that nothing has to be padded or dropped."""
    return all(side % patch == 0 for side, patch in zip(config.image_size, config.patch_size, strict=True))


def refuse_other(
    architecture: Architecture,
    request: Request,
    where: str,
    structure: tuple[str, ...] = ("embed_dim", "depth", "num_heads"),
) -> None:
    """Refuses a checkpoint that tells itself what it is, and is not what the user calls it."""
    if request.architecture is None:
        return
    row = variant(request.architecture)
    if row.family != architecture.family:
        raise UserError(f"{where} is not a {request.architecture}: it is a {architecture.name}")
    named = describe(request.architecture).backbone
    for key in {*structure, "patch_size"} & row.settings.keys() - request.overrides.keys():
        expected, found = getattr(named, key, None), getattr(architecture.backbone, key, None)
        if found != expected:
            raise UserError(f"{where} is not a {request.architecture}: its {key} is {found}, not {expected}")


def _require_tensors(config: Any, facts: Facts) -> None:
    """Layers without tensors are refused before they are laid out."""
    for key in ("depth", "depths", "layers"):
        value = getattr(config, key, 0)
        count = sum(value) if isinstance(value, tuple) else value
        if count > facts.tensors:
            raise UserError(
                f"{facts.where} holds {facts.tensors} tensors, too few for the {count} layers it is said to have"
            )


def _rows(facts: Facts) -> Iterator[tuple[str, Any]]:
    """The registered networks of a family by name, with the settings of their backbones."""
    for name, row in variants().items():
        if (row.family, row.task) == (facts.layout.family, facts.layout.task):
            yield name, _registered(name)


@cache
def _registered(name: str) -> Any:
    return describe(name).backbone


def _alike(config: Any, settings: Mapping[str, Any], keys: tuple[str, ...]) -> bool:
    return all(getattr(config, key) == _plain(settings.get(key, getattr(config, key))) for key in keys)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _usual(key: str, settings: Mapping[str, Any], facts: Facts) -> Any:
    """What a setting is in the registered networks of equal shapes."""
    found = {getattr(config, key) for _, config in _rows(facts) if _alike(config, settings, facts.layout.identity)}
    if len(found) != 1:
        shape = ", ".join(f"{name}={settings.get(name)}" for name in facts.layout.identity)
        raise UserError(
            f"{facts.where} does not tell its {key}, and no known model, or more than one, has {shape}; "
            f"give architecture=NAME or {key}=…"
        )
    return found.pop()


def _known_as(settings: Mapping[str, Any], facts: Facts) -> str:
    """The first registered name of equal structure: of those that the library knows, with most settings alike."""
    keys = tuple(facts.structure)
    alike = [(name, config) for name, config in _rows(facts) if _alike(config, settings, keys)]

    def score(pair: tuple[str, Any]) -> tuple[bool, int, bool]:
        name, config = pair
        theirs = bool(set(variant(name).sources) & set(facts.layout.libraries))
        same = sum(getattr(config, key, None) == _plain(value) for key, value in settings.items())
        return theirs, same, name.startswith(facts.layout.family)

    return max(alike, key=score)[0] if alike else facts.layout.family


def _stored_size(
    facts: Facts, request: Request, usual: tuple[int, int] | None, architecture: Architecture
) -> tuple[int, int]:
    """The image size that the table of positions in the file was made for."""
    told = request.source_size or facts.image_size
    if told is not None:
        return told
    config = architecture.backbone
    keys = (*facts.layout.identity, "patch_size")
    other = any(facts.settings.get(key) not in (None, getattr(config, key)) for key in keys)
    if facts.patches is None or other:
        return request.image_size or usual or config.image_size  # a file of another kind is refused by the rules
    stride = _stride(architecture)
    side = math.isqrt(facts.patches)
    square = (side * stride[0], side * stride[1])
    options: dict[tuple[int, int], tuple[int, int]] = {}
    for size in (request.image_size, usual, square):
        if size is not None and math.prod(grid := _grid(architecture, size)) == facts.patches:
            options.setdefault(grid, size)
    if len(options) == 1:
        return next(iter(options.values()))
    grids = " or ".join(f"{rows}×{columns}" for rows, columns in options)
    raise UserError(
        f"{facts.where} holds positions for {facts.patches} patches"
        + (f", a grid of {grids}" if options else ", which is no square grid")
        + "; say with source_size=(height, width) which image size it was made for"
    )


def _grid(architecture: Architecture, size: tuple[int, int]) -> tuple[int, int]:
    return architecture.lay_out().backbone.tokenizer.grid(size)


def _stride(architecture: Architecture) -> tuple[int, int]:
    """Pixels from one patch to the next, (down, right): what is left of a long image for each."""
    rows, columns = _grid(architecture, (2**20, 2**20))
    return round(2**20 / rows), round(2**20 / columns)
