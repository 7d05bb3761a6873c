"""The attention maps that a forward pass used, recomputed one at a time from what went into each layer."""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sightline.errors import UserError, WorkError
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


@contextmanager
def evaluating(network: nn.Module) -> Generator[None]:
    """Evaluation mode without gradients; afterwards the network is as it was, module by module."""
    training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def record(backbone: nn.Module, pixels: Float[Tensor, "b c h w"]) -> tuple[Tokens, list[Call]]:
    """What a backbone makes of the pixels, and every call of an `Attention` on the way, in order.

    Only the inputs of the layers are kept, which grow linearly with the number of tokens; the maps, which grow with
    its square, are computed when `Call.weights` is asked for one. Raises UserError for a backbone without attention.
    """
    calls: list[Call] = []

    def note(name: str) -> Callable[..., None]:
        def hook(attention: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append(Call(name, attention, args, kwargs))

        return hook

    with ExitStack() as hooks:
        for name, module in backbone.named_modules():
            if isinstance(module, Attention):
                hooks.enter_context(module.register_forward_pre_hook(note(name), with_kwargs=True))
        tokens = backbone(pixels)
    if not calls:
        raise UserError("this model has no attention to look at: only Transformers can be explained")
    return tokens, calls
