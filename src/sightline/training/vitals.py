"""What a doctor measures in a network at a few steps: how far its weights move, what its heads do, whether labels fit.

Nothing here draws a random number, touches a gradient or leaves a trace in the network.
"""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline.layers.attention import Attention
from sightline.network import Network
from sightline.training.optimizer import decays
from sightline.types import Batch

KERNELS = 12
"""Kernels whose movement is measured, at most: their copies need memory while an update is made."""

LOOKED_AT = 8
"""Images whose attention is looked at."""

QUERIES = 64
"""Queries of an image whose attention is looked at, evenly spaced, so that the cost grows with the tokens alone."""

FEW_KEYS = 4
"""Tokens below which attention to a single one is nothing special."""

ONE_TOKEN = 0.999
"""Weight on one token, at every query of every image, from which a head counts as collapsed: its softmax passes back
a thousandth of the gradient at most. Heads that rest on the class token or on a register stay below it somewhere."""

UNIFORM = 1e-3
"""Largest deviation of the weights from equal ones, as a share of them, up to which a head does not look at anything;
even queries and keys from weights with a deviation of 0.02 deviate by several times that."""

SILENT = 1e-3
"""Share of the median head's output below which a head counts as silent; healthy heads lie within a factor of 30."""

THUMBNAIL = 8
"""Side of the pictures by which labels are compared, in pixels."""

FEW_IMAGES = 16
"""Images of a batch among which it is no use to look for similar ones."""


class Head(NamedTuple):
    """A head that has stopped working: its layer's name, its number in the layer, from 0, and what it does."""

    layer: str
    number: int
    fault: str


