"""Relevance: what each token adds to a class by way of the attention, judged by gradients (arXiv 2012.09838).

A layer's map is weighted by the gradient of the class's logit with respect to it, negative parts are left out, and the
heads are averaged; the layers are then multiplied with the identity added to each, I + Ā (section 3.2, equations 13
and 14). In place of the layer-wise relevance that is multiplied by the gradient there stands the attention itself: the
rule that the authors give for attention of any kind in arXiv 2103.15679 (equations 5 and 6).

Neither maps nor gradients of maps are kept. The forward pass uses the fused kernel; on the way back, what is asked for
is the gradient by each layer's mixture of values, which the layer's own values turn into that by the map.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from threading import get_ident
from typing import Any, NamedTuple

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor, nn

from sightline.errors import UserError, WorkError
from sightline.explanation.grids import Seats, handed_down
from sightline.explanation.maps import Call, Layer, evaluating, laid_out, recording
from sightline.layers.attention import Attention
from sightline.types import Tokens


class Pull(NamedTuple):
    """A layer of attention, and the gradient of the class's logit by the mixture of values that its `out` reads."""

    layer: Layer
    gradient: Float[Tensor, "b n d"]

    def map(self) -> Float[Tensor, "1 n n"]:
        """The layer's part: attention times its gradient, negatives left out, the heads' mean, over all its tokens."""
        call = self.layer.call
        felt = (
            call.weights() * call.attention.weights_gradient(self.gradient, *call.args, **call.kwargs).float()
        ).relu()
        mean = reduce(felt, "b h n m -> b 1 n m", "mean")
        return mean[:, 0] if self.layer.plain else self.layer.laid(mean, shares=False)[:, 0]


def pulls(network: nn.Module, pixels: Float[Tensor, "1 c h w"], target: int | None = None) -> tuple[int, list[Pull]]:
    """The class, the most probable where `target` is None, and how it pulls at each layer of attention, in order.

    The network's head answers with one logit for each class (`classifies`). Parameters gain no gradients. Raises
    UserError where there is no such class, WorkError where a gradient is not finite.
    """
    backbone: Any = network.backbone
    head: Any = network.head
    mixtures: list[Tensor] = []
    with evaluating(network, gradients=True), recording(backbone) as calls, _outputs(backbone, mixtures):
        tokens: Tokens = backbone(pixels.detach().clone().requires_grad_())  # so that frozen networks will do as well
        logits = head(tokens)[0].float()
        index = chosen_class(logits, target)
        gradients = torch.autograd.grad(logits[index], mixtures, allow_unused=True) if mixtures else ()
    found = []
    size = (pixels.shape[-2], pixels.shape[-1])
    for call, mixture, gradient in zip(calls, mixtures, gradients, strict=True):
        gradient = torch.zeros_like(mixture) if gradient is None else gradient
        if not torch.isfinite(gradient).all():
            raise WorkError(f"the gradient at layer '{call.name}' is not finite: try fp32")
        args = tuple(map(_detached, call.args))
        still = Call(call.name, call.attention, args, {name: _detached(given) for name, given in call.kwargs.items()})
        found.append(Pull(laid_out(backbone, still, size), gradient.detach()))
    return index, found


def relevance(found: Sequence[Pull], asked: Float[Tensor, "1 1 m"], seats: Seats) -> Float[Tensor, "1 1 n"]:
    """What the tokens of the first layer add, in the eyes of `asked`, a row of weights of the last tokens on `seats`.

    Not negative, and in no unit: only comparisons within one image mean something. What `asked` itself puts on the
    patches (the product of the identities) is left out, so that nothing remains where no attention matters.
    """
    bare, gained = asked, torch.zeros_like(asked)  # apart, for the second may be far smaller than the first
    for pull in reversed(found):
        bare, gained = (handed_down(rows, seats, pull.layer.seats) for rows in (bare, gained))
        gained = gained + (bare + gained) @ pull.map()
        seats = pull.layer.seats
    return gained


def classifies(network: nn.Module) -> bool:
    """Whether a network answers with one logit for each class, so that a map may speak for a class."""
    head = getattr(network, "head", None)
    return getattr(head, "task", None) == "classify" and getattr(head, "classifier", None) is not None


def chosen_class(logits: Float[Tensor, " k"], target: int | None) -> int:
    """`target`, or the most probable class where it is None. Raises UserError where there is no such class."""
    if target is None:
        return int(logits.argmax())
    if not 0 <= target < len(logits):
        raise UserError(f"there is no class {target}: the model has {len(logits)}, counted from 0")
    return target


def _detached(given: Any) -> Any:
    return given.detach() if isinstance(given, Tensor) else given


def _outputs(backbone: nn.Module, mixtures: list[Tensor]) -> ExitStack:
    """While it is open, what the `out` of every attention reads is appended to `mixtures`."""
    mine = get_ident()

    def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if get_ident() == mine:
            mixtures.append(args[0])

    hooks = ExitStack()
    for module in backbone.modules():
        if isinstance(module, Attention):
            hooks.enter_context(module.out.register_forward_pre_hook(note))
    return hooks
