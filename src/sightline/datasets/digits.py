"""Real handwritten digits that scikit-learn carries, so that everything can be tried without a download."""

import numpy as np
from einops import repeat

from sightline.datasets.image_set import ImageSet, Names, Samples
from sightline.datasets.split import Splits, hold_out
from sightline.errors import UserError


def digits() -> ImageSet:
    """1,797 scanned digits of the UCI test set, 8×8 grey, as RGB arrays of 0 to 255; classes '0' to '9'.

    Raises UserError where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError('builtin:digits needs scikit-learn: pip install "sightline[train]"') from error
    data = load_digits()
    grey = np.rint(data.images * (255 / 16)).astype(np.uint8)
    names = Names(f"{target}/{i:04}.png" for i, target in enumerate(data.target))
    arrays = list(repeat(grey, "n h w -> n h w c", c=3))
    classes = tuple(str(digit) for digit in range(10))
    return ImageSet(classes, Samples(names, data.target.astype(np.int64), arrays=arrays))


def split_digits(seed: int, held_out: float) -> Splits:
    """The digits with a share of each class held out."""
    return hold_out(digits(), "builtin:digits", seed=seed, share=held_out)


BUILTIN = {"digits": {"classify": split_digits}}
