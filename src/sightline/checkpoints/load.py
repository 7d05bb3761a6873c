"""A checkpoint of any known kind becomes a network that computes what the library that wrote it computes."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sightline.checkpoints import hub
from sightline.checkpoints.files import MAX_CONFIG, SUFFIXES, read_json, read_sharded, read_tensors
from sightline.checkpoints.hashes import require_hashes
from sightline.checkpoints.nearest import lacking
from sightline.checkpoints.rules import load
from sightline.checkpoints.scheme import Bundle, Coverage, Reading, Request, Scheme, Stored, adjusted, numbered
from sightline.checkpoints.sealed import SEAL
from sightline.checkpoints.shipped import PREFIX, shipped_folder
from sightline.errors import UserError, printable
from sightline.images.preprocess import Preprocess
from sightline.network import Architecture, Network
from sightline.registry import find, table
from sightline.types import finite

_CONFIGS = ("config.json", "open_clip_config.json")
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.pth",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
UNFORESEEN = "a value in config.json is of a kind that no such configuration has"
"""What a reader says where it stumbles over a value that it should have named."""

_FIRST = ("sightline", "timm", "openai")
"""Where names are of several layouts: theirs are the ones that others took over."""
_HALF = (0.5, 0.5, 0.5)
_BACKBONE = "backbone."


def load_bundle(
    source: str | Path,
    *,
    architecture: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    source_size: int | tuple[int, int] | None = None,
    **overrides: Any,
) -> Bundle:
    """A network with its weights, in evaluation mode and float32, and what came beside them.

    `source` is a model directory of ours, of transformers or of timm, a file (`.safetensors`, `.npz`, `.pth`, `.bin`),
    `hf:org/name[@revision]`, or `builtin:NAME` for weights that come with Sightline. `architecture` names a registered
    model where a bare file cannot tell. `image_size` (pixels, one number or (height, width)) resamples the positions by
    the method of the source; `source_size` says which image size a bare file was made for where its table could be of
    several grids. Another `num_classes` replaces the classifier with zeros (0 leaves it out). Further settings go by
    their names (`drop_path_rate`, `norm_eps`, …).
    Raises UserError, naming file and tensor, for whatever does not fit exactly.
    """
    if "img_size" in overrides:
        image_size = _one_size(image_size, overrides.pop("img_size"))
    request = Request(architecture, _pair(image_size), _pair(source_size), num_classes, overrides)
    stored = open_source(source)
    name, scheme = _scheme_of(stored, architecture)
    reading = _read(scheme, stored, request)
    found = replace(reading.found, mapped=stored.contents.mapped)
    state = load(reading.rules, found, reading.architecture.shapes(), consume=True)
    pairs = tuple(
        (rule.ours, rule.theirs, tuple(tuple(reading.found.tensors[t].shape) for t in rule.theirs))
        for rule in reading.rules
    )
    notes = [f"read as {name}", *stored.contents.notes, *reading.notes, *_precision(stored)]
    target, state = _adapted(reading, state, request, notes)
    network = _filled(target, state)
    _require_finite(network, reading)
    count = getattr(target.head, "num_classes", 0)
    labels = reading.labels if reading.labels is not None and len(reading.labels) == count else numbered(count)
    labels = _distinct(labels, notes)
    preprocess = _preprocess(reading, target)
    coverage = Coverage(pairs, reading.found.dropped, tuple(notes))
    return Bundle(network, preprocess, labels, coverage, str(source), reading.vocabulary)


def open_source(source: str | Path) -> Stored:
    """The tensors and JSON files of a source, not yet interpreted. Raises UserError where they cannot be read."""
    if isinstance(source, str) and source.startswith(hub.PREFIX):
        return _open_directory(hub.fetch(source), source)
    if isinstance(source, str) and source.startswith(PREFIX):
        return _open_directory(shipped_folder(source), source)
    path = Path(source).expanduser()
    if not path.exists():
        hint = f"; the hub's models are named hf:{source}" if len(path.parts) == 2 and not path.is_absolute() else ""
        raise UserError(f"there is no file or folder {printable(source)}{hint}")
    if path.is_dir():
        return _open_directory(path, printable(path))
    if path.name.endswith(".index.json"):
        return Stored(printable(path), read_sharded(path))
    return Stored(printable(path), read_tensors(path))


def _open_directory(folder: Path, where: str) -> Stored:
    config = next((folder / name for name in _CONFIGS if (folder / name).is_file()), folder / _CONFIGS[0])
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if not config.is_file():
        hint = f"; name one of its files ({', '.join(SUFFIXES)}) to read that alone" if weights else ""
        raise UserError(f"{where} has no config.json, so it is no model directory{hint}")
    settings = read_json(config, MAX_CONFIG)
    if weights is None:
        raise UserError(f"{where} has no weights ({', '.join(_WEIGHTS)})")
    if SEAL in settings:
        require_hashes(weights, settings.get("weights"))
    processor = folder / "preprocessor_config.json"
    return Stored(
        printable(weights) if where == printable(folder) else f"{where} ({weights.name})",
        read_sharded(weights) if weights.suffix == ".json" else read_tensors(weights),
        settings,
        read_json(processor, MAX_CONFIG) if processor.is_file() else None,
        folder,
    )


def _read(scheme: Scheme, stored: Stored, request: Request) -> Reading:
    """The scheme's reading; its refusals name the file."""
    try:
        return scheme.read(stored, request)
    except UserError as fault:
        if stored.where in str(fault):
            raise
        raise UserError(f"{stored.where}: {fault}") from fault
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as fault:
        if stored.config is None:
            raise
        raise UserError(f"{stored.where}: {UNFORESEEN}: {printable(fault, 120)}") from fault


