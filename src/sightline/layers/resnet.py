"""Residual networks of convolutions: blocks, norms, standardised kernels, and the padding that TensorFlow calls "same".

What differs between published families is given to a block as two functions: how it makes a convolution, and a norm.
"""

import math
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sightline.layers.encoder import DropPath

GROUPS = 32
"""Groups of channels of every group norm here (arXiv 1803.08494, section 3.1)."""

Convolve = Callable[[int, int, int, int], nn.Module]
"""A convolution from channels in, channels out, kernel and stride."""

Normalise = Callable[[int], nn.Module]
"""A norm from its number of channels."""


def same(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """How much "same" padding adds before and after `side` pixels: the output has ceil(side / stride).

    The odd pixel comes after, so that even images are padded unevenly.
    """
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2


def padded(x: Float[Tensor, "b c h w"], kernel: int, stride: int, value: float = 0.0) -> Float[Tensor, "b c y x"]:
    """An image with "same" padding of `value` around it."""
    (above, below), (left, right) = (same(side, kernel, stride) for side in x.shape[-2:])
    return F.pad(x, (left, right, above, below), value=value) if above or below or left or right else x


def convolution(inside: int, outside: int, kernel: int, stride: int) -> nn.Conv2d:
    """A convolution without bias, padded alike on all sides and drawn by He's rule (arXiv 1502.01852, equation 14)."""
    layer = nn.Conv2d(inside, outside, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


class StandardizedConv(nn.Conv2d):
    """A convolution whose kernels have mean 0 and deviation 1 for every output channel (arXiv 1903.10520, equation 7).

    `eps` is added to the variance, or to the deviation where `eps_to` says so, as the original Vision Transformer does.
    `padding` is "fixed", half the kernel on every side, or "same". There is no bias; checkpoints hold the kernels as
    they are before.
    """

    def __init__(
        self,
        inside: int,
        outside: int,
        kernel: int,
        stride: int = 1,
        *,
        eps: float = 1e-8,
        eps_to: Literal["variance", "deviation"] = "variance",
        padding: Literal["fixed", "same"] = "fixed",
    ):
        fixed = padding == "fixed"
        super().__init__(inside, outside, kernel, stride, padding=kernel // 2 if fixed else 0, bias=False)
        self.eps, self.eps_to, self.same = eps, eps_to, not fixed
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def standardized(self) -> Float[Tensor, "o i h w"]:
        """The kernels that the image meets."""
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        deviation = (variance + self.eps).sqrt() if self.eps_to == "variance" else variance.sqrt() + self.eps
        return (self.weight - mean) / deviation

    def forward(self, input: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o y x"]:
        x = padded(input, self.kernel_size[0], self.stride[0]) if self.same else input
        return F.conv2d(x, self.standardized(), stride=self.stride, padding=self.padding)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps:g} to {self.eps_to}, padding={'same' if self.same else 'fixed'}"


class GroupNorm(nn.GroupNorm):
    """Norm over groups of channels and all places of one image (arXiv 1803.08494), of an image of one place as well."""

    def __init__(self, channels: int, *, eps: float = 1e-5):
        super().__init__(GROUPS, channels, eps=eps)

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        # The framework's own function refuses a single value per group, which is rightly normalised to zero.
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class BatchNorm(nn.Module):
    """Norm of each channel over the batch in training, over kept averages otherwise (arXiv 1502.03167).

    The averages are part of a checkpoint, and no count of batches is. A batch with one value per channel has no
    variance: the kept averages serve for it in training too.
    """

    recomputing = False
    """Whether activations are being computed a second time, when the averages have already seen them."""

    running_mean: Float[Tensor, " c"]
    running_var: Float[Tensor, " c"]

    def __init__(self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        several = x.shape[0] * math.prod(x.shape[2:]) > 1
        fresh = self.training and several
        kept = self.running_mean, self.running_var
        if BatchNorm.recomputing:
            kept = kept[0].clone(), kept[1].clone()
        return F.batch_norm(x, *kept, self.weight, self.bias, fresh, self.momentum, self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps:g}, momentum={self.momentum:g}"


@contextmanager
def _recomputing() -> Generator[None]:
    before, BatchNorm.recomputing = BatchNorm.recomputing, True
    try:
        yield
    finally:
        BatchNorm.recomputing = before


class FrozenBatchNorm(nn.Module):
    """A batch norm that nothing changes: kept averages, scale and shift are all constants (arXiv 2005.12872, 4)."""

    weight: Float[Tensor, " c"]
    bias: Float[Tensor, " c"]
    running_mean: Float[Tensor, " c"]
    running_var: Float[Tensor, " c"]

    def __init__(self, channels: int, *, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class _Shortcut(nn.Module):
    """What a block adds its branch to, where its shape differs from that of the input."""

    def __init__(self, inside: int, outside: int, stride: int, convolve: Convolve, normalise: Normalise):
        super().__init__()
        self.conv = convolve(inside, outside, 1, stride)
        self.norm = normalise(outside)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d y x"]:
        return self.norm(self.conv(x))


def _shortcut(inside: int, outside: int, stride: int, convolve: Convolve, normalise: Normalise) -> nn.Module:
    if inside == outside and stride == 1:
        return nn.Identity()
    return _Shortcut(inside, outside, stride, convolve, normalise)


def _begin_at_zero(norm: nn.Module) -> None:
    """Lets a new norm pass on nothing, whether its scale is learned or not."""
    scale = norm.weight
    assert isinstance(scale, Tensor)
    nn.init.zeros_(scale)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a norm after each, and the sum's ReLU (arXiv 1512.03385, figure 5, left).

    `last_norm` starts at zero, so that a new block passes on its input (arXiv 1706.02677, section 5.1).
    """

    expansion = 1

    def __init__(
        self,
        inside: int,
        outside: int,
        stride: int = 1,
        drop_path: float = 0.0,
        *,
        convolve: Convolve = convolution,
        normalise: Normalise = BatchNorm,
    ):
        super().__init__()
        self.conv1 = convolve(inside, outside, 3, stride)
        self.norm1 = normalise(outside)
        self.conv2 = convolve(outside, outside, 3, 1)
        self.last_norm = normalise(outside)
        self.shortcut = _shortcut(inside, outside, stride, convolve, normalise)
        self.drop_path = DropPath(drop_path)
        _begin_at_zero(self.last_norm)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d y x"]:
        branch = self.last_norm(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + self.drop_path(branch))


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions with a norm after each, and the sum's ReLU (arXiv 1512.03385, figure 5, right).

    The inner ones have a quarter of the channels. The stride is that of the 3×3 convolution, unlike the paper's.
    `last_norm` starts at zero, so that a new block passes on its input (arXiv 1706.02677, section 5.1).
    """

    expansion = 4

    def __init__(
        self,
        inside: int,
        outside: int,
        stride: int = 1,
        drop_path: float = 0.0,
        *,
        convolve: Convolve = convolution,
        normalise: Normalise = BatchNorm,
    ):
        super().__init__()
        inner = outside // self.expansion
        self.conv1 = convolve(inside, inner, 1, 1)
        self.norm1 = normalise(inner)
        self.conv2 = convolve(inner, inner, 3, stride)
        self.norm2 = normalise(inner)
        self.conv3 = convolve(inner, outside, 1, 1)
        self.last_norm = normalise(outside)
        self.shortcut = _shortcut(inside, outside, stride, convolve, normalise)
        self.drop_path = DropPath(drop_path)
        _begin_at_zero(self.last_norm)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d y x"]:
        branch = F.relu(self.norm1(self.conv1(x)))
        branch = F.relu(self.norm2(self.conv2(branch)))
        return F.relu(self.shortcut(x) + self.drop_path(self.last_norm(self.conv3(branch))))


class PreactivatedBottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions with norm and ReLU before each (arXiv 1603.05027, section 4.1; 1912.11370).

    The inner ones have a quarter of the channels. Nothing follows the sum. Where the shape changes, the shortcut is a
    1×1 convolution of the input after its norm and ReLU.
    """

    expansion = 4

    def __init__(
        self,
        inside: int,
        outside: int,
        stride: int = 1,
        drop_path: float = 0.0,
        *,
        convolve: Convolve,
        normalise: Normalise,
    ):
        super().__init__()
        inner = outside // self.expansion
        self.norm1 = normalise(inside)
        self.conv1 = convolve(inside, inner, 1, 1)
        self.norm2 = normalise(inner)
        self.conv2 = convolve(inner, inner, 3, stride)
        self.norm3 = normalise(inner)
        self.conv3 = convolve(inner, outside, 1, 1)
        self.shortcut = None if inside == outside and stride == 1 else convolve(inside, outside, 1, stride)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d y x"]:
        active = F.relu(self.norm1(x))
        branch = self.conv2(F.relu(self.norm2(self.conv1(active))))
        branch = self.conv3(F.relu(self.norm3(branch)))
        return (x if self.shortcut is None else self.shortcut(active)) + self.drop_path(branch)


class Stage(nn.Module):
    """Blocks of one resolution, the first of which has the stride.

    With `checkpointing` set, activations are recomputed in the backward pass instead of kept.
    """

    def __init__(self, blocks: Iterable[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.checkpointing = False

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d y x"]:
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _recomputing()))
            else:
                x = block(x)
        return x


def stages(
    inside: int, widths: Iterable[int], layers: tuple[int, ...], block: Callable[..., nn.Module], drop_path: float = 0.0
) -> nn.ModuleList:
    """A stage for each of `widths`, with as many blocks as `layers` says; each but the first halves rows and columns.

    The rate of `drop_path` grows linearly from 0 at the first block to its value at the last.
    """
    built, number, total = nn.ModuleList(), 0, max(sum(layers) - 1, 1)
    for stage, (outside, count) in enumerate(zip(widths, layers, strict=True)):
        blocks = []
        for i in range(count):
            stride = 2 if i == 0 and stage > 0 else 1
            blocks.append(block(inside if i == 0 else outside, outside, stride, drop_path * (number + i) / total))
        inside, number = outside, number + count
        built.append(Stage(blocks))
    return built
