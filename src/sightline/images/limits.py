"""What one image may cost, and the reason why one is not read."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from sightline.errors import UserError, printable


class Refusal(Exception):  # noqa: N818  (it never leaves the reader: `decode` gives it the name of the file)
    """The reason why an image is not read."""


def from_environment(name: str, default: int) -> Callable[[], float]:
    """A reader of a number in the environment; it raises UserError for anything else."""

    def read() -> float:
        text = os.environ.get(name, "")
        try:
            return float(text or default)
        except ValueError:
            raise UserError(f"{name} has to be a number, not '{printable(text)}'") from None

    return read


@dataclass(frozen=True)
class Limits:
    """What one image may cost before it is decoded; each limit can be raised by the caller or by the environment.

    `bytes` bounds the file, `pixels` height × width, `aspect` the longer side over the shorter. The environment's names
    are SIGHTLINE_IMAGE_BYTES, SIGHTLINE_IMAGE_PIXELS and SIGHTLINE_IMAGE_ASPECT; `inf` lifts a limit.
    """

    bytes: int | float = field(default_factory=from_environment("SIGHTLINE_IMAGE_BYTES", 2**28))
    pixels: int | float = field(default_factory=from_environment("SIGHTLINE_IMAGE_PIXELS", 50_000_000))
    aspect: int | float = field(default_factory=from_environment("SIGHTLINE_IMAGE_ASPECT", 5_000))

    def __post_init__(self) -> None:
        for name in ("bytes", "pixels", "aspect"):
            if not getattr(self, name) > 0:
                raise UserError(f"the limit on image {name} has to be positive, not {getattr(self, name)}")

    def check(self, height: int, width: int) -> None:
        """Raise Refusal where an image of this size is over a limit."""
        if min(height, width) < 1:
            raise Refusal(f"the image is {width}×{height}: it has no pixels")
        if height * width > self.pixels:
            size = f"{width}×{height} = {height * width / 1e6:.1f} million pixels"
            raise Refusal(f"{size} is over the limit of {self.pixels / 1e6:g} million; {_raise('pixels')}")
        if max(height, width) > self.aspect * min(height, width):
            ratio = max(height, width) / min(height, width)
            size = f"{width}×{height} has an aspect ratio of {ratio:.0f}:1"
            raise Refusal(f"{size}, over the limit of {self.aspect:g}:1; {_raise('aspect')}")

    def check_bytes(self, size: int) -> None:
        """Raise Refusal for a file of no bytes, or of too many."""
        if size == 0:
            raise Refusal("the file is empty (0 bytes)")
        if size > self.bytes:
            raise Refusal(f"{amount(size)} is over the limit of {amount(self.bytes)}; {_raise('bytes')}")


def amount(count: int | float) -> str:
    """A number of bytes for people."""
    return f"{count:.0f} bytes" if count < 1024 else f"{count / 1024:.0f} KiB"


def _raise(limit: str) -> str:
    return f"raise it with SIGHTLINE_IMAGE_{limit.upper()} or Limits({limit}=…)"
