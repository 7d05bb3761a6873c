"""A backbone and its head: what `create_model` makes, and how it is written down."""

import copy
import math
import os
from collections.abc import Container, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from sightline.errors import UserError, printable, suggest
from sightline.registry import find, variant, variants
from sightline.schema import from_json, require, to_json
from sightline.types import Area, Tokens

_LARGEST, _DEEPEST, _MOST_TOKENS = 2**20, 2**10, 2**20


@dataclass(frozen=True)
class Architecture:
    """A network as plain data: enough to build it anywhere, without its weights.

    `family` and `task` are keys of the `FAMILIES` and `HEADS` tables, `backbone` and `head` their settings. `name` is
    the row it came from, for people.
    """

    name: str
    family: str
    backbone: Any
    task: str
    head: Any

    def __post_init__(self) -> None:
        """Refuses sizes far beyond every published network, before anything of that size is laid out."""
        for part in (self.backbone, self.head):
            for name, value in _named(part):
                limit = _DEEPEST if _of_layers(name) else _LARGEST
                for number in _numbers(value):
                    sane = abs(number) <= limit
                    require(sane, f"{name} {printable(value, 60)} is larger than any network's (at most {limit})")
        require(self.layers <= _DEEPEST, f"{self.layers} layers are more than any network's (at most {_DEEPEST})")
        family, size = find("backbones", "FAMILIES", self.family, "family"), self.backbone.image_size
        with torch.device("meta"), _NothingToFill():
            tokens = family.tokens(self.backbone)
        require(
            tokens <= _MOST_TOKENS,
            f"an image of {size[0]}×{size[1]} pixels makes too many patches: {tokens}, and {_MOST_TOKENS} are possible",
        )

    @property
    def layers(self) -> int:
        """How many layers the settings speak of, whatever they call them: those of each stage together."""
        named = (pair for part in (self.backbone, self.head) for pair in _named(part))
        return sum(max(n, 0) for name, value in named if _of_layers(name) for n in _numbers(value))

    @property
    def computed(self) -> int:
        """How many numbers the network holds that follow from its settings, so that no checkpoint has them."""
        family = find("backbones", "FAMILIES", self.family, "family")
        with torch.device("meta"), _NothingToFill():
            return family.computed(self.backbone)

    def build(self) -> "Network":
        """The network with random weights. Raises UserError where they would not fit into this machine's memory."""
        needed = 4 * sum(math.prod(shape) for shape in self.shapes().values())
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        require(needed <= memory, f"the weights need {needed:,} bytes, and this machine has {memory:,}")
        return _network(self)

    def lay_out(self) -> "Network":
        """The network without memory for its weights, to be counted or given weights; what is not learned is real.

        Raises UserError for sizes that no number of bytes could hold.
        """
        try:
            with torch.device("meta"), _NothingToFill():
                return _network(self)
        except RuntimeError as fault:
            raise UserError(
                f"the settings of {printable(self.name)} make tensors that are too large: {fault}"
            ) from fault

    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every tensor of a checkpoint, by name."""
        return {name: tensor.shape for name, tensor in self.lay_out().state_dict().items()}

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `from_json` reads back to an equal architecture."""
        return to_json(self)

    @classmethod
    def from_json(cls, data: Any, where: str = "architecture") -> "Architecture":
        """Reads what `to_json` wrote. Raises UserError that names `where` and the setting at fault."""
        require(isinstance(data, Mapping), f"{where}: expected an object")
        missing = {"name", "family", "backbone", "task", "head"} ^ set(data)
        require(not missing, f"{where}: missing or unknown: {', '.join(sorted(map(str, missing)))}")
        require(all(isinstance(data[k], str) for k in ("name", "family", "task")), f"{where}: names must be text")
        backbone = find("backbones", "FAMILIES", data["family"], f"family in {where}")
        head = find("heads", "HEADS", data["task"], f"task in {where}")
        return cls(
            data["name"],
            data["family"],
            from_json(backbone.Config, data["backbone"], f"{where}: backbone"),
            data["task"],
            from_json(head.Config, data["head"], f"{where}: head"),
        )


def _named(part: Any) -> Iterator[tuple[str, Any]]:
    """The settings of a backbone or head, and those of its parts among them."""
    for name, value in vars(part).items():
        yield from value.items() if isinstance(value, Mapping) else ((name, value),)


def _of_layers(name: str) -> bool:
    """Whether a setting counts layers, of the network or of each of its stages."""
    return name.startswith("depth") or name.endswith("_depth") or name == "layers"


