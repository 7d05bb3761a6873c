"""Google's Vision Transformers, computed from the arrays of their files as the original code computes them."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def google_arrays(grid: tuple[int, int], *, pre_logits: bool = False, token: bool = True) -> dict[str, np.ndarray]:
    """Random weights in the original's layout: width 36, 3 heads, 2 layers, patches of 8, 7 classes."""
    draw = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"embedding/kernel": (8, 8, 3, 36), "embedding/bias": (36,)}
    shapes |= {"cls": (1, 1, 36)} if token else {}
    shapes["Transformer/posembed_input/pos_embedding"] = (1, math.prod(grid) + token, 36)
    for i in range(2):
        block = f"Transformer/encoderblock_{i}"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{block}/{norm}/scale": (36,), f"{block}/{norm}/bias": (36,)}
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            shapes |= {f"{attention}/{part}/kernel": (36, 3, 12), f"{attention}/{part}/bias": (3, 12)}
        shapes |= {f"{attention}/out/kernel": (3, 12, 36), f"{attention}/out/bias": (36,)}
        shapes |= {f"{block}/MlpBlock_3/Dense_0/kernel": (36, 50), f"{block}/MlpBlock_3/Dense_0/bias": (50,)}
        shapes |= {f"{block}/MlpBlock_3/Dense_1/kernel": (50, 36), f"{block}/MlpBlock_3/Dense_1/bias": (36,)}
    shapes |= {"Transformer/encoder_norm/scale": (36,), "Transformer/encoder_norm/bias": (36,)}
    if pre_logits:
        shapes |= {"pre_logits/kernel": (36, 36), "pre_logits/bias": (36,)}
    shapes |= {"head/kernel": (36, 7), "head/bias": (7,)}
    return {
        name: (draw.standard_normal(shape) / 6 + name.endswith("scale")).astype(np.float32)
        for name, shape in shapes.items()
    }


def google_logits(arrays: dict[str, np.ndarray], pixels: Tensor, gelu: str = "tanh") -> Tensor:
    """The paper's equations 1 to 4 over the original's arrays, written without any of this project's code."""
    a = {name: torch.from_numpy(array) for name, array in arrays.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (36,), a[f"{name}/scale"], a[f"{name}/bias"], eps=1e-6)

    x = F.conv2d(pixels, a["embedding/kernel"].permute(3, 2, 0, 1), a["embedding/bias"], stride=8)
    x = x.flatten(2).transpose(1, 2)
    if "cls" in a:
        x = torch.cat([a["cls"].expand(len(x), 1, 36), x], dim=1)
    x = x + a["Transformer/posembed_input/pos_embedding"]
    for i in range(2):
        block = f"Transformer/encoderblock_{i}"
        y, part = norm(x, f"{block}/LayerNorm_0"), f"{block}/MultiHeadDotProductAttention_1"
        q, k, v = (
            torch.einsum("bnd,dhk->bhnk", y, a[f"{part}/{p}/kernel"]) + a[f"{part}/{p}/bias"][:, None]
            for p in ("query", "key", "value")
        )
        mixed = torch.softmax(q @ k.transpose(2, 3) / 12**0.5, dim=-1) @ v
        x = x + torch.einsum("bhnk,hkd->bnd", mixed, a[f"{part}/out/kernel"]) + a[f"{part}/out/bias"]
        y, part = norm(x, f"{block}/LayerNorm_2"), f"{block}/MlpBlock_3"
        y = F.gelu(y @ a[f"{part}/Dense_0/kernel"] + a[f"{part}/Dense_0/bias"], approximate=gelu)
        x = x + y @ a[f"{part}/Dense_1/kernel"] + a[f"{part}/Dense_1/bias"]
    x = norm(x, "Transformer/encoder_norm")
    x = x[:, 0] if "cls" in a else x.mean(dim=1)
    if "pre_logits/kernel" in a:
        x = torch.tanh(x @ a["pre_logits/kernel"] + a["pre_logits/bias"])
    return x @ a["head/kernel"] + a["head/bias"]


def big_vision(arrays: dict[str, np.ndarray], prefix: str, *, stacked: bool = False) -> dict[str, np.ndarray]:
    """The same network in big_vision's layout: positions beside the encoder, without the row of the class token."""
    new = {
        name.replace("MlpBlock_3", "MlpBlock_0")
        .replace("LayerNorm_2", "LayerNorm_1")
        .replace("tion_1", "tion_0"): array
        for name, array in arrays.items()
    }
    table = new.pop("Transformer/posembed_input/pos_embedding")
    if "cls" in new:
        new["cls"], table = new["cls"] + table[:, :1], table[:, 1:]
    new["pos_embedding"] = table
    if stacked:
        first = [name for name in new if name.startswith("Transformer/encoderblock_0/")]
        for name in first:
            layers = [new.pop(name.replace("block_0/", f"block_{i}/")) for i in range(2)]
            new[name.replace("block_0/", "block/")] = np.stack(layers)
    return {prefix + name: array for name, array in new.items()}