def _scheme_of(stored: Stored, architecture: str | None) -> tuple[str, Scheme]:
    schemes: Mapping[str, Scheme] = table("checkpoints", "SCHEMES")
    matches = [(name, schemes[name]) for name in (*_FIRST, *schemes) if schemes[name].recognises(stored)]
    if matches:
        return matches[0]
    shown = ", ".join(f"'{printable(name)}'" for name in list(stored.contents.tensors)[:5])
    lack = lacking(stored, architecture)
    holds = lack or f"it holds tensors such as {shown}"
    raise UserError(f"{stored.where} is of no known layout ({', '.join(schemes)}); {holds}")


def _adapted(
    reading: Reading, state: dict[str, Tensor], request: Request, notes: list[str]
) -> tuple[Architecture, dict[str, Tensor]]:
    """The stored network and its weights as the user wants them: another grid, other classes, other settings."""
    stored = reading.architecture
    target = adjusted(stored, **request.overrides)
    if request.image_size is not None and request.image_size != stored.backbone.image_size:
        target = adjusted(target, image_size=request.image_size)
        _resample(reading, state, target, notes)
    count = request.num_classes
    if count is not None and not hasattr(stored.head, "num_classes"):
        notes.append(f"num_classes={count} changes nothing: the head of this network has no classes")
    elif count is not None and count != stored.head.num_classes:
        target = _with_classes(target, count, reading, state, notes)
    return target, state


def _resample(reading: Reading, state: dict[str, Tensor], target: Architecture, notes: list[str]) -> None:
    """Replaces in `state` what depends on the image size, as the backbone of that family says."""
    old, new = reading.architecture.lay_out().backbone, target.lay_out().backbone
    mine = {name.removeprefix(_BACKBONE): t for name, t in state.items() if name.startswith(_BACKBONE)}
    for name, (tensor, how) in new.resample(mine, old).items():
        state[_BACKBONE + name] = tensor
        disk = next(rule.theirs[-1] for rule in reading.rules if _BACKBONE + name in rule.ours)
        notes.append(f"{reading.found.named(disk)} resampled {how}")