def _numbers(value: Any) -> list[int]:
    return [number for number in (value if isinstance(value, tuple | list) else (value,)) if isinstance(number, int)]


class _NothingToFill(TorchFunctionMode):
    """Passes over initialisation on the meta device, where the framework would be seconds long at it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        in_place = func.__name__.endswith("_") and not func.__name__.endswith("__")
        return target if in_place and isinstance(target, Tensor) and target.is_meta else func(*args, **kwargs)


class Network(nn.Module):
    """A backbone and a head: pixels [b, 3, h, w] to the task's output.

    Images of any height and width pass, whatever `image_size` it was made for. `sizes` [b, 2] gives each image's
    (height, width) in a batch of unlike sizes, padded below and to the right.
    """

    def __init__(self, architecture: Architecture):
        super().__init__()
        self.architecture = architecture
        self.backbone = find("backbones", "FAMILIES", architecture.family, "family")(architecture.backbone)
        self.head = find("heads", "HEADS", architecture.task, "task")(architecture.head, self.backbone.width)

    def forward(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> Any:
        """What the head makes of the tokens: a tensor or a tuple of tensors, each with the batch as its first axis."""
        tokens = self.backbone(pixels, sizes)
        return self.head(tokens, self.area(tokens, (pixels.shape[-2], pixels.shape[-1]), sizes))

    def area(self, tokens: Tokens, size: tuple[int, int], sizes: Int[Tensor, "b 2"] | None = None) -> Area:
        """What tokens were made of: pyramids take two, four, … of their first cells together."""
        first = getattr(self.architecture.backbone, "patch_size", (1, 1))
        steps = []
        for length, cells, step in zip(size, tokens.grid, first, strict=True):
            while -(-length // step) > cells and step < length:
                step *= 2
            steps.append(step)
        return Area(size, (steps[0], steps[1]), sizes)

    def embed(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> Float[Tensor, "b d"]:
        """The feature vector that the head's last layer reads, [batch, width]."""
        return self.head.features(self.backbone(pixels, sizes))

    def merged(self, r: int) -> "Network":
        """The same network with `r` patches merged in every layer (arXiv 2210.09461); the weights are the same tensors.

        0 merges none. Raises UserError for families in which tokens cannot be merged.
        """
        memo: dict[int, Any] = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        other = copy.deepcopy(self, memo)
        other.backbone.merge(r)
        return other

    def example(self, pixels: Float[Tensor, "b c h w"]) -> tuple[Tensor, ...]:
        """Arguments for a call that uses every part of the network: these pixels, and what else there is to give."""
        return (pixels,)


class ImageTextNetwork(Network):
    """A backbone for images and a head with a tower for texts: pixels and token ids to how well they fit.

    Without ids, the images' places in the common space come back.
    """

    def forward(  # ty: ignore[incompatible-method-override]  (as CLIP's users call it)
        self,
        pixels: Float[Tensor, "b c h w"],
        ids: Int[Tensor, "k n"] | None = None,
        sizes: Int[Tensor, "b 2"] | None = None,
    ) -> Any:
        images = self.head(self.backbone(pixels, sizes))
        return images if ids is None else self.head.match(images, self.head.encode_text(ids))

    def encode_image(
        self,
        pixels: Float[Tensor, "b c h w"],
        sizes: Int[Tensor, "b 2"] | None = None,
        *,
        normalize: bool = False,
    ) -> Float[Tensor, "b d"]:
        """Each image's place in the common space; with `normalize`, at a distance of 1 from its origin."""
        images = self.embed(pixels, sizes)
        return functional.normalize(images, dim=-1) if normalize else images

    def encode_text(self, ids: Int[Tensor, "k n"], *, normalize: bool = False) -> Float[Tensor, "k d"]:
        """Each text's place there."""
        texts = self.head.encode_text(ids)
        return functional.normalize(texts, dim=-1) if normalize else texts

    def example(self, pixels: Float[Tensor, "b c h w"]) -> tuple[Tensor, ...]:
        config = self.head.config
        ids = torch.arange(len(pixels) * config.context_length, device=pixels.device) % config.vocab_size
        ids = ids.reshape(len(pixels), -1)
        ids[:, -1] = config.vocab_size - 1 if config.eos_token_id is None else config.eos_token_id
        return pixels, ids


def _network(architecture: Architecture) -> Network:
    reads_texts = hasattr(find("heads", "HEADS", architecture.task, "task"), "encode_text")
    return (ImageTextNetwork if reads_texts else Network)(architecture)


