"""The optimiser and its groups: what is decayed, and how fast each layer learns."""

from typing import Any

import torch
from torch import nn

from sightline.network import Network
from sightline.training.muon import Muon
from sightline.training.settings import Settings


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to kernels, not to biases, norms, scales, tokens or position tables."""
    return parameter.ndim >= 2 and name.endswith("weight")


def groups(objective: nn.Module, network: Network, settings: Settings) -> list[dict]:
    """Parameters by kind and layer: `scale` is each group's factor on the learning rate.

    The factor is `layer_decay` to the power of the layers that still follow (arXiv 2106.08254, appendix H); what
    belongs to the objective alone (a decoder, a projector) learns at the full rate. `matrices` marks the kernels that
    Muon turns: those of the backbone but for position tables and the like, and not those of heads.
    """
    backbone = {id(p): name for name, p in network.backbone.named_parameters()}
    last = network.backbone.depth + 1
    found: dict[tuple[int, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            layer = network.backbone.layer_of(backbone[id(parameter)]) if id(parameter) in backbone else last
            decayed = decays(name, parameter)
            turned = settings.optimizer == "muon" and decayed and layer < last
            found.setdefault((layer, decayed, turned), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": settings.weight_decay if decayed else 0.0,
            "scale": settings.layer_decay ** (last - layer),
            "matrices": turned,
        }
        for (layer, decayed, turned), parameters in sorted(found.items(), key=lambda item: item[0])
    ]


class DecoupledSGD(torch.optim.SGD):
    """SGD with momentum and decoupled weight decay (arXiv 1711.05101, algorithm 1).

    A decay that went through the momentum would be ten times as strong at 0.9. What suits AdamW then takes the queries
    and keys of a small network to zero, and its heads stop attending (docs/log.md).
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, momentum: float):
        for group in groups:
            group["decoupled_decay"] = group.pop("weight_decay")
        super().__init__(groups, lr=lr, momentum=momentum)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # ty: ignore[incompatible-method-override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"] if group["decoupled_decay"] else ():
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["decoupled_decay"])
        super().step()


def build(objective: nn.Module, network: Network, settings: Settings) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), Muon with AdamW for what is no matrix, or SGD with momentum as the paper fine-tunes.

    Weight decay is decoupled in each of them, so that a number means the same: lr times it, of a kernel and update.
    """
    parameters = groups(objective, network, settings)
    if settings.optimizer == "sgd":
        return DecoupledSGD(parameters, lr=settings.lr, momentum=settings.momentum)
    if settings.optimizer == "muon":
        return Muon(parameters, lr=settings.lr, betas=(settings.momentum, settings.beta2))
    fused = all(p.is_floating_point() for g in parameters for p in g["params"])
    return torch.optim.AdamW(parameters, lr=settings.lr, betas=(settings.momentum, settings.beta2), fused=fused)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every group its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
