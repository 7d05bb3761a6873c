"""A model as its owner holds it: a network, the pixels it expects, and the names of its classes."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
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
from sightline.network import Network
from sightline.types import Prediction


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

    def predictor(self, *, device: str = "auto", precision: str = "auto", **settings: Any) -> Predictor:
        """What answers many images fast; `settings` are those of `Predictor`."""
        where = pick_device(device)
        how = pick_precision(precision, where)
        return Predictor(self.network, self.preprocess, self.labels, device=where, precision=how, **settings)

    def predict(self, sources: Iterable[Source], *, top: int = 5, **settings: Any) -> list[Prediction]:
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

    def explain(self, source: Source, **settings: Any) -> Explanation:
        """What the network attends to in one image; `settings` are those of `explain`."""
        return explain_source(self.network, self.preprocess, source, **settings)

    def save(self, directory: str | Path) -> Path:
        """Writes a model directory that `load` reads; all of it or nothing."""
        return write_model(Path(directory), self.network, self.preprocess, self.labels)


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
    **overrides: Any,
) -> Model:
    """A model from disk or, where `source` begins with `hf:`, from a hub.

    `source` is a model directory of this project, a transformers or timm directory, or a bare `.safetensors`, `.pth`,
    `.bin` or Google `.npz` file; `architecture` names the model where a file cannot tell. `image_size` resamples the
    positions to another resolution by the method of the library that wrote them; `num_classes` gives a new, zero head
    where it differs. Every tensor is used or the load fails and names it, as it is called on disk. Raises UserError.
    """
    bundle = load_bundle(source, architecture=architecture, image_size=image_size, num_classes=num_classes, **overrides)
    return Model(bundle.network, bundle.preprocess, bundle.labels, bundle.task, bundle.coverage)
