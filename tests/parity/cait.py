"""CaiT: timm's, under whose names the original repository stores it too."""

from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import nn

from parity import Case, Made, spread

SMALL = {"embed_dim": 21, "depth": 2, "num_heads": 3, "mlp_ratio": 3.0, "depth_token_only": 3, "patch_size": 8}
SQUARE, OBLONG, OTHER = (40, 40), (56, 32), (48, 64)


def theirs(size: tuple[int, int], **settings: Any) -> nn.Module:
    return timm.create_model("cait_xxs24_224", img_size=size, num_classes=11, **SMALL, **settings).eval()


def make(folder: Path, *, made_for: tuple[int, int], size: tuple[int, int], **settings: Any) -> Made:
    network = spread(theirs(made_for, **settings))
    state = network.state_dict()
    if settings:
        path = folder / "cait.pth"  # as it was published: by a process of several
        torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    else:
        path = folder / "model.safetensors"
        save_file(state, path)
    if size != made_for:
        # timm does not stretch the positions of this network; this is what it does to those of its others.
        network, grid = theirs(size, **settings), [side // 8 for side in size]
        old = [side // 8 for side in made_for]
        table = resample_abs_pos_embed(state["pos_embed"], new_size=grid, old_size=old, num_prefix_tokens=0)
        network.load_state_dict({**state, "pos_embed": table})
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return Made(path, {"num_heads": 3, "image_size": size, **settings}, pixels, network(pixels))


CASES = [
    Case("cait", "timm", view, "timm/cait", partial(make, made_for=old, size=new, **settings))
    for view, old, new, settings in (
        ("square", SQUARE, SQUARE, {}),
        ("square", SQUARE, SQUARE, {"qkv_bias": False, "global_pool": "avg", "mlp_ratio_token_only": 2.0}),
        ("non-square", OBLONG, OBLONG, {}),
        ("other size", SQUARE, OTHER, {}),
    )
]
