"""What many images show together: how far heads look on average, and patches as colours that all images share."""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from sightline.explanation.features import Colours, principal_colours
from sightline.explanation.result import Explanation

MOST_COLOURED = 32
"""Images whose patches are kept to be coloured together; the mean distance is over all."""


@dataclass
class Survey:
    """A running summary of explanations by one network; memory does not grow with their number.

    `images` counts them. The paper's figure is over 128 images (arXiv 2010.11929, figure 7, right).
    """

    images: int = 0
    _sum: np.ndarray | None = None
    _squares: np.ndarray | None = None
    _features: list[np.ndarray] = field(default_factory=list)

    def add(self, view: Explanation) -> None:
        """Counts one image in."""
        far = view.distance.astype(np.float64)
        self._sum = far if self._sum is None else self._sum + far
        self._squares = far**2 if self._squares is None else self._squares + far**2
        self.images += 1
        if len(self._features) < MOST_COLOURED:
            self._features.append(view.features)

    @property
    def distance(self) -> Float[np.ndarray, "layers heads"]:
        """The mean over the images of the mean attention distance of each layer and head, in pixels of the input."""
        assert self._sum is not None, "no image was added"
        return (self._sum / self.images).astype(np.float32)

    @property
    def deviation(self) -> Float[np.ndarray, "layers heads"]:
        """Its standard deviation over the images."""
        assert self._sum is not None, "no image was added"
        assert self._squares is not None, "no image was added"
        variance = self._squares / self.images - (self._sum / self.images) ** 2
        return np.sqrt(variance.clip(min=0)).astype(np.float32)

    def colours(self) -> Colours:
        """The patches of the first `MOST_COLOURED` images as colours that all of them share."""
        return principal_colours(self._features)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything by name, as it is saved."""
        return {
            "images": np.array(self.images),
            "distance": self.distance,
            "distance_deviation": self.deviation,
            "colours_variance": self.colours().variance,
        }
