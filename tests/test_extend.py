"""A new tokenizer or backbone is one new file: dropped into the package, every verb knows it; nothing else changes."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
from PIL import Image

import sightline

OVERLAPPING = '''
"""Patches that overlap, cut by a convolution whose kernel is longer than its stride (as in arXiv 2102.12122)."""

import math

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sightline.registry import Variant
from sightline.types import Tokens


class OverlappingPatches(nn.Module):
    """One token per `patch_size` pixels, read from a window that reaches half a patch further on every side."""

    def __init__(self, width, *, in_chans=3, patch_size=(16, 16), partial="pad", reach=0.5):
        super().__init__()
        self.patch_size = patch_size
        margin = tuple(math.ceil(reach * side) for side in patch_size)
        window = tuple(side + 2 * more for side, more in zip(patch_size, margin))
        self.projection = nn.Conv2d(in_chans, width, window, stride=patch_size, padding=margin)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens for an image of (height, width) pixels."""
        rows, columns = (length // side for length, side in zip(size, self.patch_size))
        return rows, columns

    def forward(self, pixels: Float[Tensor, "b c h w"]) -> Tokens:
        return Tokens(rearrange(self.projection(pixels), "b d r c -> b (r c) d"), self.grid(pixels.shape[-2:]))


TOKENIZERS = {"overlapping": OverlappingPatches}

VARIANTS = {
    "vit_overlapping_patch4_16": Variant(
        family="vit",
        parameters=19_810,
        paper="2102.12122",
        settings={
            "tokenizer": "overlapping", "embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 4, "image_size": 16
        },
        num_classes=10,
    )
}
'''

GLANCE = '''
"""A backbone of its own: every patch looks once at all others, and the tokens halve nowhere."""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline.backbones.backbone import Backbone
from sightline.layers.attention import Attention
from sightline.registry import Variant
from sightline.types import Tokens


@dataclass(frozen=True)
class GlanceConfig:
    """The settings of a `Glance`."""

    image_size: tuple[int, int] = (16, 16)
    in_chans: int = 3
    patch_size: tuple[int, int] = (4, 4)
    width: int = 20
    looks: int = 3


class Glance(Backbone):
    """Cells of pixels, and a few layers of attention without an MLP."""

    Config = GlanceConfig

    def __init__(self, config: GlanceConfig):
        super().__init__()
        self.config, self.width, self.depth = config, config.width, config.looks
        self.cells = nn.Conv2d(config.in_chans, config.width, config.patch_size, stride=config.patch_size)
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(config.looks))
        self.looks = nn.ModuleList(Attention(config.width, 2) for _ in range(config.looks))

    def stages(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> list[Tokens]:
        cells = self.cells(pixels)
        x, found = rearrange(cells, "b d r c -> b (r c) d"), []
        for norm, look in zip(self.norms, self.looks):
            x = x + look(norm(x))
            found.append(Tokens(x, (cells.shape[2], cells.shape[3])))
        return found

    def forward(self, pixels: Float[Tensor, "b c h w"], sizes: Int[Tensor, "b 2"] | None = None) -> Tokens:
        return self.stages(pixels, sizes)[-1]


FAMILIES = {"glance": Glance}

VARIANTS = {
    "glance_16": Variant(
        family="glance", parameters=6_350, paper="1706.03762", head={"global_pool": "avg"}, num_classes=10
    )
}
'''

ADDED = {
    "vit_overlapping_patch4_16": ("tokenizers/overlapping.py", OVERLAPPING),
    "glance_16": ("backbones/glance.py", GLANCE),
}


def fingerprints(package: Path) -> dict[str, str]:
    return {
        str(file.relative_to(package)): hashlib.sha256(file.read_bytes()).hexdigest() for file in package.rglob("*.py")
    }


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A copy of the package with the two files in it."""
    root = tmp_path_factory.mktemp("house")
    source = Path(sightline.__file__).parent
    shutil.copytree(source, root / "sightline", ignore=shutil.ignore_patterns("__pycache__"))
    for file, text in ADDED.values():
        assert not (root / "sightline" / file).exists()
        (root / "sightline" / file).write_text(dedent(text).lstrip())
    added = fingerprints(root / "sightline").items() - fingerprints(source).items()
    assert {name for name, _ in added} == {file for file, _ in ADDED.values()}
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 23, 3), dtype=np.uint8)).save(root / "picture.png")
    return root


def run(house: Path, script: str) -> str:
    """Runs Python code with the copied package in a process of its own, and returns what it prints."""
    begin = (
        "import sys, warnings\n"
        "warnings.simplefilter('error')\n"
        "import torch; torch.set_num_threads(1)\n"
        "import sightline; assert sightline.__file__.startswith(sys.argv[1]), sightline.__file__\n"
        "from sightline.cli.main import main\n"
        "def cli(*words, status=0):\n"
        "    try: main(words)\n"
        "    except SystemExit as left: assert (left.code or 0) == status, (words, left.code)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(house), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", begin + dedent(script), str(house)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=house, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_both_are_listed_trained_answer_and_are_explained(house):
    before = fingerprints(house / "sightline")
    out = run(
        house,
        f"""
        cli("models", "*_16", "--json")
        for name in {list(ADDED)}:
            cli("train", "builtin:digits", "--model", name, "--epochs", "0.5", "--image-size", "16", "--workers", "0",
                "--out", name, "--json")
            cli("evaluate", name, "builtin:digits", "--json")
            cli("predict", name, "picture.png", "--json")
            cli("explain", name, "picture.png", "--out", name + "-explained", "--json")
            cli("train", "builtin:digits", "--weights", name, "--epochs", "0.1", "--image-size", "24x20",
                "--workers", "0", "--out", name + "-tuned", "--json")
            cli("convert", name, "--to", "sightline", "--out", name + "-copy", "--json")
            for layout in ("timm", "transformers", "google"):
                cli("convert", name, "--to", layout, "--out", "converted", status=2)
        """,
    )
    documents = iter(map(json.loads, out.splitlines()))
    counted = {row["name"]: row["parameters"] for row in next(documents)["models"]}
    for name, (file, _) in ADDED.items():
        assert counted[name] > 0
        trained, evaluated, predicted, explained, tuned, copied = (next(documents) for _ in range(6))
        assert trained["counts"]["evaluated"] == 359
        assert evaluated["metrics"] == trained["metrics"]
        assert predicted["results"][0]["predictions"][0]["label"] in set("0123456789")
        assert explained["results"][0]["predictions"][0] == predicted["results"][0]["predictions"][0]
        with np.load(house / explained["results"][0]["arrays"]) as arrays:
            assert arrays["rollout"].shape == (4, 4), file
            assert arrays["heads"].shape[0] == arrays["distance"].shape[0] == (3 if name == "glance_16" else 2)
        assert (house / explained["results"][0]["page"]).is_file()
        assert tuned["counts"] == trained["counts"]
        assert copied["written"]["tensors"] == copied["read"]["tensors"]
    assert not (house / "converted").exists()
    assert fingerprints(house / "sightline") == before


def test_the_contract_of_every_model_holds_for_both(house):
    """What `test_networks.py` asks of each registered model, briefly."""
    run(
        house,
        f"""
        import json
        from sightline.network import Architecture, count_parameters, describe
        from sightline.registry import variants
        for name in {list(ADDED)}:
            architecture = describe(name)
            assert count_parameters(architecture.lay_out()) == variants()[name].parameters, (
                count_parameters(architecture.lay_out()))
            assert Architecture.from_json(json.loads(json.dumps(architecture.to_json()))) == architecture
            network = architecture.build().train()
            torch.nn.init.normal_(network.head.classifier.weight)
            output = network(torch.randn(2, 3, 16, 24))
            assert output.shape == (2, 10)
            output.square().sum().backward()
            assert all(p.grad is not None for p in network.parameters())
            assert len(network.backbone.stages(torch.randn(1, 3, 16, 24))) == network.backbone.depth
        """,
    )
