"""Muon: matrices move by their orthogonalised momentum, everything else by AdamW."""

import math
from collections import defaultdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

RATIO = 10.0
"""Rate of the matrices over that of AdamW: an orthogonal step is spread over all directions alike and may be longer."""

MATRIX_MOMENTUM = 0.95

_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients whose slope at zero is steep, so that few iterations suffice (Jordan et al. 2024)."""

_ITERATIONS = 5


class Muon(torch.optim.AdamW):
    """AdamW in which the groups marked `matrices` follow Muon (Jordan et al. 2024; arXiv 2502.16982, section 2).

    The momentum of each matrix, looked ahead by Nesterov's rule, is replaced by the nearest orthogonal matrix, so that
    directions with small gradients are learned as fast as those with large ones. Kernels of convolutions count as
    matrices [out, in × height × width]. Matrices of one shape are orthogonalised together.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]):
        super().__init__(groups, lr=lr, betas=betas, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # ty: ignore[incompatible-method-override]
        assert closure is None
        overflowed = getattr(self, "found_inf", None)  # the loss scaler leaves word with a fused optimiser
        if overflowed is None or not overflowed.item():
            self._turn()
        super().step()

    def _turn(self) -> None:
        alike: dict[tuple[torch.Size, float, float], list[nn.Parameter]] = defaultdict(list)
        for group in self.param_groups:
            for parameter in group["params"] if group.get("matrices") else ():
                if parameter.grad is not None:
                    alike[parameter.shape, group["lr"], group["weight_decay"]].append(parameter)
        for (shape, lr, decay), parameters in alike.items():
            steps = orthogonal(torch.stack([self._momentum(parameter) for parameter in parameters]).flatten(2))
            length = RATIO * lr * math.sqrt(max(1.0, shape[0] / math.prod(shape[1:])))
            for parameter, step in zip(parameters, steps, strict=True):
                parameter.mul_(1 - lr * decay).sub_(step.view(shape), alpha=length)
                parameter.grad = None  # AdamW passes over it

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
            state["step"] = torch.zeros(())  # AdamW wants to find one when its state is read back
        kept = state["momentum_buffer"].lerp_(gradient, 1 - MATRIX_MOMENTUM)
        return gradient.lerp(kept, MATRIX_MOMENTUM)


def orthogonal(matrices: Float[Tensor, "b rows columns"]) -> Float[Tensor, "b rows columns"]:
    """Matrices with the same singular vectors whose singular values all lie near one, by Newton and Schulz."""
    a, b, c = _QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
