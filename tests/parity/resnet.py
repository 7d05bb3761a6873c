"""Residual networks of timm, torchvision and transformers; none has anything that depends on the image size."""

from functools import partial
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from transformers import ResNetConfig, ResNetForImageClassification

from parity import Case, Made, spread

VIEWS = {"square": (64, 64), "non-square": (45, 71), "other size": (37, 98)}


def from_timm(block: str) -> nn.Module:
    name = {"basic": "resnet18", "bottleneck": "resnet50"}[block]
    return timm.create_model(name, layers=[1, 2, 1, 1], channels=[12, 20, 28, 16], num_classes=11)


def from_torchvision(block: str) -> nn.Module:
    kind = {"basic": BasicBlock, "bottleneck": Bottleneck}[block]
    return ResNet(kind, [1, 2, 1, 1], num_classes=11)


def from_transformers(block: str) -> nn.Module:
    config = ResNetConfig(
        embedding_size=20, hidden_sizes=[20, 28, 36], depths=[2, 1, 2], layer_type=block, num_labels=11
    )
    return ResNetForImageClassification(config)


def make(folder: Path, *, source: str, block: str, size: tuple[int, int]) -> Made:
    build = {"timm": from_timm, "torchvision": from_torchvision, "transformers": from_transformers}[source]
    network = spread(build(block))
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        answer = network(pixels)
    if source == "transformers":
        network.save_pretrained(folder)
        return Made(folder, {"image_size": size}, pixels, answer.logits)
    path = folder / ("resnet.pth" if source == "torchvision" else "model.safetensors")
    if source == "torchvision":
        torch.save(network.state_dict(), path)
    else:
        save_file(network.state_dict(), path)
    return Made(path, {"image_size": size}, pixels, answer)


CASES = [
    Case(f"resnet {block}", source, view, f"{source}/resnet", partial(make, source=source, block=block, size=size))
    for source in ("timm", "torchvision", "transformers")
    for view, size in VIEWS.items()
    for block in ("basic", "bottleneck")
]