def kernels(network: nn.Module) -> list[Tensor]:
    """Copies of some of the kernels that are taught, evenly spread over the network."""
    taught = [p for name, p in network.named_parameters() if p.requires_grad and decays(name, p)]
    return [p.detach().clone() for p in taught[:: -(-len(taught) // KERNELS) or 1]]


def update_ratio(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """How far the kernels moved, as a share of their own norm: the median over kernels; 0.0 where there are none.

    Kernels that were zero are left out, as is a classifier's before its first update.
    """
    norms = [(kernel.norm(), (other - kernel).norm()) for kernel, other in zip(before, after, strict=True)]
    if not norms:
        return 0.0
    size, moved = torch.tensor(norms, dtype=torch.float64).unbind(1)
    ratios = (moved / size)[size > 0]
    return float(ratios.median()) if len(ratios) else 0.0


def tokens_of(network: Network) -> tuple[int, int]:
    """Rows and columns of the tokens that enter the network's first layer, at the size that it was made for."""
    config = network.architecture.backbone
    weight = next(network.parameters())
    with _at_rest(network):
        first = network.backbone.stages(weight.new_zeros(1, config.in_chans, *config.image_size))[0]
    return first.grid


def still_heads(network: Network, batch: Batch) -> list[Head]:
    """The heads that have collapsed onto one token, look nowhere, or give nothing, in some images of a batch.

    The network computes in float32 and evaluation mode on its own device.
    """
    found: list[Head] = []
    outputs: list[tuple[str, Tensor]] = []

    def look(name: str, attention: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        query, bias = given["query"], given.get("bias")
        key = query if given.get("key") is None else given["key"]
        rows = torch.linspace(0, query.shape[1] - 1, min(query.shape[1], QUERIES), device=query.device).long()
        if bias is not None and bias.shape[-2] > 1:
            bias = bias[..., rows, :]
        weights = attention.weights(query[:, rows], key, given.get("value"), bias=bias)
        values = attention.project(query, given.get("key"), given.get("value"))[2]
        out = rearrange(attention.out.weight, "d (h k) -> h k d", h=attention.heads)
        outputs.append((name, torch.einsum("bhnm,bhmk,hkd->bhnd", weights, values, out).norm(dim=-1).mean(dim=(0, 2))))
        if weights.shape[-1] < FEW_KEYS:
            return
        sharpest = rearrange(weights.amax(dim=-1), "b h n -> h (b n)").amin(dim=-1)
        evenest = rearrange((weights * weights.shape[-1] - 1).abs(), "b h n m -> h (b n m)").amax(dim=-1)
        for head, (sharp, even) in enumerate(torch.stack([sharpest, evenest], dim=-1).tolist()):
            if sharp > ONE_TOKEN:
                found.append(Head(name, head, "collapsed"))
            elif bias is None and even < UNIFORM:
                found.append(Head(name, head, "uniform"))

    with _at_rest(network), ExitStack() as hooks:
        for name, module in network.backbone.named_modules():
            if isinstance(module, Attention):
                note = _naming(look, name)
                hooks.enter_context(module.register_forward_pre_hook(note, with_kwargs=True))
        part = batch.part(0, LOOKED_AT).to(next(network.parameters()).device)
        network.backbone(part.pixels, part.sizes)
    if outputs:
        usual = float(torch.cat([norms for _, norms in outputs]).median())
        for name, norms in outputs:
            found += [Head(name, i, "silent") for i, norm in enumerate(norms.tolist()) if norm <= SILENT * usual]
    return found


def _naming(look: Any, name: str) -> Any:
    return lambda attention, args, kwargs: look(name, attention, args, kwargs)


@contextmanager
def _at_rest(network: nn.Module) -> Generator[None]:
    """Evaluation mode without gradients; afterwards every module is as it was."""
    training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def spread_of(network: Network, batch: Batch) -> dict[str, float]:
    """How the features of a batch lie in the network as it is; see `spread`."""
    with _at_rest(network):
        return spread(network.embed(batch.pixels.to(next(network.parameters()).device), batch.sizes))


def spread(features: Float[Tensor, "n d"]) -> dict[str, float]:
    """How the features of images lie: `feature_std` and `effective_rank`.

    The first is the deviation of each coordinate of the features at unit length, averaged and times √d: 1 where they
    point evenly in all directions, 0 where all are the same (arXiv 2011.10566, section 4.1). The second is the
    exponential of the entropy of the singular values of the centred features, as shares of their sum: how many
    directions are in use (Roy and Vetterli 2007), at least 1. Features that are not finite count as all the same.
    """
    if not features.isfinite().all():
        return {"feature_std": 0.0, "effective_rank": 1.0}
    unit = F.normalize(features.double(), dim=1)
    deviation = float(unit.std(dim=0, correction=0).mean()) * unit.shape[1] ** 0.5
    values = torch.linalg.svdvals(unit - unit.mean(dim=0))
    total = float(values.sum())
    if not total > 1e-9 * len(unit) ** 0.5:
        return {"feature_std": deviation, "effective_rank": 1.0}
    shares = values / total
    return {"feature_std": deviation, "effective_rank": float(torch.special.entr(shares).sum().exp())}


class Likeness(NamedTuple):
    """How often the most similar other image has the same label.

    Images, those of them for which it has, how many chance would make it, and the variance of that.
    """

    images: float
    same: float
    expected: float
    variance: float


def likeness(pixels: Float[Tensor, "b c h w"], targets: Int[Tensor, " b"], index: Int[Tensor, " b"]) -> Likeness:
    """Whether images of a batch that look alike share a label, by the nearest neighbour of each thumbnail.

    As by chance where labels are shuffled; also where appearance says nothing, so that it convicts nothing by itself.
    Other views of the same image do not count, and pictures that are all the same tell nothing.
    """
    pictures = rearrange(F.adaptive_avg_pool2d(pixels.float(), THUMBNAIL), "b c h w -> b (c h w)")
    others = index[:, None] != index
    count = others.sum(dim=1).double()
    if len(targets) < FEW_IMAGES or int(count.min()) == 0 or float(pictures.std(dim=0).max()) < 1e-6:
        return Likeness(0.0, 0.0, 0.0, 0.0)
    alike = targets[:, None] == targets
    expected = (alike & others).sum(dim=1) / count
    nearest = torch.cdist(pictures, pictures).masked_fill(~others, torch.inf).argmin(dim=1)
    # An image can be the neighbour of several, so that answers are not independent: twice the binomial variance.
    variance = 2 * (expected * (1 - expected)).sum()
    same = alike[torch.arange(len(targets)), nearest].sum()
    return Likeness(float(len(targets)), float(same), float(expected.sum()), float(variance))
