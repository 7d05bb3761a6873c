"""A network as the processor computes it fastest: weights packed once for oneDNN, in fp32 or in bf16."""

import copy
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sightline.layers.attention import Attention, writes_maps_out
from sightline.layers.dense import Dense, product
from sightline.layers.encoder import Mlp

_INSIDE = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}
"""What oneDNN computes of an activation while the products are still in the cache: its name and its kind."""


@cache
def packs(dtype: torch.dtype) -> bool:
    """Whether this torch packs matrices of `dtype` for this processor, found out by doing it with a small one."""
    x, weight, bias = torch.ones(3, 32, dtype=dtype), torch.eye(32, dtype=dtype), torch.ones(32, dtype=dtype)
    try:
        found = product(x, torch.ops.mkldnn._reorder_linear_weight(weight), bias, "gelu", "none")
        return torch.allclose(found.float(), F.gelu(torch.full((3, 32), 2.0)), atol=0.02)
    except (AttributeError, RuntimeError):
        return False


@cache
def computes_bf16() -> bool:
    """Whether this processor multiplies bf16 itself; emulated, it is slower than fp32."""
    told = (getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(told) and packs(torch.bfloat16)


def packed(network: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same network for inference on the processor: its dense layers hold their weights packed, as `dtype`.

    What is not a dense layer or a convolution shares its tensors with `network`, which is unchanged. In fp32 it gives
    the same numbers but for the order of sums. In bf16 the backbone multiplies in bf16 and adds in fp32; the head reads
    fp32 and computes in it, so that equal logits are equal indeed.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    other = copy.deepcopy(network, memo).eval()
    if dtype == torch.float32:
        _pack(other, dtype)
        return other
    for owner in other.modules():
        if isinstance(backbone := owner._modules.get("backbone"), nn.Module):
            _pack(backbone, dtype)
            owner.backbone = LowBackbone(backbone, dtype)
            break
    return other


class LowBackbone(nn.Module):
    """A backbone whose matrix products are in half precision; tokens come out in fp32."""

    def __init__(self, backbone: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.backbone, self.dtype = backbone, dtype

    def forward(self, *inputs: Any) -> Any:
        with torch.autocast("cpu", self.dtype, cache_enabled=False):
            tokens = self.backbone(*inputs)
        return tokens._replace(x=tokens.x.float())


class PackedLinear(nn.Module):
    """A dense layer whose weights lie as the processor reads them, with what follows it computed on the way.

    The first call packs; what is only asked for its `weight` never is.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype, activation: str | None = None):
        super().__init__()
        self.dtype, self.out_features = dtype, layer.out_features
        self.activation = _INSIDE[activation] if activation else ("none", "")
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self.dense: Tensor | None = layer.weight.detach()
        self.packed: Tensor | None = None

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """The weights as they are elsewhere."""
        if self.dense is None:
            assert self.packed is not None, "weights are dense or packed"
            self.dense = self.packed.to_dense()
        return self.dense.to(self.dtype)

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous())
            self.dense = None
        return product(x.to(self.dtype), self.packed, self.bias, *self.activation)


class PackedMlp(nn.Module):
    """Two dense layers, the activation between them computed by the first."""

    def __init__(self, mlp: Mlp, dtype: torch.dtype):
        super().__init__()
        self.fc1, self.fc2 = PackedLinear(mlp.fc1, dtype, mlp.activation), PackedLinear(mlp.fc2, dtype)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return self.fc2(self.fc1(x))


def _pack(module: nn.Module, dtype: torch.dtype) -> None:
    """Puts packed layers in the place of dense ones, everywhere below."""
    if isinstance(module, Attention):
        module.fused = not writes_maps_out(dtype)
        if module.q_bias is not None:  # BEiT's two biases, put together once
            joined = module._bias()
            assert joined is not None
            module.qkv.bias = nn.Parameter(joined.detach(), requires_grad=False)
            module.q_bias = module.v_bias = None
    for name, part in module.named_children():
        if type(part) is Mlp and part.activation in _INSIDE:
            setattr(module, name, PackedMlp(part, dtype))
        elif isinstance(part, nn.Linear) and type(part) in (nn.Linear, Dense):
            setattr(module, name, PackedLinear(part, dtype))
        else:
            _pack(part, dtype)
    if type(module) is nn.Conv2d and dtype != torch.float32:
        for name, values in (("weight", module.weight), ("bias", module.bias)):
            if values is not None:
                setattr(module, name, nn.Parameter(values.detach().to(dtype), requires_grad=False))
