"""What the queries of a head give to the patches: object queries of a decoder, or any tokens that read an image."""

from typing import Any, NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sightline.explanation.maps import evaluating, recording
from sightline.types import Tokens


class Reading(NamedTuple):
    """One layer of a head in which queries read the patches: what each head gives to every patch, by query.

    `name` is that of the layer in the head. A query's values sum to 1 in each head.
    """

    name: str
    maps: Float[np.ndarray, "heads queries rows columns"]


def readings(network: nn.Module, pixels: Float[Tensor, "3 h w"]) -> list[Reading]:
    """The cross-attention of a network's head over the patches of one image, layer by layer.

    A layer counts where its keys are as many as the patches and its queries are other tokens (arXiv 2005.12872, section
    3.2 and figure 10). Empty for heads that pool. Raises WorkError where the attention is not finite.
    """
    backbone: Any = network.backbone
    head: Any = network.head
    first = next(network.parameters())
    made: list[Tokens] = []
    kept = backbone.register_forward_hook(lambda _module, _args, tokens: made.append(tokens))
    try:
        with evaluating(network), recording(head) as calls:
            network(pixels[None].to(first.device, first.dtype))
            rows, columns = made[-1].grid
            return [
                Reading(call.name, rearrange(call.weights()[0], "h q (r c) -> h q r c", r=rows).cpu().numpy())
                for call in calls
                if call.crosses and call.shape[3] == rows * columns
            ]
    finally:
        kept.remove()
