"""Swin Transformers of timm, transformers and torchvision, and weights under the original repository's names."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin
from transformers import SwinConfig, SwinForImageClassification

from parity import Case, Made, spread

WIDTH, DEPTHS, HEADS, WINDOW, CLASSES = 12, (2, 3, 2), (2, 3, 4), 4, 11
SQUARE, OBLONG, OTHER = (30, 30), (26, 44), (20, 52)
"""With patches of 2 pixels, these make grids that 4 does and does not divide, odd ones, and some no larger than 4."""

SHAPE: dict[str, Any] = {"embed_dim": WIDTH, "depths": DEPTHS, "num_heads": HEADS}


def pixels_of(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def answer(network: nn.Module, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        pixels, output = pixels_of(size), network(pixels_of(size))
    return pixels, output if isinstance(output, Tensor) else output.logits


def of_timm(size: tuple[int, int], **settings: Any) -> nn.Module:
    shape = {"patch_size": 2, "window_size": WINDOW, "num_classes": CLASSES, "mlp_ratio": 3.0, **SHAPE}
    return SwinTransformer(img_size=size, **{**shape, **settings}).eval()


def with_weights(network: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """The network with these weights and, unlike after `spread`, its own masks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's own interpolation speaks of a deprecated index
        network.load_state_dict(checkpoint_filter_fn(weights, network))
    return network


def timm(folder: Path, made_for: tuple[int, int], size: tuple[int, int], **settings: Any) -> Made:
    weights = spread(of_timm(made_for, **settings)).state_dict()
    path = folder / "swin.pth"
    torch.save(weights, path)
    network = with_weights(of_timm(size, **settings), weights)
    window = {"window_fit": "always"} if settings.get("always_partition") else {}
    return Made(path, {"source_size": made_for, "image_size": size, **window}, *answer(network, size))


def original_names(network: nn.Module) -> dict[str, Tensor]:
    """timm's weights as the original repository calls them, with the buffers that it writes besides."""
    state = {name.replace("head.fc.", "head."): tensor for name, tensor in network.state_dict().items()}
    for stage in (1, 2):
        for part in ("norm.weight", "norm.bias", "reduction.weight"):
            if f"layers.{stage}.downsample.{part}" in state:
                state[f"layers.{stage - 1}.downsample.{part}"] = state.pop(f"layers.{stage}.downsample.{part}")
    for name, module in network.named_modules():
        for buffer in ("attn_mask", "relative_position_index"):
            if getattr(module, buffer, None) is not None:
                state[f"{name}.{buffer}"] = getattr(module, buffer)
    return state


def original(folder: Path, made_for: tuple[int, int], size: tuple[int, int]) -> Made:
    """The sizes are such that timm and the original code compute the same: windows divide every grid."""
    settings = {"depths": DEPTHS[:2], "num_heads": HEADS[:2]}
    weights = spread(of_timm(made_for, **settings)).state_dict()
    path = folder / "swin.pth"
    torch.save({"model": original_names(with_weights(of_timm(made_for, **settings), weights)), "epoch": 300}, path)
    network = of_timm(size, **settings)
    for name, table in network.state_dict().items():
        old, new = (round(len(rows) ** 0.5) for rows in (weights[name], table))
        if name.endswith("relative_position_bias_table") and old != new:
            plane = weights[name].T.reshape(1, -1, old, old)
            weights[name] = F.interpolate(plane, size=(new, new), mode="bicubic").flatten(2)[0].T
    network.load_state_dict(weights)
    return Made(path, {"source_size": made_for, "image_size": size}, *answer(network, size))


def transformers(folder: Path, made_for: tuple[int, int], size: tuple[int, int]) -> Made:
    config = SwinConfig(
        image_size=list(made_for), patch_size=2, window_size=WINDOW, num_labels=CLASSES, mlp_ratio=3.0, **SHAPE
    )
    network = spread(SwinForImageClassification(config))
    network.save_pretrained(folder)
    return Made(folder, {"image_size": size}, *answer(network, size))


def torchvision(folder: Path, made_for: tuple[int, int], size: tuple[int, int]) -> Made:
    network = TorchvisionSwin([2, 2], WIDTH, [*DEPTHS], [*HEADS], [WINDOW] * 2, mlp_ratio=3.0, num_classes=CLASSES)
    path = folder / "swin.pth"
    torch.save(spread(network).state_dict(), path)
    return Made(path, {"image_size": size}, *answer(network, size))


def _cases(make: Callable[..., Made], *sizes: tuple[tuple[int, int], tuple[int, int]], **settings: Any) -> list[Case]:
    source, views = make.__name__, ("square", "non-square", "other size")
    return [
        Case("swin", source, view, f"{source}/swin", partial(make, made_for=old, size=new, **settings))
        for view, (old, new) in zip(views, sizes, strict=True)
    ]


CASES = [
    *_cases(timm, (SQUARE, SQUARE), (OBLONG, OBLONG), (SQUARE, OTHER)),
    *_cases(timm, (SQUARE, SQUARE), (OBLONG, OBLONG), (SQUARE, OTHER), always_partition=True),
    *_cases(transformers, (SQUARE, SQUARE), ((25, 43), (25, 43)), (SQUARE, (33, 28))),
    *_cases(torchvision, (SQUARE, SQUARE), ((27, 45), (27, 45)), (SQUARE, OTHER)),
    *_cases(original, ((32, 32), (32, 32)), ((32, 48), (32, 48)), ((8, 8), (32, 32))),
]
