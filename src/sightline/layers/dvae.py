"""The residual blocks of DALL-E's discrete autoencoder (arXiv 2102.12092, appendix A)."""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def convolution(inside: int, outside: int, kernel: int) -> nn.Conv2d:
    """A convolution that keeps the size of its input, its kernel normal with deviation 1/√(fan in)."""
    made = nn.Conv2d(inside, outside, kernel, padding=kernel // 2)
    nn.init.normal_(made.weight, std=(inside * kernel * kernel) ** -0.5)
    nn.init.zeros_(made.get_parameter("bias"))
    return made


class DVAEBlock(nn.Module):
    """Four convolutions, each after a ReLU, beside a shortcut: x + gain · f(x), f a quarter as wide inside.

    `kernels` are the sides of the four in turn; where the width changes, the shortcut is a 1×1 convolution.
    """

    def __init__(self, inside: int, outside: int, kernels: Sequence[int], gain: float):
        super().__init__()
        hidden = max(outside // 4, 1)
        widths = (inside, hidden, hidden, hidden, outside)
        self.gain = gain
        self.shortcut = convolution(inside, outside, 1) if inside != outside else nn.Identity()
        self.convolutions = nn.ModuleList(convolution(widths[i], widths[i + 1], kernels[i]) for i in range(4))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        path = x
        for layer in self.convolutions:
            path = layer(F.relu(path))
        return self.shortcut(x) + self.gain * path


def groups(inside: int, widths: Sequence[int], blocks: int, kernels: Sequence[int]) -> nn.ModuleList:
    """Groups of `blocks` blocks, each group of one width; the gain is 1 / (number of blocks)²."""
    gain, made = 1 / (len(widths) * blocks) ** 2, nn.ModuleList()
    for width in widths:
        layers = [DVAEBlock(inside if i == 0 else width, width, kernels, gain) for i in range(blocks)]
        made.append(nn.ModuleList(layers))
        inside = width
    return made
