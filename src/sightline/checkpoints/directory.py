"""Our own model directory: `config.json` says everything, `model.safetensors` holds the weights.

`config.json` is the commit mark: it comes last, carries the SHA-256 of the weights and is sealed with its own, so that
no flipped bit of either goes unnoticed.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from sightline.checkpoints.atomic import write_atomic
from sightline.checkpoints.files import read_sealed, safetensors_of
from sightline.checkpoints.hashes import hashes_of
from sightline.checkpoints.measure import refuse_other
from sightline.checkpoints.rules import Found, save
from sightline.checkpoints.scheme import Bundle, Content, Coverage, Reading, Request, Scheme, Stored
from sightline.checkpoints.sealed import SEAL, sealed
from sightline.errors import UserError, printable
from sightline.images.preprocess import Preprocess
from sightline.layout import Rule
from sightline.network import Architecture, Network
from sightline.schema import require
from sightline.texts import vocabularies
from sightline.texts.byte_pairs import Vocabulary

_VERSION = 2
_KEYS = {"format", "version", "task", "architecture", "labels", "preprocess", "versions"}
_VOCABULARY, _WORDS = "vocabulary", "vocabulary.json"
"""The key that holds the SHA-256 of the file with the vocabulary, and that file."""
_UNSEALED = 1
"""The version before seals and hashes; read as it is, and said."""
_MOST_CELLS, _FOR_EACH = 2**24, 4
"""Limit on what is computed from a configuration instead of stored: so many numbers, and so many for each stored."""


class Sightline(Scheme):
    """The names of the parameters themselves."""

    def recognises(self, stored: Stored) -> bool:
        if stored.config is not None:
            return stored.config.get("format") == "sightline"
        names = stored.contents.tensors
        return "head.classifier.weight" in names or any(name.startswith("backbone.encoder.blocks.") for name in names)

    def read(self, stored: Stored, request: Request) -> Reading:
        where, config = stored.where, stored.config
        if config is None:
            raise UserError(
                f"{where} is the weights file of a model directory; name the directory, with its config.json"
            )
        number = config.get("version")
        known = type(number) is int and number in (_VERSION, _UNSEALED)
        require(known, f"{where} has version {printable(number)}; {_VERSION} is read")
        keys = (_KEYS if number == _UNSEALED else _KEYS | {SEAL, "weights"}) | (config.keys() & {_VOCABULARY})
        for key in sorted(config.keys() ^ keys):
            state = "unknown" if key in config else "missing"
            raise UserError(f"{where}: '{printable(key)}' in config.json is {state}")
        architecture = Architecture.from_json(config["architecture"], f"{where}: architecture")
        refuse_other(architecture, request, where)
        require(config["task"] == architecture.task, f"{where}: 'task' is not that of the architecture")
        _refuse_excess(architecture, stored.contents.tensors, where)
        labels = _labels(config["labels"], architecture, where)
        preprocess = _preprocess(config["preprocess"], where)
        found = Found(where, stored.contents.tensors)
        old = ("written without hashes, so damage would go unnoticed; saving it anew adds them",)
        notes = old if number == _UNSEALED else ()
        vocabulary = _vocabulary(stored, architecture)
        return Reading(architecture, self.rules(architecture), found, preprocess, labels, notes, vocabulary)

    def rules(self, architecture: Architecture) -> list[Rule]:
        return _identity(architecture.shapes())

    def refusals(self, architecture: Architecture, out: Path) -> list[str]:
        return []

    def remarks(self, bundle: Bundle, out: Path) -> list[str]:
        return []

    def files(self, bundle: Bundle, tensors: Mapping[str, Tensor], out: Path) -> dict[Path, Content]:
        config = {
            "format": "sightline",
            "version": _VERSION,
            "task": bundle.task,
            "architecture": bundle.architecture.to_json(),
            "labels": list(bundle.labels),
            "preprocess": {**bundle.preprocess.to_json(), "fingerprint": bundle.preprocess.fingerprint},
            "versions": {name: version(name) for name in ("sightline", "torch")},
        }
        weights = out / "model.safetensors"
        words: dict[Path, Content] = {}
        if bundle.vocabulary is not None:
            text = sealed(vocabularies.to_json(bundle.vocabulary))
            words[out / _WORDS] = text
            config[_VOCABULARY] = hashlib.sha256(text).hexdigest()
        return {
            **words,
            weights: safetensors_of(tensors),
            out / "config.json": lambda path: _commit(path, {**config, "weights": hashes_of(weights)}),
        }


def write_model(
    directory: Path,
    network: Network,
    preprocess: Preprocess,
    labels: Sequence[str],
    extra: Mapping[str, bytes] | None = None,
    vocabulary: Vocabulary | None = None,
) -> Path:
    """Writes a model directory, `config.json` last, each file replacing an older one whole; returns the directory.

    `extra` are further files by their names (the model card, the run record), `vocabulary` that of a network that reads
    texts. Raises WorkError where the disk refuses.
    """
    bundle = Bundle(network, preprocess, tuple(labels), Coverage(()), vocabulary=vocabulary)
    tensors = save(_identity(network.state_dict()), network.state_dict())
    files = SCHEMES["sightline"].files(bundle, tensors, directory)
    first = {directory / name: content for name, content in (extra or {}).items()}
    for path, content in {**first, **files}.items():
        write_atomic(path, content)
    return directory


def _commit(path: Path, config: Mapping[str, Any]) -> None:
    path.write_bytes(sealed(config, indent=2))


def _identity(names: Iterable[str]) -> list[Rule]:
    return [Rule((name,), (name,)) for name in names]


def _vocabulary(stored: Stored, architecture: Architecture) -> Vocabulary | None:
    """What the network has learned to read, from the file beside its weights, if it reads texts."""
    assert stored.config is not None
    size, expected = getattr(architecture.head, "vocab_size", None), stored.config.get(_VOCABULARY)
    if expected is None:
        return None if size is None else vocabularies.load_vocabulary(None, size)
    require(size is not None and stored.folder is not None, f"{stored.where}: a vocabulary without a use")
    assert stored.folder is not None
    path = stored.folder / _WORDS
    data = read_sealed(path)
    same = hashlib.sha256(path.read_bytes()).hexdigest() == expected
    require(same, f"{printable(path)} is not the vocabulary that the model was saved with")
    vocabulary = vocabularies.from_json(data, printable(path))
    fits = f"{printable(path)} has {len(vocabulary)} tokens, and the network reads {size}"
    require(len(vocabulary) == size, fits)
    return vocabulary


def _preprocess(data: Any, where: str) -> Preprocess:
    require(isinstance(data, Mapping), f"{where}: 'preprocess' is not an object")
    settings = {key: value for key, value in data.items() if key != "fingerprint"}
    try:
        preprocess = Preprocess.from_json(settings)
    except UserError as fault:
        raise UserError(f"{where}: {fault}") from fault
    require(
        data.get("fingerprint") == preprocess.fingerprint,
        f"{where}: the fingerprint of 'preprocess' does not fit its settings; they were changed by hand",
    )
    return preprocess


def _labels(data: Any, architecture: Architecture, where: str) -> tuple[str, ...]:
    texts = isinstance(data, list) and all(isinstance(label, str) for label in data)
    require(texts and len(set(data)) == len(data), f"{where}: 'labels' is not a list of different names")
    count = getattr(architecture.head, "num_classes", len(data))
    require(len(data) == count, f"{where}: {len(data)} labels for {count} classes")
    return tuple(data)


def _refuse_excess(architecture: Architecture, tensors: Mapping[str, Tensor], where: str) -> None:
    """A configuration cannot make the reader work or allocate more than its weights account for."""
    count, depth = len(tensors), architecture.layers
    require(depth <= max(count, 1), f"{where}: {count} tensors are too few for {depth} layers")
    cells, most = architecture.computed, _MOST_CELLS + _FOR_EACH * sum(tensor.numel() for tensor in tensors.values())
    size = architecture.backbone.image_size
    require(cells <= most, f"{where}: an image of {size} pixels makes too many patches")


SCHEMES: Mapping[str, Scheme] = {"sightline": Sightline()}
