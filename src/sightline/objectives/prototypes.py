"""Assigning features to prototypes, as DINO and DINOv2 do: head, losses, and what keeps the features apart."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sightline.layers.dense import Dense, dense


class PrototypeHead(nn.Module):
    """Features to the logits of prototypes (arXiv 2104.14294, section 3.1 and appendix C).

    Three dense layers with GELU between, a bottleneck at unit length, and a last layer whose rows are scaled to length
    `scale`: fixed at one, or learned.
    """

    def __init__(self, width: int, prototypes: int, *, hidden: int, bottleneck: int, fixed_length: bool = True):
        super().__init__()
        self.mlp = nn.Sequential(
            Dense(width, hidden), nn.GELU(), Dense(hidden, hidden), nn.GELU(), Dense(hidden, bottleneck)
        )
        for part in self.mlp:
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)
        self.last = Dense(bottleneck, prototypes, bias=False)
        self.scale = nn.Parameter(torch.ones(prototypes, 1), requires_grad=not fixed_length)

    def forward(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        rows = F.normalize(self.last.weight, dim=1, eps=0.0) * self.scale
        return dense(F.normalize(self.mlp(features), dim=-1), rows)


def cross_entropy(
    teacher: Float[Tensor, "n k"], student: Float[Tensor, "n k"], temperature: float
) -> Float[Tensor, " n"]:
    """-Σ_k p_k log softmax(student / temperature)_k of each row, p the teacher's probabilities."""
    return -(teacher * F.log_softmax(student / temperature, dim=-1)).sum(dim=-1)


def crossed(teacher: Float[Tensor, "g b k"], student: Float[Tensor, "v b k"], temperature: float) -> Float[Tensor, ""]:
    """The mean of `cross_entropy` over all pairs of a teacher's view and another view of the student's.

    The student's first views are those that the teacher sees, in the same order (arXiv 2104.14294, equation 3).
    """
    losses = [
        cross_entropy(teacher[t], student[v], temperature).mean()
        for t in range(len(teacher))
        for v in range(len(student))
        if t != v
    ]
    return torch.stack(losses).mean()


@torch.no_grad()
def sharpened(logits: Float[Tensor, "*n k"], centre: Float[Tensor, " k"], temperature: float) -> Float[Tensor, "*n k"]:
    """The teacher's probabilities: softmax((logits - centre) / temperature).

    The centre keeps any one prototype from taking all, the temperature keeps all from being equal (arXiv 2104.14294,
    section 3.1).
    """
    return F.softmax((logits.float() - centre) / temperature, dim=-1)


@torch.no_grad()
def sinkhorn(logits: Float[Tensor, "n k"], temperature: float, iterations: int = 3) -> Float[Tensor, "n k"]:
    """Probabilities of each row such that all prototypes are about equally often meant (arXiv 2006.09882, section 3.1).

    Columns and rows of exp(logits / temperature) are scaled to equal sums in turn; rows, which sum to one, come last.
    """
    logs = (logits.double() / temperature).log_softmax(dim=-1)
    for _ in range(iterations):
        logs = logs - logs.logsumexp(dim=0, keepdim=True)
        logs = logs - logs.logsumexp(dim=1, keepdim=True)
    return logs.exp().float()


def koleo(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """-mean_i log min_j≠i |x_i - x_j| of features at unit length: it spreads them evenly (arXiv 1806.03198, eq. 4).

    Zero where there is a single one.
    """
    if len(features) < 2:
        return features.sum() * 0.0
    unit = F.normalize(features.float(), dim=-1)
    with torch.no_grad():
        alike = (unit @ unit.T).fill_diagonal_(-torch.inf)
        nearest = alike.argmax(dim=1)
    return -torch.log((unit - unit[nearest]).norm(dim=-1) + 1e-8).mean()
