"""PiT: timm's, and the same weights under the original repository's names, which timm reads too."""

from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from parity import Case, Made, spread

SMALL = {"stride": 4, "base_dims": (5, 5, 7), "depth": (1, 3, 2), "heads": (3, 6, 30), "mlp_ratio": 3.0}
SQUARE, OBLONG, OTHER = (40, 40), (57, 36), (64, 49)


def theirs(name: str, size: tuple[int, int], **settings: Any) -> nn.Module:
    small = {key: list(value) if isinstance(value, tuple) else value for key, value in SMALL.items()}
    return timm.create_model(name, img_size=size, patch_size=8, num_classes=11, **small, **settings)


def original_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A pooling is no part of the stage that it leads to, and is counted from the one before it."""
    return {name.replace("transformers.1.pool", "pools.0").replace("transformers.2.pool", "pools.1"): tensor
            for name, tensor in state.items()}  # fmt: skip


def make(folder: Path, *, name: str, original: bool, made_for: tuple[int, int], size: tuple[int, int]) -> Made:
    network = spread(theirs(name, made_for))
    state = network.state_dict()
    path = folder / ("pit.pth" if original else "model.safetensors")
    if original:
        torch.save(original_names(state), path)
    else:
        save_file(state, path)
    if size != made_for:
        # Neither library stretches PiT's positions; this is what timm does to those of its other networks.
        other, plane = theirs(name, size).eval(), state["pos_embed"]
        rows = plane.flatten(2).transpose(1, 2)
        grid, old = list(other.pos_embed.shape[2:]), list(plane.shape[2:])
        stretched = resample_abs_pos_embed(rows, new_size=grid, old_size=old, num_prefix_tokens=0)
        table = stretched.transpose(1, 2).reshape(other.pos_embed.shape)
        other.load_state_dict({**state, "pos_embed": table})
        network = other
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    options = {"architecture": name, "image_size": size, "patch_size": 8, **SMALL}
    with torch.no_grad():
        return Made(path, options, pixels, network(pixels))


CASES = [
    Case("pit", source, view, f"{source}/pit", partial(make, name=name, original=original, made_for=old, size=new))
    for source, original in (("timm", False), ("original", True))
    for view, name, old, new in (
        ("square", "pit_s_224", SQUARE, SQUARE),
        ("square", "pit_s_distilled_224", SQUARE, SQUARE),
        ("non-square", "pit_s_224", OBLONG, OBLONG),
        ("other size", "pit_s_distilled_224", SQUARE, OTHER),
    )
]