def _with_classes(
    target: Architecture, count: int, reading: Reading, state: dict[str, Tensor], notes: list[str]
) -> Architecture:
    """Another number of classes: the classifier, and what was trained for it alone, gives way to zeros."""
    kind = find("heads", "HEADS", target.task, "task")
    classifiers, before = (tuple(f"head.{name}" for name in names) for names in (kind.per_class, kind.before_classes))
    gone = [name for name in state if name.startswith((*classifiers, *before) if count else classifiers)]
    disk = [
        reading.found.named(theirs) for rule in reading.rules for theirs in rule.theirs if set(rule.ours) & set(gone)
    ]
    for name in gone:
        del state[name]
    plain = {"pre_logits": None} if count and hasattr(target.head, "pre_logits") else {}
    target = adjusted(target, num_classes=count, **plain)
    if disk:
        notes.append(f"dropped for {count} classes: {', '.join(disk)}")
    if count:
        for name, shape in target.shapes().items():
            if name.startswith(classifiers):
                state[name] = torch.zeros(shape)
        notes.append(f"the classifier of {count} classes starts at zero")
    return target


def _filled(architecture: Architecture, state: Mapping[str, Tensor]) -> Network:
    """The network with these tensors as its parameters; none is copied."""
    network = architecture.lay_out()
    expected = network.state_dict()
    odd = sorted(
        name
        for name in expected.keys() | state.keys()
        if name not in state or name not in expected or state[name].shape != expected[name].shape
    )
    if odd:
        raise UserError(f"the settings asked for need other weights than the file has, beginning with '{odd[0]}'")
    network.load_state_dict(state, assign=True)
    return network.eval()


def _distinct(labels: tuple[str, ...], notes: list[str]) -> tuple[str, ...]:
    """Class names that differ; where a source gives two classes one name, each gets its number after it."""
    times = Counter(labels)
    if len(times) < len(labels):
        notes.append("classes of equal names are told apart by their numbers")
    return tuple(f"{label} ({i})" if times[label] > 1 else label for i, label in enumerate(labels))


def _require_finite(network: Network, reading: Reading) -> None:
    """Raises UserError where an image of four patches comes out as NaN or infinite, although each weight is finite."""
    config = network.architecture.backbone
    patches = getattr(config, "patch_size", (16, 16))
    sides = [min(2 * patch, side) for patch, side in zip(patches, config.image_size, strict=True)]
    pixels = torch.linspace(-1, 1, config.in_chans * math.prod(sides)).reshape(1, config.in_chans, *sides)
    with torch.no_grad():
        if finite(network(*network.example(pixels))).all():
            return
    found, state = reading.found, network.state_dict()
    sizes = {
        name: float(tensor.abs().max())
        for rule in reading.rules
        if state.keys() >= set(rule.ours)
        for name, tensor in zip(rule.theirs, rule.save(*(state[ours] for ours in rule.ours)), strict=True)
    }
    most = max(sizes, key=lambda name: sizes[name])
    raise UserError(
        f"{found.where}: the network's output is not finite, although its weights are; the largest ({sizes[most]:.1e}) "
        f"stands in tensor {found.named(most)}. The file is damaged or its training diverged"
    )


def _preprocess(reading: Reading, target: Architecture) -> Preprocess:
    size = target.backbone.image_size
    if reading.preprocess is None:
        return Preprocess(size, resize="squash", mean=_HALF, std=_HALF)
    return reading.preprocess if reading.preprocess.size == size else reading.preprocess.at(size)


def _precision(stored: Stored) -> list[str]:
    kinds = {str(t.dtype).removeprefix("torch.") for t in stored.contents.tensors.values() if t.is_floating_point()}
    return [f"converted to float32 from {', '.join(sorted(kinds - {'float32'}))}"] if kinds - {"float32"} else []


def _pair(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    return (size, size) if isinstance(size, int) else size


def _one_size(image_size: Any, img_size: Any) -> Any:
    """The image size, under our name or timm's. Raises UserError where both are given and differ."""
    if image_size is not None and img_size is not None and _pair(image_size) != _pair(img_size):
        raise UserError(f"image_size={printable(image_size)} and img_size={printable(img_size)} are one setting")
    size = image_size if img_size is None else img_size
    return tuple(size) if isinstance(size, list) else size
