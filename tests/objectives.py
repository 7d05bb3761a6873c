"""Each objective on a small network, and a batch as the loader would hand it over."""

import numpy as np
import torch
from torch import nn

from sightline.images.augment import Augment, sample_keys
from sightline.images.preprocess import Preprocess
from sightline.network import Network, create_model
from sightline.objectives.beit import Words
from sightline.objectives.distill import Teacher
from sightline.objectives.objective import Objective
from sightline.registry import table
from sightline.types import Batch

SIZE = (24, 40)
SMALL = {"image_size": SIZE, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
WORDS = {"image_size": SIZE, "hidden": 4, "groups": 2, "blocks": 1, "vocab_size": 7}
OPTIONS = {
    "mae": {"mask_ratio": 0.6, "decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2},
    "dino": {"prototypes": 11, "hidden_dim": 10, "bottleneck_dim": 6, "local_crops": 3, "ibot": 1.0, "koleo": 0.1},
    "codebook": {"decoder_input": 5, "kl_weight": 1.0},
    "distill": {"mixup": 0.4, "kind": "soft"},
}
NAMES = [name for name, kind in table("objectives", "OBJECTIVES").items() if kind.task is None]
PIXELS = Preprocess(SIZE)


def words() -> Words:
    """An untrained codebook whose words differ."""
    network = create_model("dvae_small_4_32", 0, **WORDS)
    nn.init.normal_(network.backbone.output.weight, std=9.0)
    return Words(network)


def network_for(name: str, **settings) -> Network:
    """A network that the objective can teach, every parameter of which matters."""
    kind = table("objectives", "OBJECTIVES")[name]
    if name == "codebook":
        return create_model("dvae_small_4_32", 0, **WORDS)
    two = {"distillation_token": True, "distilled": True} if name == "distill" else {}
    network = create_model("vit_tiny_patch16_224", 3 if kind.labelled else 0, **{**SMALL, **two, **settings})
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def objective(name: str, **options) -> Objective:
    """The objective with small parts of its own."""
    kind = table("objectives", "OBJECTIVES")[name]
    given = {}
    if name == "beit":
        given["words"] = words()
    if name == "distill":
        given["teacher"] = Teacher(create_model("vit_tiny_patch16_224", 3, **SMALL), PIXELS, PIXELS, [2, 0, 1])
    if name == "noisy-student":
        given["answers"] = torch.randn(8, 3).softmax(dim=1)
    return kind(network_for(name), kind.Config(**{**OPTIONS.get(name, {}), **options}), **given).train()


def contract(name: str) -> Preprocess:
    """The pixels that the objective's network reads."""
    return Preprocess(SIZE, mean=(-0.125,) * 3, std=(1.25,) * 3) if name == "codebook" else PIXELS


def batch(taught: Objective, name: str, count: int = 4, seed: int = 0) -> Batch:
    """Random pictures as the objective wants to see them."""
    see = taught.views(Augment(crop="resized"), contract(name))
    pictures = np.random.default_rng(seed).integers(0, 256, (count, 30, 50, 3), dtype=np.uint8)
    keys = sample_keys(seed, 0, np.arange(count))
    seen = [see(picture, int(key)) for picture, key in zip(pictures, keys, strict=True)]
    pixels, *views = zip(*(one if isinstance(one, tuple) else (one,) for one in seen), strict=True)
    index = torch.arange(count)
    further = tuple(torch.stack(view) for view in views)
    return Batch(torch.stack(pixels), index % 3, index, torch.from_numpy(keys), None, further)
