"""Dense layers, multiplied by oneDNN on processors where what PyTorch calls is slower."""

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sightline.device import described_processor

_fast = ContextVar("fast", default=False)
"""Whether this thread's products go to oneDNN; see `fast_products`."""


class Dense(nn.Linear):
    """x Wᵀ + b; within `fast_products` by the faster library."""

    def forward(self, input: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        return dense(input, self.weight, self.bias)


def dense(
    x: Float[Tensor, "... i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "... o"]:
    """X Wᵀ + b, of tensors."""
    compiled = torch.compiler.is_compiling()  # or exported
    if compiled or not _fast.get() or torch.is_autocast_enabled("cpu") or not all(map(_single, (x, weight, bias))):
        return F.linear(x, weight, bias)
    return DenseProduct.apply(x, weight, bias) if torch.is_grad_enabled() else product(x, weight, bias)


@contextmanager
def fast_products(wanted: bool = True) -> Generator[None]:
    """Dense layers in fp32 are multiplied by oneDNN inside, forward and backward, where this processor gains by it.

    The sums are the same but for their order. PyTorch hands these products to MKL, which reaches half of what AMD's
    processors with AVX-512 can do; elsewhere, on other devices, in lower precision and compiled, nothing changes. It is
    a rule and no measurement, so that one machine gives one answer, and a resumed run the same bits.
    """
    before = _fast.set(wanted and halved_by_mkl() and multiplies())
    try:
        yield
    finally:
        _fast.reset(before)


@cache
def halved_by_mkl() -> bool:
    """Whether MKL is what multiplies here, and leaves half of the processor unused."""
    amd = any(line.startswith("model name") and "AMD" in line for line in described_processor())
    return amd and torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkl.is_available()


@cache
def multiplies() -> bool:
    """Whether this torch multiplies by oneDNN in fp32, found out by doing it."""
    try:
        return torch.equal(product(torch.ones(2, 3), torch.eye(3), None), torch.ones(2, 3))
    except (AttributeError, RuntimeError):
        return False


class DenseProduct(torch.autograd.Function):
    """x Wᵀ + b and its gradients, each as one product of oneDNN."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "... i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None
    ) -> Float[Tensor, "... o"]:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Float[Tensor, "... o"]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows, of_x, of_weight = slope.reshape(-1, slope.shape[-1]), None, None
        if wants_x:
            of_x = product(rows, weight.t(), None).view_as(x)
        if wants_weight:
            given = x.reshape(-1, x.shape[-1])
            # oneDNN divides its work along the rows of the result, and is a fifth faster where these are fewer.
            wide = weight.shape[0] > weight.shape[1]
            of_weight = product(given.t(), rows.t(), None).t() if wide else product(rows.t(), given.t(), None)
        return of_x, of_weight, rows.sum(dim=0) if wants_bias else None


def _single(part: Tensor | None) -> bool:
    return part is None or (part.dtype == torch.float32 and part.device.type == "cpu" and part.numel() > 0)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", kind: str = "") -> Tensor:
    """What oneDNN makes of x Wᵀ + b, of weights as they are or packed for it, and an activation as it calls it."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], kind)
