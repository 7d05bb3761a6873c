"""What the shapes of a Vision Transformer's tensors tell of it, and what has to be asked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sightline.backbones.vit import ViTConfig
from sightline.checkpoints.scheme import Request, adjusted
from sightline.errors import UserError
from sightline.heads.classify import ClassifyConfig
from sightline.network import Architecture
from sightline.registry import variant, variants

_STRUCTURE = ("embed_dim", "depth", "num_heads", "patch_size")


@dataclass(frozen=True)
class Facts:
    """What a file says of the network in it: settings by name, and the rows of its position table that are patches.

    `tensors` counts those in the file. `told` are settings that a configuration names, and so are `image_size`
    (height, width) and `architecture`, a registered name.
    """

    where: str
    tensors: int
    settings: Mapping[str, Any]
    patches: int | None
    image_size: tuple[int, int] | None = None
    architecture: str | None = None
    told: Mapping[str, Any] = field(default_factory=dict)


def stored_architecture(facts: Facts, request: Request) -> Architecture:
    """The network as it lies in the file.

    A named architecture says how wide and deep it is (a file that differs is then refused, tensor by tensor);
    without a name the shapes say it, and the number of heads, which no shape tells, is that of the registered models
    of equal width and depth. Raises UserError where that is not one number, or where the grid of positions is open.
    """
    name = request.architecture or facts.architecture
    settings = dict(facts.settings)
    usual = None
    if name is not None:
        row = variant(name)
        if row.family != "vit":
            raise UserError(f"{facts.where} holds a Vision Transformer, and '{name}' is a {row.family}")
        given = {**row.settings, **row.head}
        usual = given.pop("image_size", None)
        usual = (usual, usual) if isinstance(usual, int) else usual
        settings = {**settings, "mlp_dim": None, **given}
    settings |= facts.told
    settings |= {key: value for key, value in request.overrides.items() if key in _STRUCTURE or key.startswith("mlp_")}
    if "num_heads" not in settings:
        settings["num_heads"] = _heads(settings, facts.where)
    base = Architecture(name or _known_as(settings), "vit", ViTConfig(), "classify", ClassifyConfig())
    try:
        architecture = adjusted(base, **settings)
    except UserError as fault:
        raise UserError(f"{facts.where}: {fault}") from fault
    depth = architecture.backbone.depth
    if depth > facts.tensors:
        raise UserError(
            f"{facts.where} holds {facts.tensors} tensors, too few for the {depth} layers it is said to have"
        )
    refuse_other(architecture, request, facts.where)
    size = _stored_size(facts, request, usual, architecture.backbone)
    return adjusted(architecture, image_size=size)


def divides(config: ViTConfig) -> bool:
    """Whether whole patches fill the image, so that nothing has to be padded or dropped."""
    return all(side % patch == 0 for side, patch in zip(config.image_size, config.patch_size, strict=True))


def refuse_other(architecture: Architecture, request: Request, where: str) -> None:
    """Refuses a checkpoint that tells itself what it is, and is not what the user calls it."""
    if request.architecture is None:
        return
    row = variant(request.architecture).settings
    for key in set(_STRUCTURE) & row.keys() - request.overrides.keys():
        expected = (row[key],) * 2 if key == "patch_size" and isinstance(row[key], int) else row[key]
        found = getattr(architecture.backbone, key, None)
        if found != expected:
            raise UserError(f"{where} is not a {request.architecture}: its {key} is {found}, not {expected}")


def _heads(settings: Mapping[str, Any], where: str) -> int:
    width, depth = settings["embed_dim"], settings["depth"]
    rows = [row.settings for row in variants().values() if row.family == "vit"]
    heads = {row["num_heads"] for row in rows if (row["embed_dim"], row["depth"]) == (width, depth)}
    if len(heads) != 1:
        raise UserError(
            f"{where} does not tell its number of attention heads, and no known model is {width} wide and "
            f"{depth} deep; give architecture=NAME or num_heads=N"
        )
    return heads.pop()


def _known_as(settings: Mapping[str, Any]) -> str:
    """The first registered name of equal width, depth, heads and patches, for people."""
    for name, row in variants().items():
        patch = (row.settings.get("patch_size"),) * 2
        same = all(row.settings.get(key) == settings.get(key) for key in ("embed_dim", "depth", "num_heads"))
        if row.family == "vit" and same and patch == settings.get("patch_size"):
            return name
    return "vit"


def _stored_size(facts: Facts, request: Request, usual: tuple[int, int] | None, config: ViTConfig) -> tuple[int, int]:
    """The image size that the table of positions in the file was made for."""
    told = request.source_size or facts.image_size
    if told is not None:
        return told
    patch = config.patch_size
    other = any(
        facts.settings.get(key) not in (None, getattr(config, key)) for key in ("embed_dim", "depth", "patch_size")
    )
    if facts.patches is None or other:
        return request.image_size or usual or (224, 224)  # a file of another kind is refused by the rules, in detail
    side = math.isqrt(facts.patches)
    square = (side * patch[0], side * patch[1])
    options = {}
    for size in (request.image_size, usual, square):
        if size is not None:
            grid = (size[0] // patch[0], size[1] // patch[1])
            if math.prod(grid) == facts.patches:
                options.setdefault(grid, size)
    if len(options) == 1:
        return next(iter(options.values()))
    grids = " or ".join(f"{rows}×{columns}" for rows, columns in options)
    raise UserError(
        f"{facts.where} holds positions for {facts.patches} patches"
        + (f", a grid of {grids}" if options else ", which is no square grid")
        + "; say with source_size=(height, width) which image size it was made for"
    )
