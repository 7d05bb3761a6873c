"""Many views of one image: large parts of it and small ones, each varied in its own way (arXiv 2006.09882)."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from sightline.images.augment import Augment, sample_keys
from sightline.images.preprocess import Preprocess


@dataclass(frozen=True)
class Crops:
    """How the views of an image are taken: two global ones at the contract's size, `count` local ones at `size`.

    Global views hold `global_scale` of the image's area, local ones `local_scale`; further variation is that of
    `augment`. With `colour` above 0 views vary in colour as in DINO, so much at most: jitter in 8 of 10, no colour in 2
    of 10; the first global view is always blurred, the second one in ten, and inverted above the middle in two of ten;
    half of the local ones are blurred (arXiv 2104.14294, appendix C).
    """

    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)
    count: int = 8
    size: tuple[int, int] = (96, 96)
    colour: float = 1.0

    def bind(self, augment: Augment, preprocess: Preprocess) -> "MultiCrop":
        """A function of (image, key) to the views."""
        return MultiCrop(self, augment, preprocess)


class MultiCrop:
    """The views of an image: the first global one, the second, and the local ones together, [count, 3, rows, columns].

    Each view has a number of its own that follows from the image's key, so that none depends on the others. It can be
    sent to processes.
    """

    def __init__(self, crops: Crops, augment: Augment, preprocess: Preprocess):
        self.crops, self.augment, self.preprocess = crops, augment, preprocess
        local = preprocess.at(crops.size)
        self.first = self._varied(crops.global_scale, blur=1.0).bind(preprocess)
        self.second = self._varied(crops.global_scale, blur=0.1, solarize=0.2).bind(preprocess)
        self.local = self._varied(crops.local_scale, blur=0.5).bind(local)

    def __call__(self, image: UInt8[np.ndarray, "h w 3"], key: int) -> tuple[Tensor, ...]:
        keys = sample_keys(key, 0, np.arange(2 + self.crops.count)).tolist()
        views = self.first(image, keys[0]), self.second(image, keys[1])
        if not self.crops.count:
            return views
        return *views, torch.stack([self.local(image, key) for key in keys[2:]])

    def __reduce__(self) -> tuple[type, tuple[Crops, Augment, Preprocess]]:
        return MultiCrop, (self.crops, self.augment, self.preprocess)

    def _varied(self, scale: tuple[float, float], *, blur: float, solarize: float = 0.0) -> Augment:
        strength = self.crops.colour
        cropped = replace(self.augment, crop="resized", crop_scale=scale, padding=0)
        if not strength:
            return cropped
        return replace(
            cropped,
            brightness=0.4 * strength,
            contrast=0.4 * strength,
            saturation=0.2 * strength,
            hue=0.1 * strength,
            jitter=0.8,
            grey=0.2,
            blur=blur * strength,
            solarize=solarize * strength,
        )
