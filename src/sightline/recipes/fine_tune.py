"""Teaching a network that has learned before: its head is taken off, a new one starts at zero."""

from dataclasses import replace

from sightline.images.augment import Augment
from sightline.images.preprocess import Preprocess
from sightline.network import Architecture, Network, count_parameters
from sightline.recipes.from_scratch import SMALL, teaching
from sightline.recipes.recipe import Facts, Recipe
from sightline.training.settings import Settings

SHIPPED = "builtin:tiny"
"""The weights that come with Sightline."""

SIDE, EACH, MOST = 32, 40, 5_000
"""Pixels along the shorter side from which, images of each class up to which, and images in all below which learning
from `SHIPPED` was ahead of learning from random weights (docs/decisions/0018-weights-that-ship.md)."""


def ahead_of_scratch(facts: Facts) -> bool:
    """Whether the weights that ship are the better start for such images, by what was measured."""
    return facts.side >= SIDE and facts.images <= EACH * facts.classes and facts.images < MOST


def fine_tune(facts: Facts, architecture: Architecture, preprocess: Preprocess) -> Recipe:
    """A present-day default: AdamW whose rate falls towards the input (arXiv 2106.08254), random crops, smoothing."""
    epochs = min(max(round(20_000 / facts.images), 5), 50)
    return Recipe(
        "fine-tune",
        _with_stochastic_depth(architecture),
        preprocess,
        Augment(
            crop="resized",
            crop_scale=(0.4, 1.0),
            horizontal_flip=facts.mirroring.horizontal / 2,
            vertical_flip=facts.mirroring.vertical / 2,
            brightness=0.2,
            contrast=0.2,
            saturation=0.2,
        ),
        Settings(
            epochs=epochs,
            batch_size=min(64, max(facts.images // 8, 2)) // 2 * 2,
            lr=5e-4,
            layer_decay=0.75,
            weight_decay=0.05,
            warmup=0.1,
            smoothing=0.1,
        ),
        ("the weights have learned before, so layers near the input change least", facts.mirroring.why),
    )


def _with_stochastic_depth(architecture: Architecture) -> Architecture:
    """The architecture with a tenth of its last branch dropped, where its family has such a setting."""
    if not hasattr(architecture.backbone, "drop_path_rate"):
        return architecture
    return replace(architecture, backbone=replace(architecture.backbone, drop_path_rate=0.1))


def fine_tune_as_published(facts: Facts, architecture: Architecture, preprocess: Preprocess) -> Recipe:
    """Fine-tuning of arXiv 2010.11929, appendix B.1.1: SGD with momentum, no weight decay, cosine, clipping at 1.

    The paper reads larger images than it learned from (384 pixels after 224); `train` does so with `--image-size`,
    and positions are resampled in two dimensions. 500 steps of 512 images suffice for small sets in the paper; here a
    batch is at most half of the images.
    """
    batch = min(512, max(facts.images // 2, 2)) // 2 * 2
    return Recipe(
        "fine-tune-as-published",
        architecture,
        preprocess,
        Augment(crop="resized", crop_scale=(0.05, 1.0), horizontal_flip=facts.mirroring.horizontal / 2),
        Settings(
            epochs=max(500 * batch / facts.images, 1),
            batch_size=batch,
            optimizer="sgd",
            lr=0.01,
            weight_decay=0.0,
            clip_grad=1.0,
            warmup=0.1,
        ),
        ("the paper's fine-tuning was asked for", facts.mirroring.why),
    )


def fine_tune_small(facts: Facts, architecture: Architecture, preprocess: Preprocess) -> Recipe:
    """A small network that has learned before, taught further as it was taught from random weights, at half the rate.

    What small networks bear on small images: Muon, slight turns and shifts, no crops (`from_scratch`).
    """
    why = "the weights have learned before, so that the rate is half of what random ones bear (--weights none)"
    like = teaching(facts, architecture, [why], None)
    return replace(
        like,
        name="fine-tune-small",
        preprocess=replace(preprocess, resize=like.preprocess.resize),
        settings=replace(like.settings, lr=like.settings.lr / 2),
    )


def usual(network: Network) -> str:
    """The recipe of those that ask for none: small networks bear what random weights do, and learn more from it."""
    return "fine-tune-small" if count_parameters(network) < SMALL else "fine-tune"


RECIPES = {
    "fine-tune": fine_tune,
    "fine-tune-small": fine_tune_small,
    "fine-tune-as-published": fine_tune_as_published,
}
