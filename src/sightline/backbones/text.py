"""The text tower of CLIP (arXiv 2103.00020, section 2.4): a Transformer in which no token sees what comes after it."""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline.layers.encoder import Encoder


class TextTower(nn.Module):
    """Token ids to one vector for each text: what the encoder makes of the token that ends it.

    `length` is the most tokens of a text, `vocabulary` the number of different ones. A text ends at its first token
    `end`; where `end` is None, at its highest id, as OpenAI's vocabulary numbers the token that ends a text. What
    stands behind the end is never seen, so that any padding will do. Initialised as the published code does it:
    embeddings normal with deviation 0.02, positions with 0.01, residual layers smaller the deeper the tower.
    """

    def __init__(
        self,
        width: int,
        *,
        depth: int,
        heads: int,
        hidden: int,
        length: int = 77,
        vocabulary: int = 49_408,
        end: int | None = None,
        activation: str = "quick_gelu",
        eps: float = 1e-5,
    ):
        super().__init__()
        self.width, self.depth, self.length, self.end = width, depth, length, end
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(length, width))
        self.encoder = Encoder(depth, width=width, heads=heads, hidden=hidden, eps=eps, activation=activation)
        self.norm = nn.LayerNorm(width, eps=eps)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        inner = self.width**-0.5 * (2 * self.depth) ** -0.5
        deviations = {"qkv": self.width**-0.5, "out": inner, "fc1": (2 * self.width) ** -0.5, "fc2": inner}
        for name, module in self.encoder.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=deviations[name.split(".")[-1]])
                nn.init.zeros_(module.bias)

    def ends(self, ids: Int[Tensor, "b n"]) -> Int[Tensor, " b"]:
        """Where each text ends; a text without an end is read at its first token."""
        return ids.argmax(dim=1) if self.end is None else (ids == self.end).int().argmax(dim=1)

    def tokens(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """The normalised tokens that the encoder gives. Raises AssertionError for more than `length` of them."""
        n = ids.shape[1]
        assert n <= self.length, f"texts of {n} tokens are longer than the {self.length} that the tower was made for"
        x = self.embedding(ids) + self.positions[:n]
        hidden = torch.full((n, n), -torch.inf, device=x.device, dtype=x.dtype).triu(1)
        return self.norm(self.encoder(x, rearrange(hidden, "n m -> 1 1 n m")))

    def forward(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        tokens = self.tokens(ids)
        return tokens[torch.arange(len(ids), device=ids.device), self.ends(ids)]
