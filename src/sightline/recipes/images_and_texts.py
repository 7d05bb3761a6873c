"""The task that brings images and texts into one space."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sightline.checkpoints.files import read_sealed
from sightline.checkpoints.load import load_bundle
from sightline.checkpoints.sealed import sealed
from sightline.datasets.captions import captions_of, has_captions
from sightline.datasets.image_set import ImageSet
from sightline.datasets.loader import Joint, Picture
from sightline.datasets.open import open_dataset
from sightline.datasets.shards import kinds_in
from sightline.datasets.split import Splits
from sightline.errors import UserError, printable
from sightline.evaluation.measure import Measure
from sightline.evaluation.retrieval import Retrieval
from sightline.evaluation.zero_shot import ZeroShot
from sightline.heads.zero_shot import ClipConfig
from sightline.images.augment import Augment, Augmented
from sightline.images.decode import decode
from sightline.images.preprocess import Preprocess
from sightline.inference.zero_shot import class_vectors
from sightline.network import Network
from sightline.objectives.clip import Contrastive
from sightline.recipes.from_scratch import from_scratch
from sightline.recipes.recipe import Facts, Recipe
from sightline.recipes.task import Task
from sightline.reports.captions import CaptionsReport
from sightline.schema import from_json, require
from sightline.texts import vocabularies
from sightline.texts.byte_pairs import Vocabulary
from sightline.training.settings import Settings

LONGEST = 77
"""Most tokens of a caption that are read where no network says otherwise."""

VOCABULARY = 1024
"""Tokens of a vocabulary that is learned from the captions, at most."""

BATCH = 128
"""Pairs that are compared with each other, where there are enough: each is an example of what does not fit."""

_KEPT = "texts.json"


class Captioned(Joint):
    """Pixels with the token ids of a caption: of one, drawn by the sample's key, or of all of them.

    An image with a class in place of captions keeps the class.
    """

    def __init__(self, transform: Preprocess | Augmented, vocabulary: Vocabulary, length: int, *, every: bool):
        self.transform, self.vocabulary, self.length, self.every = transform, vocabulary, length, every

    def __call__(self, image: Picture, marks: Any, key: int) -> tuple[Float[Tensor, "c rows columns"], Any]:
        if isinstance(self.transform, Preprocess):
            pixels = self.transform(image)
        else:
            pixels = self.transform(image if isinstance(image, np.ndarray) else decode(image), key)
        if isinstance(marks, int):
            return pixels, marks
        captions = captions_of(marks)
        ids = self.vocabulary(captions if self.every else captions[key % len(captions)], self.length)
        return pixels, ids if self.every else ids[0]

    def together(self, targets: Sequence[Any]) -> Any:
        if isinstance(targets[0], int):
            return torch.tensor(targets)
        return tuple(targets) if self.every else torch.stack(list(targets))


class ImagesAndTexts(Task):
    """Captions, told apart by contrast.

    `vocabulary` and `length` say how texts are read, `templates` in which sentences classes are asked for.
    """

    name = "clip"
    score = "image_to_text_r1"
    report = CaptionsReport

    def __init__(
        self, vocabulary: Vocabulary | None = None, length: int = LONGEST, templates: Sequence[str] | None = None
    ):
        self.vocabulary, self.length, self.templates = vocabulary, length, templates

    @property
    def reads(self) -> Vocabulary:
        """The vocabulary, which a task that is bound to data or to a model has."""
        if self.vocabulary is None:
            raise UserError(
                'the words of this network are not known here: install open_clip (pip install "sightline[clip]"), or '
                "name a vocabulary file"
            )
        return self.vocabulary

    def open(self, source: str | Path, seed: int) -> Splits:
        """Images with captions, or with classes whose names are the texts."""
        if str(source).startswith("builtin:") or has_captions(Path(source)):
            return open_dataset(source, task=self.name, seed=seed)
        kinds = kinds_in(Path(source))
        classes = Path(source).exists() if kinds is None else "cls" in kinds and "txt" not in kinds
        return open_dataset(source, task="classify" if classes else self.name, seed=seed)

    def bound(self, splits: Splits, weights: Any = None, kept: Path | None = None) -> "ImagesAndTexts":
        if splits.train.samples.marks is None:
            raise UserError(
                f"{printable(splits.source)} has no captions to learn from: images with texts are a CSV with "
                "path,caption, a JSONL file of the same, or shards with KEY.txt"
            )
        if kept is not None:
            data, where = read_sealed(kept / _KEPT), printable(kept / _KEPT)
            require(type(data.get("length")) is int, f"{where} does not say how long texts are")
            return ImagesAndTexts(vocabularies.from_json(data, where), data["length"])
        captions = [caption for marks in splits.train.samples.marks for caption in captions_of(marks)]
        most, vocabulary = LONGEST, None
        if weights is not None and str(weights) != "none":
            bundle = load_bundle(weights)
            if bundle.task == self.name:
                most, vocabulary = bundle.architecture.head.context_length, bundle.vocabulary
                vocabulary = ImagesAndTexts(vocabulary).reads
        if vocabulary is None:
            vocabulary = vocabularies.learned(captions, VOCABULARY)
        longest = max(len(vocabulary.encode(caption)) for caption in set(captions))
        return ImagesAndTexts(vocabulary, min(longest + 2, most))

    def kept(self) -> Mapping[str, bytes]:
        return {_KEPT: sealed({"length": self.length, **vocabularies.to_json(self.reads)})}

    def for_model(self, model: Any, templates: Sequence[str] | None = None) -> "ImagesAndTexts":
        return ImagesAndTexts(model.vocabulary, model.network.architecture.head.context_length, templates)

    def aligned(self, labels: Sequence[str], images: ImageSet, data: str) -> ImageSet:
        return images  # any class can be named, and captions have none

    def varied(self, augment: Augment, preprocess: Preprocess) -> Captioned:
        return Captioned(augment.bind(preprocess), self.reads, self.length, every=False)

    def prepared(self, preprocess: Preprocess) -> Captioned:
        return Captioned(preprocess, self.reads, self.length, every=True)

    def head(self, facts: Facts) -> Mapping[str, Any]:
        return {"vocab_size": len(self.reads), "context_length": self.length}

    def from_scratch(
        self,
        facts: Facts,
        *,
        model: str | None = None,
        minutes: float | None = None,
        pace: Callable[[Recipe], float] | None = None,
        **overrides: Any,
    ) -> Recipe:
        """The image tower that classes would get, and beside it a small one for texts with a vocabulary of its own."""
        known = {field.name for field in fields(ClipConfig)}
        mine = {name: value for name, value in overrides.items() if name in known}
        rest = {name: value for name, value in overrides.items() if name not in known}
        with_texts = partial(self._with_texts, facts=facts, told=mine)
        paced = None if pace is None else lambda recipe: pace(with_texts(recipe))
        plain = replace(facts, classes=0)
        return with_texts(from_scratch(plain, model=model, minutes=minutes, pace=paced, **rest))

    def _with_texts(self, recipe: Recipe, *, facts: Facts, told: Mapping[str, Any]) -> Recipe:
        image, width = recipe.architecture, recipe.architecture.lay_out().backbone.width
        heads = getattr(image.backbone, "num_heads", 1)
        small = {
            **{"projection_dim": width, "text_width": width, "text_depth": 3, "text_activation": "gelu"},
            **{"text_heads": heads if isinstance(heads, int) and width % heads == 0 else 1, "text_mlp_dim": 2 * width},
        }
        usual = vars(image.head) if image.task == self.name else small
        head = from_json(ClipConfig, {**usual, "eos_token_id": None, **self.head(facts), **told}, "the text tower")
        words = f"texts are read by a small Transformer in {len(self.reads):,} byte pairs learned from the captions"
        adapted = replace(recipe, architecture=replace(image, task=self.name, head=head))
        return self.adapted(replace(adapted, reasons=(*recipe.reasons, words)), facts.images)

    def adapted(self, recipe: Recipe, images: int = 2**20) -> Recipe:
        batch = max(min(BATCH, images // 4), 8) // 2 * 2
        settings = replace(recipe.settings, smoothing=0.0, mixup=0.0, cutmix=0.0, batch_size=batch)
        return replace(recipe, settings=settings)

    def objective(self, network: Network, settings: Settings) -> Contrastive:
        super().objective(network, settings)  # which refuses what mixes labels
        return Contrastive(network)  # ty: ignore[invalid-argument-type]  (networks with this head read texts)

    def noise(self, images: int, size: tuple[int, int]) -> Int[Tensor, "b n"]:
        return torch.arange(images * self.length).reshape(images, -1) % len(self.reads)

    def measure(self, images: ImageSet, preprocess: Preprocess) -> Measure:
        if images.samples.marks is not None:
            return Retrieval()
        of = partial(class_vectors, vocabulary=self.reads, labels=images.classes, templates=self.templates)
        return ZeroShot(len(images.classes), of)


TASKS = {"clip": ImagesAndTexts()}
