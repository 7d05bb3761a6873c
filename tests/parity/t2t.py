"""T2T-ViT: the original's outputs where there are some, and a plain network of the same kind beside them.

The original's own code reads square images alone. `Plain` follows the paper and the original's names at any size, with
whole attention matrices in place of the performer's sums; `tests/test_t2t.py` holds it against the original's outputs.
"""

import hashlib
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from parity import Case, Made, spread

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"


class PlainPerformer(nn.Module):
    """Random features, and the matrix of weights that they stand for."""

    def __init__(self, inside: int, width: int):
        super().__init__()
        self.kqv, self.proj = nn.Linear(inside, 3 * width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(inside), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.w = nn.Parameter(torch.empty(width // 2, width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        key, query, value = self.kqv(self.norm1(x)).split(self.proj.in_features, dim=2)
        keys, queries = (torch.exp(t @ self.w.T - (t * t).sum(2, keepdim=True) / 2) / len(self.w) ** 0.5
                         for t in (key, query))  # fmt: skip
        weights = queries @ keys.mT
        x = value + self.proj(weights / (weights.sum(2, keepdim=True) + 1e-8) @ value)
        return x + self.mlp(self.norm2(x))


class PlainTransformer(nn.Module):
    """Exact attention of one head."""

    def __init__(self, inside: int, width: int):
        super().__init__()
        self.scale = inside**-0.5
        self.norm1, self.norm2 = nn.LayerNorm(inside), nn.LayerNorm(width)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(inside, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.attn.qkv(self.norm1(x)).chunk(3, dim=2)
        weights = (query @ key.mT * self.scale).softmax(dim=2)
        x = value + self.attn.proj(weights @ value)
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class Plain(nn.Module):
    """A T2T-ViT for images of (height, width), both multiples of 16."""

    def __init__(self, kind: str, size: tuple[int, int], width: int, depth: int, heads: int, ratio: float, inner: int):
        super().__init__()
        self.grid = (size[0] // 16, size[1] // 16)
        layer = {"performer": PlainPerformer, "transformer": PlainTransformer}[kind]
        self.tokens_to_token = nn.Module()
        self.tokens_to_token.attention1, self.tokens_to_token.attention2 = layer(147, inner), layer(9 * inner, inner)
        self.tokens_to_token.project = nn.Linear(9 * inner, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(self.grid), width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads, ratio, norm_layer=nn.LayerNorm) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 11)

    def forward(self, pixels: Tensor) -> Tensor:
        module, (rows, columns) = self.tokens_to_token, self.grid
        x = module.attention1(F.unfold(pixels, 7, stride=4, padding=2).mT)
        plane = x.mT.unflatten(2, (4 * rows, 4 * columns))
        x = module.attention2(F.unfold(plane, 3, stride=2, padding=1).mT)
        plane = x.mT.unflatten(2, (2 * rows, 2 * columns))
        x = module.project(F.unfold(plane, 3, stride=2, padding=1).mT)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])

    def at(self, size: tuple[int, int]) -> "Plain":
        """The same network at another size; positions are stretched as the original does it, the class row stays."""
        plane = self.pos_embed[:, 1:].mT.unflatten(2, self.grid)
        self.grid = (size[0] // 16, size[1] // 16)
        patches = F.interpolate(plane, size=self.grid, mode="bicubic", align_corners=False).flatten(2).mT
        self.pos_embed = nn.Parameter(torch.cat([self.pos_embed[:, :1], patches], dim=1), requires_grad=False)
        return self


def drawn(folder: Path) -> dict[str, Tensor]:
    """The weights that `recipe.json` describes, with those that lie beside it."""
    recipe = json.loads((folder / "recipe.json").read_text())
    random = np.random.RandomState(recipe["seed"])
    state = {
        row["name"]: (row["mean"] + row["std"] * random.standard_normal(row["shape"])).astype(np.float32)
        for row in recipe["tensors"]
    } | {name: tensor.numpy() for name, tensor in load_file(folder / "fixed.safetensors").items()}
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].tobytes())
    assert digest.hexdigest() == recipe["sha256"]
    return {name: torch.from_numpy(array) for name, array in state.items()}


def golden(folder: Path, *, name: str, file: str, options: dict[str, Any]) -> Made:
    values = load_file(GOLDENS / name / "io.safetensors")
    path = GOLDENS / name / file
    if not path.exists():
        path = folder / file
        torch.save({"state_dict_ema": drawn(GOLDENS / name)}, path)
    return Made(path, options, values["input.pixels"], values["output.logits"])


def plain(folder: Path, *, kind: str, made_for: tuple[int, int], size: tuple[int, int]) -> Made:
    network = spread(Plain(kind, made_for, width=36, depth=2, heads=3, ratio=2.0, inner=14))
    path = folder / "t2t.pth.tar"
    torch.save({"epoch": 1, "arch": "t2t", "state_dict": network.state_dict()}, path)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    options = {"num_heads": 3, "image_size": size, "source_size": made_for}
    with torch.no_grad():
        return Made(path, options, pixels, network.at(size)(pixels))


def _case(view: str, make: Any, **given: Any) -> Case:
    return Case("t2t", "original", view, "original/t2t", partial(make, **given))


CASES = [
    _case("square", golden, name="t2t-performer", file="weights.safetensors", options={"num_heads": 3}),
    _case("square", golden, name="t2t-transformer", file="checkpoint.pth.tar", options={"num_heads": 4}),
    _case(
        "square",
        golden,
        name="t2t-vit-7-named",
        file="t2t_vit_7.pth.tar",
        options={"architecture": "t2t_vit_7", "image_size": 64},
    ),
    _case("non-square", plain, kind="performer", made_for=(48, 80), size=(48, 80)),
    _case("non-square", plain, kind="transformer", made_for=(64, 32), size=(64, 32)),
    _case("other size", plain, kind="performer", made_for=(48, 48), size=(80, 64)),
]
