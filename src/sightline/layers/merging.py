"""Token merging: patches that resemble each other become one, and the network computes less (arXiv 2210.09461)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor


class Pairs(NamedTuple):
    """Which tokens of a set A go into which of a set B: `moved` of A into `into` of B, one by one; `kept` of A stay.

    The patches belong to A and B in turns, beginning with A, and are counted from 0 in each.
    """

    kept: Int[Tensor, "b k"]
    moved: Int[Tensor, "b r"]
    into: Int[Tensor, "b r"]


class Crowd(NamedTuple):
    """Tokens of which some stand for several: `sizes` says for how many, `source` where each first token went."""

    x: Float[Tensor, "b n d"]
    sizes: Float[Tensor, "b n"]
    source: Int[Tensor, "b first"]

    @classmethod
    def of(cls, x: Float[Tensor, "b n d"]) -> "Crowd":
        """Tokens that stand for themselves."""
        batch, n, _ = x.shape
        sizes = torch.ones(batch, n, device=x.device)
        return cls(x, sizes, repeat(torch.arange(n, device=x.device), "n -> b n", b=batch))

    def bias(self) -> Float[Tensor, "b 1 1 n"] | None:
        """What makes a token count as often in attention as it has members (section 3, proportional attention).

        None where each still stands for itself.
        """
        if self.sizes.shape == self.source.shape:
            return None
        return rearrange(self.sizes.log(), "b n -> b 1 1 n")

    def spread(self) -> Float[Tensor, "b first d"]:
        """The tokens in the first order, each as often as it has members."""
        return self.x.gather(1, repeat(self.source, "b n -> b n d", d=self.x.shape[-1]))


def match(keys: Float[Tensor, "b n k"], r: int, prefix: int) -> Pairs:
    """The `r` pairs of patches with the most alike keys by their cosine (section 3, bipartite soft matching).

    Every patch of A looks for its nearest in B, and the best `r` of these edges are taken; the first of equal ones. The
    `prefix` tokens before the patches have no part in it. At most half of the patches can go.
    """
    patches = F.normalize(keys[:, prefix:].float(), dim=-1)
    alike = patches[:, ::2] @ rearrange(patches[:, 1::2], "b n k -> b k n")
    best, nearest = alike.max(dim=-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    moved, kept = order[:, :r], order[:, r:].sort(dim=-1).values
    return Pairs(kept, moved, nearest.gather(1, moved))


def merge(crowd: Crowd, keys: Float[Tensor, "b n k"], r: int, prefix: int) -> Crowd:
    """Merges `r` patches, or half of them where that is less; a merged token is the mean of all its members."""
    x, sizes, source = crowd
    r = min(r, (x.shape[1] - prefix) // 2)
    if r == 0:
        return crowd
    kept, moved, into = match(keys, r, prefix)
    a, b = x[:, prefix::2], x[:, prefix + 1 :: 2]
    a_sizes, b_sizes = sizes[:, prefix::2], sizes[:, prefix + 1 :: 2]
    width = x.shape[-1]

    def rows(index: Tensor) -> Tensor:
        return repeat(index, "b n -> b n d", d=width)

    extra = a_sizes.gather(1, moved)
    total = b_sizes.scatter_add(1, into, extra)
    weighted = (b * b_sizes[..., None]).scatter_add(1, rows(into), a.gather(1, rows(moved)) * extra[..., None])
    joined = torch.where((total == b_sizes)[..., None], b, weighted / total[..., None])  # the untouched to the bit
    merged = torch.cat([x[:, :prefix], a.gather(1, rows(kept)), joined.to(x.dtype)], dim=1)
    counts = torch.cat([sizes[:, :prefix], a_sizes.gather(1, kept), total], dim=1)

    second = prefix + kept.shape[1]  # where those of B begin, after those of A that stay
    places = torch.arange(merged.shape[1], device=x.device)
    went = torch.empty(x.shape[:2], dtype=torch.long, device=x.device)
    went[:, :prefix] = places[:prefix]
    of_a = torch.empty_like(a_sizes, dtype=torch.long).scatter(1, moved, second + into)
    went[:, prefix::2] = of_a.scatter(1, kept, places[prefix:second].expand_as(kept))
    went[:, prefix + 1 :: 2] = places[second:]
    return Crowd(merged, counts, went.gather(1, source))
