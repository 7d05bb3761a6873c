"""How another library stores a network: a table of names that is read both ways, and what shapes and settings mean."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sightline.errors import UserError, printable

Convert = Callable[..., tuple[Tensor, ...]]
"""Tensors in the order of one side of a rule to those of the other; shapes alone decide what it does."""


def unchanged(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as they are."""
    return tensors


@dataclass(frozen=True)
class Rule:
    """Which of our parameters correspond to which of their tensors, and how each side becomes the other.

    `load` takes theirs and gives ours, `save` the reverse; both only move numbers and never change one. `save` also
    runs on tensors without memory, to say which shapes are expected on disk.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    load: Convert = unchanged
    save: Convert = unchanged


def same(ours: str, theirs: str, bias: bool = True) -> list[Rule]:
    """Weight and bias of a layer that both sides store alike."""
    return [Rule((f"{ours}.{part}",), (f"{theirs}.{part}",)) for part in ("weight", "bias")[: 1 + bias]]


def one(ours: str, theirs: str) -> Rule:
    """One tensor that both sides store alike."""
    return Rule((ours,), (theirs,))


def transposed(*matrices: Tensor) -> tuple[Tensor, ...]:
    """Each matrix with rows and columns exchanged."""
    return tuple(matrix.T for matrix in matrices)


def fused(ours: str, *theirs: str, bias: bool = True) -> list[Rule]:
    """A layer of ours whose rows are those of several layers of theirs, one after the other."""
    return [
        Rule((f"{ours}.{part}",), tuple(f"{name}.{part}" for name in theirs), _joined, _parted(len(theirs)))
        for part in ("weight", "bias")[: 1 + bias]
    ]


def _joined(*parts: Tensor) -> tuple[Tensor]:
    return (torch.cat(parts),)


def _parted(count: int) -> Convert:
    return lambda whole: whole.chunk(count)


class Shapes(Mapping[str, tuple[int, ...]]):
    """The shapes of the tensors in a file, by the names that rules use. `named` gives a name as it stands on disk.

    `consulted` has the names whose shapes settings were read from.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], where: str, named: Callable[[str], str] = "'{}'".format):
        self.shapes, self.where, self.named = shapes, where, named
        self.consulted: dict[str, None] = {}  # in order

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def of(self, name: str, axes: int) -> tuple[int, ...]:
        """The shape of a tensor that has to be there. Raises UserError where it is missing or has other axes."""
        self.consulted[name] = None
        if name not in self.shapes:
            raise UserError(f"{self.where}: tensor {self.named(name)} is missing")
        if len(self.shapes[name]) != axes:
            shape = list(self.shapes[name])
            raise UserError(f"{self.where}: tensor {self.named(name)} has shape {shape}; {axes} axes are expected")
        return self.shapes[name]

    def count(self, pattern: str) -> int:
        r"""How many different numbers the first group of a pattern such as `blocks\.(\d+)\.` finds in the names."""
        return len({int(match[1]) for name in self.shapes if (match := re.match(pattern, name)) and len(match[1]) < 7})

    def outputs(self, name: str) -> int:
        """How many outputs a layer with a bias of this name has, by its weights or else by the bias; 0 without both.

        One of the two is enough, so that the other is found missing or misshapen.
        """
        weight = self.shapes.get(re.sub(r"\bbias$", "weight", name), ())
        kernel = self.shapes.get(re.sub(r"\bbias$", "kernel", name), ())
        found = weight[:1] if len(weight) > 1 else kernel[-1:] if len(kernel) > 1 else self.shapes.get(name, ())
        return found[0] if len(found) == 1 else 0


class Layout(ABC):
    """How one library, or one original repository, stores networks of one kind.

    `libraries` are the schemes that use it: `timm`, `transformers`, `torchvision`, `google`, `big_vision`, `original`.
    `family` is a key of `FAMILIES`. Settings are by our names, of backbone and head together, as `describe` takes them.
    """

    libraries: ClassVar[tuple[str, ...]]
    family: ClassVar[str]
    task: ClassVar[str] = "classify"
    """The task of the networks that it stores, a key of `HEADS`."""

    dropped: ClassVar[str] = r"$^"
    """Which tensors may lie in such a file although nothing is computed with them, as a pattern of whole names."""

    former: ClassVar[Mapping[str, str]] = {}
    """Names that some of its files still have, as patterns, and what `current` puts in the place of what they match."""

    identity: ClassVar[tuple[str, ...]] = ("embed_dim", "depth")
    """Settings by which a registered network is known again, from the shapes alone."""

    untold: ClassVar[tuple[str, ...]] = ()
    """Settings that no shape tells; they are those of the registered networks of equal identity."""

    habits: ClassVar[tuple[str, ...]] = ("activation", "norm_eps", "position_resample")
    """Settings in which this source computes as `measure` says, whatever a registered name says of them."""

    @abstractmethod
    def recognises(self, shapes: Shapes) -> bool:
        """Whether a file with these tensors is of this kind; at most one layout of a library may say so."""

    @abstractmethod
    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        """The settings that the shapes tell, and those that hold for every file of this kind (norm eps, …).

        `image_size` is what is known of the size it was made for. The key `patches`, where given, is the number of
        rows of a table of positions that belong to patches: the image size follows from it.
        """

    def settle(self, settings: dict[str, Any]) -> dict[str, Any]:
        """All settings that are known of a network, with those that follow from others."""
        return settings

    @abstractmethod
    def rules(self, backbone: Any, head: Any) -> list[Rule]:
        """The table for a network with these configurations, complete: each of our parameters stands in one rule."""

    @abstractmethod
    def refusals(self, backbone: Any, head: Any) -> list[str]:
        """Settings that this layout cannot express, each as a phrase; empty where it can."""

    def current(self, name: str) -> str:
        """A tensor's name as the rules have it."""
        for pattern, now in self.former.items():
            name = re.sub(pattern, now, name)
        return name

    def unused(self, shapes: Shapes) -> list[str]:
        """The names in a file that nothing is computed with: those that `dropped` matches, unless there is more."""
        return [name for name in shapes if re.fullmatch(self.dropped, name)]

    def extras(self, backbone: Any, head: Any) -> dict[str, Tensor]:
        """What the other library wants to find in a file although it is no weight of ours (counters, indices)."""
        return {}

    def remarks(self, backbone: Any, head: Any) -> list[str]:
        """What is not carried over although the outputs are the same, for the report."""
        return []


