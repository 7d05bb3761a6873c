"""A model as its owner holds it: a network, the pixels it expects, and the names of its classes."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from sightline.checkpoints.directory import write_model
from sightline.checkpoints.load import load_bundle
from sightline.device import pick_device, pick_precision
from sightline.errors import UserError, printable
from sightline.explanation.files import explain_source
from sightline.explanation.result import Explanation
from sightline.images.decode import Source
from sightline.images.preprocess import Preprocess
from sightline.inference.predictor import Predictor
from sightline.inference.zero_shot import ZeroShotNetwork, class_vectors
from sightline.network import ImageTextNetwork, Network
from sightline.texts.byte_pairs import Vocabulary
from sightline.texts.vocabularies import read_vocabulary
from sightline.types import Reply


@dataclass
class Model:
    """What `sightline.load` gives.

    `network` maps pixels to the task's output, `preprocess` any image to the pixels it expects; `labels` are the class
    names in order of the outputs. `coverage` says how each tensor of a foreign file was used.
    """

    network: Network
    preprocess: Preprocess
    labels: Sequence[str]
    task: str = "classify"
    coverage: Any = None
    vocabulary: Vocabulary | None = None

    def merged(self, r: int) -> "Model":
        """The same model with `r` patches merged in every layer: faster, a little less exact (arXiv 2210.09461).

        The weights are the same tensors. 0 merges none. A saved model does not merge: it is what `load` is asked for.
        Raises UserError where the network is no plain Vision Transformer.
        """
        return replace(self, network=self.network.merged(r))

    def predictor(
        self,
        *,
        labels: Sequence[str] | None = None,
        prompts: Sequence[str] | None = None,
        device: str = "auto",
        precision: str = "auto",
        **settings: Any,
    ) -> Predictor:
        """What answers many images fast; `settings` are those of `Predictor`.

        A network that reads texts answers with one of `labels`, whatever they are; each is asked for in the sentences
        of `prompts`, which have {} in its place. Raises UserError where another network is given either.
        """
        where = pick_device(device)
        how = pick_precision(precision, where)
        self.network.to(where)
        network, names = self.asked(labels, prompts)
        return Predictor(network, self.preprocess, names, device=where, precision=how, **settings)

    @property
    def words(self) -> Vocabulary:
        """The vocabulary of a network that reads texts. Raises UserError where it is not known, or there is none."""
        if not isinstance(self.network, ImageTextNetwork):
            raise UserError("this model reads no texts, so it has no vocabulary")
        if self.vocabulary is None:
            raise UserError(
                'the vocabulary of this model is not known: it comes with open_clip (pip install "sightline[clip]"), '
                "or name its file with vocabulary=…"
            )
        return self.vocabulary

    def tokenize(self, texts: str | Sequence[str]) -> Int[Tensor, "k n"]:
        """Texts as the token ids that `network.encode_text` reads, [texts, context length]."""
        return self.words(texts, self.network.architecture.head.context_length)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "k d"]:
        """The vector of each text, [texts, width] in float32, to be compared with those of `embed` by their cosine."""
        words, network = self.tokenize(texts), self.network
        assert isinstance(network, ImageTextNetwork)
        return network.eval().encode_text(words.to(next(network.parameters()).device)).float().cpu()

    def predict(self, sources: Iterable[Source], *, top: int = 5, **settings: Any) -> list[Reply]:
        """The answer for each image, in order; `settings` are those of `predictor`.

        Images are paths, bytes, PIL images or uint8 arrays. Raises UserError at the first that cannot be read.
        """
        answers = []
        for answer in self.predictor(top=top, **settings).predict(_several(sources)):
            if answer.prediction is None:
                raise UserError(f"{printable(answer.path)}: {answer.error}")
            answers.append(answer.prediction)
        return answers

    def embed(self, sources: Iterable[Source], **settings: Any) -> Float[Tensor, "n d"]:
        """The feature vector of each image, [n, width] in float32. Raises UserError where one cannot be read."""
        return self.predictor(**settings).embed(_several(sources))

    def explain(
        self,
        source: Source,
        *,
        labels: Sequence[str] | None = None,
        prompts: Sequence[str] | None = None,
        **settings: Any,
    ) -> Explanation:
        """What the network attends to in one image; `settings` are those of `explain`.

        A network that reads texts tells where those of `labels` are, each said in the sentences of `prompts`.
        """
        network, names = self.asked(labels, prompts)
        return explain_source(network, self.preprocess, source, labels=names, **settings)

    def asked(self, labels: Sequence[str] | None, prompts: Sequence[str] | None) -> tuple[Any, Sequence[str]]:
        """The network, and what it chooses from: its own classes or, where it reads texts, any that are named.

        Raises UserError where a network that reads no texts is given some.
        """
        if isinstance(self.network, ImageTextNetwork):
            names = self.labels if labels is None else labels
            if not names:
                return self.network, ()
            return ZeroShotNetwork(self.network, class_vectors(self.network, self.words, names, prompts)), names
        if labels is not None or prompts is not None:
            raise UserError("this model reads no texts: it answers with the classes that it has learned")
        return self.network, self.labels

    def save(self, directory: str | Path) -> Path:
        """Writes a model directory that `load` reads; all of it or nothing."""
        return write_model(Path(directory), self.network, self.preprocess, self.labels, vocabulary=self.vocabulary)


def _several(sources: Iterable[Source]) -> Iterable[Source]:
    one = isinstance(sources, (str, os.PathLike, bytes, bytearray, Image.Image))
    if one or getattr(sources, "ndim", 4) < 4:
        raise UserError("predict and embed take a list of images, even for one: model.predict(['cat.jpg'])")
    return sources


def load(
    source: str | Path,
    *,
    architecture: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    vocabulary: str | Path | None = None,
    **overrides: Any,
) -> Model:
    """A model from disk, from a hub where `source` begins with `hf:`, or one that ships, such as `builtin:tiny`.

    `source` is a model directory of this project, a transformers or timm directory, or a bare `.safetensors`, `.pth`,
    `.bin` or Google `.npz` file; `architecture` names the model where a file cannot tell. `image_size` resamples the
    positions to another resolution by the method of the library that wrote them; `num_classes` gives a new, zero head
    where it differs. `vocabulary` is a file or folder with the words of a network that reads texts, where none lies
    beside it. Every tensor is used or the load fails and names it, as it is called on disk. Raises UserError.
    """
    bundle = load_bundle(source, architecture=architecture, image_size=image_size, num_classes=num_classes, **overrides)
    words = bundle.vocabulary
    if vocabulary is not None:
        words = _fitting(read_vocabulary(vocabulary), bundle.network, printable(vocabulary))
    return Model(bundle.network, bundle.preprocess, bundle.labels, bundle.task, bundle.coverage, words)


def _fitting(vocabulary: Vocabulary, network: Network, where: str) -> Vocabulary:
    size = getattr(network.architecture.head, "vocab_size", None)
    if size != len(vocabulary):
        reads = "reads no texts" if size is None else f"reads {size}"
        raise UserError(f"the vocabulary of {where} has {len(vocabulary)} tokens, and the network {reads}")
    return vocabulary
