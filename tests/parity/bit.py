"""Big Transfer's networks: timm's and transformers', and timm's with the names and the epsilon of the originals."""

from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from timm.layers import StdConv2d
from torch import Tensor, nn
from transformers import BitConfig, BitForImageClassification

from parity import Case, Made, spread

VIEWS = {"square": (64, 64), "non-square": (45, 71), "other size": (37, 98)}


def faint(network: nn.Module) -> nn.Module:
    """The network with kernels and norms so small that each epsilon is felt; the last norm makes up for it."""
    for name, parameter in spread(network).named_parameters():
        if parameter.ndim == 4 and "head" not in name:
            parameter.data *= 0.01
        elif ".norm" in name and not name.startswith("bit.norm"):
            parameter.data *= 0.1
    return network


def from_timm(eps: float = 1e-8) -> nn.Module:
    network = timm.create_model("resnetv2_50x1_bit", channels=(128, 256, 128, 128), stem_chs=32, num_classes=11)
    for module in network.modules():
        if isinstance(module, StdConv2d):
            module.eps = eps
    return faint(network)


def from_transformers() -> nn.Module:
    config = BitConfig(embedding_size=32, hidden_sizes=[128, 256, 128], depths=[2, 1, 2], num_labels=11)
    return faint(BitForImageClassification(config))


def original_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of `bit_pytorch`."""
    found = {}
    for name, tensor in state.items():
        new = (
            name.replace("stem.conv", "root.conv")
            .replace("head.fc", "head.conv")
            .replace("downsample.conv", "downsample")
        )
        parts = new.split(".")
        if parts[0] == "stages":
            stage, block, rest = int(parts[1]) + 1, int(parts[3]) + 1, ".".join(parts[4:]).replace("norm", "gn")
            new = f"body.block{stage}.unit{block:02d}.{rest}"
        found["head.gn." + parts[1] if parts[0] == "norm" else new] = tensor
    return found


def google_names(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """The names and axes of the published `.npz` files."""
    found = {}
    for name, tensor in original_names(state).items():
        parts = name.split(".")
        kind = parts[-2]
        unit = f"resnet/{parts[1]}/{parts[2]}/" if parts[0] == "body" else "resnet/"
        if kind == "downsample":
            place = "a/proj/standardized_conv2d"
        elif parts[0] == "body":
            what = "standardized_conv2d" if kind.startswith("conv") else "group_norm"
            place = f"{'abc'[int(kind[-1]) - 1]}/{what}"
        else:
            place = {
                "root.conv": "root_block/standardized_conv2d",
                "head.gn": "group_norm",
                "head.conv": "head/conv2d",
            }[".".join(parts[:2])]
        if tensor.ndim == 4:
            found[f"{unit}{place}/kernel"] = tensor.permute(2, 3, 1, 0).numpy()
        else:
            last = {"weight": "gamma", "bias": "bias" if kind == "conv" else "beta"}[parts[-1]]
            found[f"{unit}{place}/{last}"] = tensor.numpy()
    return found


def make(folder: Path, *, source: str, size: tuple[int, int]) -> Made:
    eps = 1e-8 if source == "timm" else 1e-10
    network = from_transformers() if source == "transformers" else from_timm(eps)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        answer = network(pixels)
    if source == "transformers":
        network.save_pretrained(folder)
        return Made(folder, {"image_size": size}, pixels, answer.logits)
    state = network.state_dict()
    path = folder / {"timm": "model.safetensors", "original": "bit.pth", "google": "bit.npz"}[source]
    if source == "timm":
        save_file(state, path)
    elif source == "original":
        torch.save({"step": 7, "model": {f"module.{name}": t for name, t in original_names(state).items()}}, path)
    else:
        np.savez(path, **google_names(state))
    return Made(path, {"image_size": size}, pixels, answer)


CASES = [
    Case("bit", source, view, f"{source}/bit", partial(make, source=source, size=size))
    for source in ("timm", "transformers", "original", "google")
    for view, size in VIEWS.items()
]
