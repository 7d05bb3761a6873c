"""How often a network of images and texts is right about classes of which it knows no more than their names."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sightline.evaluation.accuracy import Accuracy
from sightline.types import Batch


class ZeroShot(Accuracy):
    """The counts of a classifier whose classes are texts (arXiv 2103.00020, section 3.1).

    `vectors(network)` gives the unit vector of each class, with which images are compared.
    """

    def __init__(self, classes: int, vectors: Callable[[Any], Float[Tensor, "k d"]]):
        super().__init__(classes)
        self.vectors: Callable | None = vectors
        self.network: Any = None
        self.texts: Tensor | None = None

    def begin(self, network: Any) -> None:
        assert self.vectors is not None
        self.network, self.texts = network, self.vectors(network)

    def take(self, output: Float[Tensor, "b d"], batch: Batch) -> None:
        assert self.texts is not None, "the classes are texts, which the network has to read first"
        self.add(self.network.head.match(output, self.texts).logits_per_image, batch.targets, batch.index)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "network": None, "vectors": None, "texts": None}

    def metrics(self) -> dict[str, float]:
        """`zero_shot_top1` and `zero_shot_top5` as fractions of all images."""
        found = super().metrics()
        return {"zero_shot_top1": found["top1"], "zero_shot_top5": found["top5"], "loss": found["loss"]}

    def headline(self) -> str:
        found = self.metrics()
        return f"zero-shot top-1 {found['zero_shot_top1']:.2%}  top-5 {found['zero_shot_top5']:.2%}"
