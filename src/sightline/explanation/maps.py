"""The attention maps that a forward pass used, recomputed one at a time from what went into each layer."""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sightline.backbones.backbone import Backbone
from sightline.errors import UserError, WorkError
from sightline.explanation.grids import Grid, Seats
from sightline.layers.attention import Attention
from sightline.types import Tokens


class Call(NamedTuple):
    """One use of an `Attention` in a forward pass: the module's name and what went into it."""

    name: str
    attention: Attention
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the map (batch, heads, queries, keys), known before it is computed."""
        given = dict(zip(("query", "key", "value"), self.args, strict=False)) | self.kwargs
        query, key = given["query"], given.get("key")
        return query.shape[0], self.attention.heads, query.shape[1], (query if key is None else key).shape[1]

    @property
    def crosses(self) -> bool:
        """Whether other tokens than those that ask are attended to: more, fewer, or not the same tensor."""
        given = dict(zip(("query", "key", "value"), self.args, strict=False)) | self.kwargs
        key = given.get("key")
        return key is not None and key is not given["query"]

    def weights(self) -> Float[Tensor, "b h n m"]:
        """The map [batch, heads, queries, keys] in float32; every row sums to 1.

        Raises WorkError where it is not finite, as happens with damaged weights or in too low a precision.
        """
        weights = self.attention.weights(*self.args, **self.kwargs)
        if not torch.isfinite(weights).all():
            raise WorkError(
                f"the attention of layer '{self.name}' is not finite: its weights are damaged, or the precision is too "
                "low for them (try fp32)"
            )
        tolerance = torch.finfo(weights.dtype).eps ** 0.5
        weights = weights.float()
        assert ((weights.sum(dim=-1) - 1).abs() <= tolerance).all(), f"rows of '{self.name}' do not sum to 1"
        return weights


class Layer(NamedTuple):
    """One call of an `Attention` as a layer over all its tokens, whose places are `seats`.

    `plain` says that the call's map is already the layer's; `asking` that its patches ask, not prefix tokens alone.
    """

    backbone: Backbone
    call: Call
    size: Grid
    seats: Seats
    plain: bool
    asking: bool

    @property
    def heads(self) -> int:
        """The number of heads."""
        return self.call.shape[1]

    def maps(self) -> Iterator[Float[Tensor, "1 1 n n"]]:
        """The map of each head over all tokens in turn, in float32; every row sums to 1.

        One at a time: laid side by side, the windows of a fine grid are many times larger than each for itself.
        """
        weights = self.call.weights()
        for head in range(self.heads):
            own = weights[:, head : head + 1]
            yield own if self.plain else self.laid(own)

    def laid(self, maps: Float[Tensor, "b h q m"], *, shares: bool = True) -> Float[Tensor, "1 h n n"]:
        """Maps of the call laid out over all tokens of the layer (`Backbone.whole`)."""
        return self.backbone.whole(self.call.name, maps, self.size, shares=shares)[0]


def laid_out(backbone: Backbone, call: Call, size: Grid) -> Layer:
    """A call as a layer of the backbone for an image of `size` (height, width), of which no map is computed yet.

    Raises UserError where the backbone does not give its map over all tokens of the image.
    """
    shape = torch.empty(call.shape, device="meta")
    whole, grid = backbone.whole(call.name, shape, size)
    seats = Seats(whole.shape[-1] - grid[0] * grid[1], grid)
    if whole.shape[0] != 1 or whole.shape[-2] != whole.shape[-1] or seats.prefix < 0:
        raise UserError(
            f"layer '{call.name}' does not attend over the whole image at once, and '{type(backbone).__name__}.whole' "
            "does not say how its maps lie side by side: rollout is not defined"
        )
    batch, _, queries, _ = call.shape
    return Layer(backbone, call, size, seats, whole is shape, batch * queries >= grid[0] * grid[1])


@contextmanager
def evaluating(network: nn.Module, *, gradients: bool = False) -> Generator[None]:
    """Evaluation mode, without gradients unless asked for; afterwards the network is as it was, module by module."""
    training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.enable_grad() if gradients else torch.inference_mode():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def recording(backbone: nn.Module) -> Generator[list[Call]]:
    """While it is open, every call of an `Attention` of the backbone in this thread is appended to the list, in order.

    Only the inputs of the layers are kept, which grow linearly with the number of tokens; the maps, which grow with
    its square, are computed when `Call.weights` is asked for one. A backbone without attention has no calls.
    """
    calls: list[Call] = []
    mine = get_ident()  # a server may answer others by the same network

    def note(name: str) -> Callable[..., None]:
        def hook(attention: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if get_ident() == mine:
                calls.append(Call(name, attention, args, kwargs))

        return hook

    with ExitStack() as hooks:
        for name, module in backbone.named_modules():
            if isinstance(module, Attention):
                hooks.enter_context(module.register_forward_pre_hook(note(name), with_kwargs=True))
        yield calls


def record(backbone: nn.Module, pixels: Float[Tensor, "b c h w"]) -> tuple[Tokens, list[Call]]:
    """What a backbone makes of the pixels, and every call of an `Attention` on the way (`recording`)."""
    with recording(backbone) as calls:
        tokens = backbone(pixels)
    return tokens, calls


def attention_layers(backbone: nn.Module) -> int:
    """The number of a backbone's layers of attention."""
    return sum(isinstance(module, Attention) for module in backbone.modules())
