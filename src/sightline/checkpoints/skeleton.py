"""Networks without memory, to be filled with tensors that exist already."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sightline.network import Architecture, Network


class _Undrawn(TorchFunctionMode):
    """Leaves out every draw of initial values: they would be replaced, and drawing nothing costs seconds of imports."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (nn.init.normal_, nn.init.uniform_, Tensor.normal_, Tensor.uniform_, Tensor.erfinv_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def skeleton(architecture: Architecture) -> Network:
    """The network with parameters that have shapes but no values; what is computed instead of learned is real."""
    with torch.device("meta"), _Undrawn():
        return architecture.build()


def shapes(architecture: Architecture) -> dict[str, torch.Size]:
    """The shape of every parameter by its name."""
    return {name: tensor.shape for name, tensor in skeleton(architecture).state_dict().items()}