def describe(
    name: str,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    *,
    task: str | None = None,
    **overrides: Any,
) -> Architecture:
    """The architecture of a registered model with settings of the user's in place of its own.

    With another `task` than the one that the model was published for, its head is that task's usual one.
    """
    name = name.replace("/", "-")  # as OpenAI calls its networks, and open_clip does not
    row = variant(name)
    backbone = find("backbones", "FAMILIES", row.family, "family")
    asked = row.task if task is None else task
    head = find("heads", "HEADS", asked, "task")
    own = row.head if asked == row.task else {}
    given = {"num_classes": num_classes, "image_size": image_size, **overrides}
    given = {key: value for key, value in given.items() if value is not None}
    known = {*backbone.Config.__dataclass_fields__, *head.Config.__dataclass_fields__}
    usual = {"num_classes": row.num_classes} if "num_classes" in known else {}
    settings, rest = backbone.split({**row.settings, **own, **usual, **given})
    if "num_classes" not in known and rest.get("num_classes") == 0:
        del rest["num_classes"]  # which is what a head without classes has
    for key in rest:
        if key not in known:
            raise UserError(f"model '{name}' has no setting '{key}'.{suggest(key, known)}")
    where = f"model '{name}'"
    return Architecture(
        name, row.family, from_json(backbone.Config, settings, where), asked, from_json(head.Config, rest, where)
    )


def create_model(
    name: str,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    *,
    task: str | None = None,
    **overrides: Any,
) -> Network:
    """A network by its name, with random weights: pixels [b, 3, h, w] to logits [b, num_classes].

    `task` is a key of `HEADS` (classify, detect, segment, …); left out, it is the one that the model was published for.

    Names are timm's (`list_models` has them all). `num_classes=0` leaves the classifier out; `image_size` is in
    pixels, one number or (height, width). Other settings go by the names of the family's configuration (`patch_size`,
    `embed_dim`, `depth`, `num_heads`, `drop_path_rate`, `global_pool`, …). Raises UserError for unknown names.
    """
    return describe(name, num_classes, image_size, task=task, **overrides).build()


def list_models(pattern: str = "*") -> list[str]:
    """The names of all registered models that match a shell pattern such as `vit_*_224`."""
    return list(variants(pattern))


def recompute(parts: nn.Module, again: bool = True) -> None:
    """Lets whatever has layers compute their activations again in the backward pass instead of keeping them."""
    for part in parts.modules():
        setattr(part, "checkpointing", again)  # noqa: B010 (whoever has layers to recompute reads it)


def count_parameters(network: nn.Module) -> int:
    """The number of learned values."""
    return sum(math.prod(p.shape) for p in network.parameters())


def count_macs(architecture: Architecture) -> int:
    """Multiply-adds of one image at the architecture's own size, counted by the framework without computing them."""
    from torch.utils.flop_counter import FlopCounterMode

    network = architecture.lay_out().to("meta").eval()
    height, width = architecture.backbone.image_size
    pixels = torch.empty(1, architecture.backbone.in_chans, height, width, device="meta")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), _Remembering(), counter, _Remembering(counter.flop_registry):
        network(*network.example(pixels))
    return counter.get_total_flops() // 2


class _Remembering(TorchDispatchMode):
    """Asks the framework only once what comes of an operation on tensors of certain shapes, which takes it a while.

    It acts where all tensors are without memory: what it gives again is nothing but a shape.
    Operations that `counted` has are passed on to whoever counts them.
    """

    known: ClassVar[dict[Hashable, Any]] = {}

    def __init__(self, counted: Container[Any] = ()):
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in self.counted or func._schema.is_mutable:
            return func(*args, **kwargs)
        try:
            call = func, _shape(args), _shape(tuple(kwargs.items()))
        except _ValuedError:
            return func(*args, **kwargs)
        if (known := self.known.get(call)) is not None:
            # Another handle of the same nothing each time, because the framework marks which tensor is a view of which.
            with no_dispatch():
                return tuple(one.data for one in known) if isinstance(known, tuple) else known.data
        made = func(*args, **kwargs)
        if all(isinstance(one, Tensor) and one.is_meta for one in (made if isinstance(made, tuple) else (made,))):
            self.known[call] = made
        return made


class _ValuedError(Exception):
    """The values of a tensor count, not its shape alone."""


def _shape(value: Any) -> Hashable:
    """What the shapes that an operation leads to depend on, of one of its arguments."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise _ValuedError
        return Tensor, value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple, *map(_shape, value)
    return type(value), value
