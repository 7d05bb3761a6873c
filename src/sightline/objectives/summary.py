"""What is hidden has to be told from the features of the whole image too, so that these say what is in it."""

from collections.abc import MutableMapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sightline.layers.dense import Dense


class Summary(nn.Module):
    """The features of an image to an answer for each of its patches: a bottleneck beside an objective with masks.

    Where each hidden patch is told by its own token, nothing asks the pooled features to hold anything: those of an
    image without masks come of tokens that no loss has reached. BEiT v2 (arXiv 2208.06366, section 3.3) lets a small
    decoder tell hidden patches from the class token and early patch tokens; here it has the features f alone, as in
    RetroMAE (arXiv 2205.12035), and in place of attention a gate p_i for each patch i:

        answer_i = W₂ (gelu(W₁ f + b₁) ⊙ p_i) + b₂

    `values` are those of an answer, `hidden` the width of the gates.
    """

    def __init__(self, width: int, cells: int, values: int, hidden: int = 128):
        super().__init__()
        self.inner = Dense(width, hidden)
        self.gates = nn.Parameter(torch.empty(cells, hidden))
        self.answer = Dense(hidden, values)
        nn.init.normal_(self.gates)
        for part in (self.inner, self.answer):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b n values"]:
        return self.answer(F.gelu(self.inner(features))[:, None] * self.gates)


def joined(loss: Tensor, summary: Tensor, weight: float, figures: MutableMapping[str, Tensor]) -> Float[Tensor, ""]:
    """An objective's loss and, `weight` times, that of the summary; `baseline` among the figures grows as well."""
    figures["summary_loss"] = summary.detach()
    figures["baseline"] = figures["baseline"] * (1 + weight)
    return loss + weight * summary