class TimmLayout(Layout):
    """A layout of timm, whose directories name an architecture and the arguments of its model class."""

    libraries = ("timm",)

    same: ClassVar[tuple[str, ...]] = ()
    """Arguments whose names and meanings are the same here."""

    at_rest: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Further arguments, and the values at which they change nothing."""

    classifier: ClassVar[str] = "head"
    first_conv: ClassVar[str] = "patch_embed.proj"
    fixed_input_size: ClassVar[bool] = True
    """Whether timm's model class has to be told an image size."""

    def told(self, arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The settings that `model_args` name. Raises UserError for an argument that has no counterpart.

        `img_size` and `num_classes` are not among them; `global_pool` is, wherever the configuration says it.
        """
        told = {}
        for name, value in arguments.items():
            if value is None:
                continue
            if name in self.same or name == "global_pool":
                told[name] = tuple(value) if isinstance(value, list) else value
            elif name not in self.at_rest or value not in self.at_rest[name]:
                raise UserError(
                    f"{where}: the model argument {printable(name)}={printable(repr(value))} has no counterpart here"
                )
        return told

    def unwritten(self, backbone: Any, head: Any) -> list[str]:
        """What a bare file can be used with, although `config.json` has no word for it, as refusals of a directory."""
        return []

    def by_hand(self, backbone: Any, head: Any) -> list[str]:
        """What whoever builds timm's model for a bare file has to tell it, for the report."""
        return []

    @abstractmethod
    def arguments(self, backbone: Any, head: Any) -> tuple[str, dict[str, Any]]:
        """A name that timm knows, and the arguments that make its model this network whatever that name implies."""


class TransformersLayout(Layout):
    """A layout of transformers, under the names that files on the hub have, without the prefix of the base model.

    `model_type` is the one of `config.json`; `base` the prefix ("vit") that all names but those that begin with one of
    `outside` carry in a model with a head; `with_head` and `bare` are the names of the two model classes.
    """

    libraries = ("transformers",)

    model_type: ClassVar[str]
    base: ClassVar[str]
    outside: ClassVar[tuple[str, ...]] = ("classifier.",)
    with_head: ClassVar[str]
    bare: ClassVar[str]
    also: ClassVar[tuple[str, ...]] = ()
    """Further model classes whose files are of this layout."""
    headless: ClassVar[tuple[str, ...]] = ()
    """Those of the classes, besides `bare`, whose output layer is none for classes and is left out."""

    classes_of: ClassVar[str | None] = None
    """The bias with a number for each class and one for none; None where all outputs are classes."""

    defaults: ClassVar[Mapping[str, Any]]
    """What transformers takes where `config.json` is silent; with `ignored`, all the keys that may stand there."""

    ignored: ClassVar[tuple[str, ...]] = ()
    """Keys of `config.json` that change no output, beside those that every model of transformers has."""

    def kind(self, backbone: Any, head: Any) -> str:
        """The model class that a network becomes."""
        return self.with_head if head.num_classes else self.bare

    def opened(self, backbone: Any, head: Any) -> dict[str, Any]:
        """What `from_pretrained` has to be told to build this network."""
        return {}

    def ask(self, model: Any, *inputs: Tensor) -> Any:
        """What transformers' model answers to what our network takes."""
        return model(*inputs)

    def output(self, answer: Any, backbone: Any, head: Any) -> Any:
        """Of what transformers' model answers, that which our network answers."""
        return answer.logits if head.num_classes else answer.last_hidden_state[:, 0]

    @abstractmethod
    def told(self, config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        """The settings that a configuration names; `config` has a value for every key of `defaults`.

        `image_size` is among them, `num_classes` is not. Raises UserError for values without a counterpart.
        """

    @abstractmethod
    def config(self, backbone: Any, head: Any) -> dict[str, Any]:
        """The part of `config.json` that says how the network computes, without `model_type` and class names."""
