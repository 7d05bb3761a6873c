"""How each objective is run: at a small scale chosen by the images, and as its paper has it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sightline.errors import UserError, suggest
from sightline.images.augment import Augment
from sightline.images.preprocess import Preprocess
from sightline.network import Architecture, describe
from sightline.recipes.from_scratch import from_scratch
from sightline.recipes.recipe import SHOWN, Facts, Recipe
from sightline.registry import variant
from sightline.training.settings import Settings


@dataclass(frozen=True)
class Scale:
    """What an objective wants of a run at one scale, where that differs from what is usual.

    `views` are the training images that it sees, repetitions counted; `model` is what the paper takes; `finest` is as
    `from_scratch` has it: where each patch answers for itself alone, its token tells more of small images' few pixels.
    """

    views: int = 100_000
    model: str | None = None
    finest: int = 2
    network: Mapping[str, Any] = field(default_factory=dict)
    augment: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


_MEAN = {"tokenizer": "patch", "global_pool": "avg", "final_norm": True}
_CALM = {"optimizer": "adamw", "batch_size": 64, "weight_decay": 0.05, "warmup": 0.1, "clip_grad": 1.0}
_MUON = {"optimizer": "muon", "lr": 2e-3, "beta2": 0.99, "batch_size": 32}
_GENTLE = {"crop": "resized", "crop_scale": (0.5, 1.0)}
_FINE = Scale(
    finest=1,
    network=_MEAN,
    augment=_GENTLE,
    settings={**_CALM, **_MUON},
    options={"mask_ratio": 0.3, "summary": 1.0},
)

SMALL: Mapping[str, Scale] = {
    "mae": Scale(
        views=200_000,
        network=_MEAN,
        augment=_GENTLE,
        settings={**_CALM, **_MUON},
        options={"mask_ratio": 0.5, "norm_pix": False, "summary": 1.0}
        | {"decoder_dim": 64, "decoder_depth": 1, "decoder_heads": 2},
    ),
    "masked-patch": _FINE,
    "simmim": _FINE,
    "codebook": Scale(
        views=20_000,
        model="dvae_small_4_32",
        augment=_GENTLE,
        settings={**_CALM, "batch_size": 32, "lr": 3e-3, "weight_decay": 0.0, "ema": None},
        options={"kl_weight": 0.0, "use_weight": 20.0, "standardised": True, "decoder_dim": 32},
    ),
    "beit": Scale(
        network=_MEAN, augment=_GENTLE, settings={**_CALM, **_MUON}, options={"mask_ratio": 0.2, "summary": 3.0}
    ),
    "dino": Scale(
        views=60_000,
        network={"global_pool": "avg"},
        augment={"brightness": 0.4, "contrast": 0.4, "grey": 0.2},
        settings={**_CALM, **_MUON, "batch_size": 64, "clip_grad": 3.0, "clip_each": True, "min_lr": 0.01},
        options={
            "prototypes": 256,
            "hidden_dim": 256,
            "bottleneck_dim": 64,
            "student_temperature": 0.05,
            "warm_teacher_temperature": 0.02,
            "teacher_temperature": 0.02,
            "momentum": 0.99,
            "centring": "sinkhorn",
            "koleo": 0.1,
            "global_scale": (0.7, 1.0),
            "local_crops": 0,
            "colour": 0.0,
        },
    ),
    "supervised": Scale(options={"smoothing": 0.1, "mixup": 0.15}),
    "distill": Scale(
        network={"tokenizer": "patch", "distillation_token": True, "distilled": True},
        options={"kind": "soft", "smoothing": 0.1, "mixup": 0.15},
    ),
    "noisy-student": Scale(augment={"randaugment": 2}, options={"smoothing": 0.0, "mixup": 0.15}),
}

_ADAMW = {"optimizer": "adamw", "weight_decay": 0.05, "clip_grad": None}
_FLIPPED = {"crop": "resized", "horizontal_flip": 0.5}

PUBLISHED: Mapping[str, Scale] = {
    # arXiv 2111.06377, table 8.
    "mae": Scale(
        model="mae_vit_base_patch16_224",
        augment={**_FLIPPED, "crop_scale": (0.2, 1.0)},
        settings={**_ADAMW, "epochs": 800, "batch_size": 4096, "lr": 2.4e-3, "beta2": 0.95, "warmup": 0.05},
    ),
    # arXiv 2010.11929, appendix B.1.2, which names no weight decay.
    "masked-patch": Scale(
        model="vit_base_patch16_224",
        augment=_FLIPPED,
        settings={**_ADAMW, "epochs": 14, "batch_size": 4096, "lr": 2e-4, "warmup": 0.01, "weight_decay": 0.0},
    ),
    # arXiv 2106.08254, appendix G, and the authors' code.
    "beit": Scale(
        model="beit_base_patch16_224",
        network={"positions": "relative_shared", "drop_path_rate": 0.1},
        augment={**_FLIPPED, "crop_scale": (0.08, 1.0), "brightness": 0.4, "contrast": 0.4, "saturation": 0.4},
        settings={**_ADAMW, "epochs": 800, "batch_size": 2048, "lr": 1.5e-3, "warmup": 10 / 800, "clip_grad": 3.0}
        | {"min_lr": 1e-5 / 1.5e-3},
    ),
    # arXiv 2104.14294, appendix C, and the authors' code (100 epochs).
    "dino": Scale(
        model="dino_vits16",
        network={"drop_path_rate": 0.1},
        settings={**_ADAMW, "epochs": 100, "batch_size": 1024, "lr": 2e-3, "warmup": 0.1, "min_lr": 1e-6 / 2e-3}
        | {"weight_decay": 0.04, "weight_decay_end": 0.4, "clip_grad": 3.0, "clip_each": True},
    ),
    # arXiv 2010.11929, table 3 (ImageNet-21k).
    "supervised": Scale(
        model="vit_base_patch16_224",
        network={"proj_drop_rate": 0.1, "pos_drop_rate": 0.1},
        augment=_FLIPPED,
        settings={**_ADAMW, "epochs": 90, "batch_size": 4096, "lr": 1e-3, "weight_decay": 0.03, "sched": "linear"},
    ),
    # arXiv 2012.12877, table 9.
    "distill": Scale(
        model="deit_small_distilled_patch16_224",
        network={"drop_path_rate": 0.1},
        augment={**_FLIPPED, "randaugment": 2, "erasing": 0.25},
        settings={**_ADAMW, "epochs": 300, "batch_size": 1024, "lr": 1e-3, "warmup": 5 / 300, "min_lr": 0.01},
        options={"smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0},
    ),
}

RECIPES = ("small", "published")


def small(objective: str, facts: Facts, model: str | None, overrides: Mapping[str, Any]) -> Recipe:
    """A run of minutes on two cores, its network chosen by the images; `facts.classes` is 0 where none are learned."""
    scale = SMALL[objective]
    minutes = None
    network = {**scale.network, **overrides}
    if scale.model is not None and model is None:
        size = network.pop("image_size", None) or beside(objective, from_scratch(facts, tokenizer="patch").architecture)
        architecture = describe(scale.model, facts.classes, size, **network)
        base = from_scratch(facts, model=scale.model, minutes=minutes, image_size=size)
        base = replace(base, architecture=architecture, preprocess=_contract(architecture, base.preprocess))
    else:
        base = from_scratch(facts, model=model, minutes=minutes, finest=scale.finest, **network)
        if model is not None:
            base = replace(base, preprocess=_contract(base.architecture, base.preprocess))
    settings = dict(scale.settings)
    if objective in ("supervised", "distill", "noisy-student"):  # which are taught as every classifier
        length = base.settings.epochs
    else:
        length = min(max(round(scale.views / facts.images), 2), 300)
        settings["batch_size"] = min(settings["batch_size"], max(facts.images // 4, 2)) // 2 * 2
    plain = {"smoothing": 0.0, "mixup": 0.0, "epochs": float(length)}
    flips = {"horizontal_flip": facts.mirroring.horizontal / 2, "vertical_flip": facts.mirroring.vertical / 2}
    kept = {} if objective in ("supervised", "distill", "noisy-student", "dino") else _still(base.augment)
    return replace(
        base.told({**plain, **settings}, {**kept, **flips, **scale.augment}),
        name=f"{objective}, small",
        objective=objective,
        options=dict(scale.options),
        reasons=(*base.reasons[:2], f"{length:g} {SHOWN} {length * facts.images:,.0f} images"),
    )


def beside(objective: str, other: Architecture) -> tuple[int, int]:
    """Pixels (height, width) at which the small network of an objective has a cell for each token of another network.

    So large an image is what a codebook gets to read beside a network that learns its words, and all that it costs.
    """
    step = describe(str(SMALL[objective].model)).backbone.patch_size
    grid = other.lay_out().backbone.grid_of(other.backbone.image_size)
    return grid[0] * step[0], grid[1] * step[1]


def published(objective: str, facts: Facts, model: str | None, overrides: Mapping[str, Any]) -> Recipe:
    """The run as the paper has it, for many machines; a batch is at most half of the images."""
    if objective not in PUBLISHED:
        raise UserError(f"{objective} has no recipe as published; those that have: {', '.join(PUBLISHED)}")
    scale = PUBLISHED[objective]
    name = model or str(scale.model)
    architecture = describe(name, facts.classes, **{**({} if model else scale.network), **overrides})
    settings = dict(scale.settings)
    settings["batch_size"] = min(settings["batch_size"], max(facts.images // 2, 2)) // 2 * 2
    return Recipe(
        f"{objective}, as published",
        architecture,
        _contract(architecture, Preprocess(architecture.backbone.image_size)),
        Augment.from_json(scale.augment),
        Settings(**settings),
        ("the paper's run was asked for",),
        objective,
        dict(scale.options),
    )


def chosen(recipe: str, objective: str, facts: Facts, model: str | None, overrides: Mapping[str, Any]) -> Recipe:
    """One of `RECIPES` for an objective. Raises UserError for another name."""
    if recipe not in RECIPES:
        raise UserError(f"unknown recipe '{recipe}'.{suggest(recipe, RECIPES)} There are {', '.join(RECIPES)}.")
    return (small if recipe == "small" else published)(objective, facts, model, overrides)


def _contract(architecture: Architecture, usual: Preprocess) -> Preprocess:
    """The pixels that a registered network expects, at the size of this one, squashed where the usual ones are."""
    told = {key: value for key, value in variant(architecture.name).preprocess.items() if key in ("mean", "std")}
    return usual.replace(size=architecture.backbone.image_size, **told)


def _still(augment: Augment) -> dict[str, Any]:
    """No turning and no shearing: what is seen has to be found again where it stood."""
    return {"degrees": 0.0, "translate": 0.0, "shear": 0.0, "zoom": (1.0, 1.0)}
