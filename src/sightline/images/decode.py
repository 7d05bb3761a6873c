"""Any image source to upright RGB: the one reader that training, evaluation, prediction and serving share.

The rules that other readers leave to chance: EXIF orientation is applied; transparency is laid on white; 16-bit, 32-bit
and float grey is scaled to 8 bits over its whole range; of several frames or pages the first counts; a file is what
its content says, whatever its name ends in; colour profiles are left unapplied.
"""

import importlib
import os
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFile

from sightline.errors import UserError, printable

Source = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray


class ImageError(UserError):
    """An image that cannot be read: `file` says which, `reason` why."""

    def __init__(self, file: str, reason: str):
        super().__init__(file, reason)
        self.file, self.reason = file, reason

    def __str__(self) -> str:
        return f"{self.file}: cannot decode: {self.reason}"


class Refusal(Exception):  # noqa: N818  (it never leaves this file: `decode` gives it the name of the file)
    """The reason why an image is not read."""


def _environment(name: str, default: int) -> Callable[[], float]:
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

    bytes: int | float = field(default_factory=_environment("SIGHTLINE_IMAGE_BYTES", 2**28))
    pixels: int | float = field(default_factory=_environment("SIGHTLINE_IMAGE_PIXELS", 50_000_000))
    aspect: int | float = field(default_factory=_environment("SIGHTLINE_IMAGE_ASPECT", 5_000))

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


def _raise(limit: str) -> str:
    return f"raise it with SIGHTLINE_IMAGE_{limit.upper()} or Limits({limit}=…)"


class Format(NamedTuple):
    """A picture format that may be opened: how its files begin, and the class of Pillow that reads it."""

    begins: Callable[[bytes], bool]
    module: str
    reader: str


def _starts(*prefixes: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(prefixes)


# The readers are named here, and not found by trying all of Pillow's, so that no content can reach another one (EPS
# would start Ghostscript), and so that a file's size is judged by our limits alone.
FORMATS = {
    "JPEG": Format(_starts(b"\xff\xd8\xff"), "JpegImagePlugin", "JpegImageFile"),
    "PNG": Format(_starts(b"\x89PNG\r\n\x1a\n"), "PngImagePlugin", "PngImageFile"),
    "WebP": Format(lambda head: head[:4] == b"RIFF" and head[8:12] == b"WEBP", "WebPImagePlugin", "WebPImageFile"),
    "GIF": Format(_starts(b"GIF87a", b"GIF89a"), "GifImagePlugin", "GifImageFile"),
    "BMP": Format(_starts(b"BM"), "BmpImagePlugin", "BmpImageFile"),
    "TIFF": Format(_starts(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "TiffImagePlugin", "TiffImageFile"),
    "PPM": Format(lambda head: head[:1] == b"P" and head[1:2] in b"123456fF", "PpmImagePlugin", "PpmImageFile"),
    "JPEG 2000": Format(
        _starts(b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n"), "Jpeg2KImagePlugin", "Jpeg2KImageFile"
    ),
    "AVIF": Format(lambda head: head[4:12] in (b"ftypavif", b"ftypavis"), "AvifImagePlugin", "AvifImageFile"),
}


def decode(
    source: Source, *, limits: Limits | None = None, target: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Read a path, bytes, a PIL image or an array as upright RGB, 0 to 255.

    An array is h×w, h×w×1, h×w×3 or h×w×4: uint8 as it is, uint16 over 0 to 65535, float over 0 to 1, bool as black
    and white; the result may share its memory. `target` (h, w) is the smallest size that the caller goes on with: a
    JPEG may then be decoded at a half, a quarter or an eighth, while both of its sides stay at least twice as long.
    `limits` default to those of the environment. Raises ImageError (a UserError) for whatever cannot be read.
    """
    try:
        return _decode(source, limits or Limits(), target)
    except Refusal as refusal:
        raise ImageError(_name(source), str(refusal)) from refusal.__cause__


def image_size(source: Source, *, limits: Limits | None = None) -> tuple[int, int]:
    """The (height, width) of an image as `decode` would give it, from its header alone where it is a file.

    An orientation that a PNG keeps behind its pixels is not in its header, and not seen. Raises ImageError (a
    UserError) where the header cannot be read or is over a limit.
    """
    try:
        return _image_size(source, limits or Limits())
    except Refusal as refusal:
        raise ImageError(_name(source), str(refusal)) from refusal.__cause__


def _image_size(source: Source, limits: Limits) -> tuple[int, int]:
    if isinstance(source, np.ndarray):
        return source.shape[0], source.shape[1]
    with _damage():
        image = source if isinstance(source, Image.Image) else _open(_data(source, limits))
        limits.check(image.height, image.width)
        # Pillow gives the size of a TIFF as it will be once loaded, and that is upright.
        sideways = image.format != "TIFF" and _orientation(image) in _SIDEWAYS
        return (image.width, image.height) if sideways else (image.height, image.width)


def _decode(source: Source, limits: Limits, target: tuple[int, int] | None) -> UInt8[np.ndarray, "h w 3"]:
    if isinstance(source, np.ndarray):
        return _from_array(source, limits)
    if isinstance(source, Image.Image):
        limits.check(source.height, source.width)
        with _damage():  # an image that PIL has opened may not have been read yet
            return _upright(source)
    data = _data(source, limits)
    _format(data)
    _check_whole(data)
    with _damage(len(data)):
        image = _open(data)
        limits.check(image.height, image.width)
        if target is not None:
            _draft(image, target)
        return _upright(image)


def _data(source: Source, limits: Limits) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        _check_bytes(len(data), limits)
        return data
    if isinstance(source, str | os.PathLike):
        return _read(Path(source), limits)
    raise Refusal(f"an image is a path, bytes, a PIL image or a NumPy array, not {type(source).__name__}")


@contextmanager
def _damage(size: int | None = None) -> Generator[None]:
    """Turn what Pillow raises into a reason; its readers meet damage with every kind of exception."""
    try:
        yield
    except Refusal:
        raise
    except Exception as error:
        if "truncated" in str(error):
            raise Refusal("image file is truncated" + (f" (it ends after {_size(size)})" if size else "")) from error
        text = printable(str(error) or type(error).__name__, limit=120)
        raise Refusal(f"the file is damaged ({text})") from error


def _check_whole(data: bytes) -> None:
    """Raise Refusal where a format that states its own length or checksums shows that something is missing."""
    whole = 0
    if FORMATS["WebP"].begins(data):
        whole = 8 + int.from_bytes(data[4:8], "little")
    elif FORMATS["PNG"].begins(data):  # Pillow passes over the checksums of the pixels
        whole, kind = 8, b""
        while whole + 8 <= len(data) and kind != b"IEND":
            length, kind = struct.unpack_from(">I4s", data, whole)
            end = whole + 8 + length
            if kind == b"IDAT" and end + 4 <= len(data):
                stated = int.from_bytes(data[end : end + 4], "big")
                if zlib.crc32(memoryview(data)[whole + 4 : end]) != stated:
                    raise Refusal("the file is damaged (a checksum of its pixels is wrong)")
            whole = end + 4
    if whole > len(data):
        raise Refusal(f"image file is truncated ({len(data) / 1024:.3g} of {whole / 1024:.3g} KiB)")


def _read(path: Path, limits: Limits) -> bytes:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise Refusal("it is a directory, not a file")
        if not stat.S_ISREG(status.st_mode):  # a pipe would block, a device never end
            raise Refusal("it is not a regular file")
        _check_bytes(status.st_size, limits)
        with path.open("rb") as file:
            head = file.read(32)
            _format(head)
            return head + file.read(status.st_size)
    except OSError as error:
        raise Refusal(os.strerror(error.errno) if error.errno else str(error)) from error
    except ValueError as error:  # a path that no file can have
        raise Refusal(str(error)) from error


def _check_bytes(size: int, limits: Limits) -> None:
    if size == 0:
        raise Refusal("the file is empty (0 bytes)")
    if size > limits.bytes:
        raise Refusal(f"{_size(size)} is over the limit of {_size(limits.bytes)}; {_raise('bytes')}")


def _format(head: bytes) -> Format:
    for known in FORMATS.values():
        if known.begins(head):
            return known
    raise Refusal(f"its content is none of {', '.join(FORMATS)}")


def _open(data: bytes) -> ImageFile.ImageFile:
    known = _format(data)
    reader = getattr(importlib.import_module(f"PIL.{known.module}"), known.reader)
    with _quiet():
        return reader(BytesIO(data))


_QUIET = threading.Lock()


@contextmanager
def _quiet() -> Generator[None]:
    """Keep Pillow's warnings about odd metadata to itself; filters belong to the process, hence one at a time."""
    with _QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _draft(image: Image.Image, target: tuple[int, int]) -> None:
    height, width = target
    if _orientation(image) in _SIDEWAYS:
        height, width = width, height
    if image.format == "JPEG":
        image.draft(None, (2 * width, 2 * height))


_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)


def _orientation(image: Image.Image) -> int:
    try:
        with _quiet():
            return image.getexif().get(0x0112, 1)
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error, OverflowError):
        return 1  # damaged metadata does not say which way is up, and does not spoil the pixels


def _upright(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    with _quiet() if image.format == "TIFF" else nullcontext():  # a TIFF reads its directories while it loads
        image.load()
    # Only now: a PNG may carry its orientation behind the pixels, and Pillow turns a TIFF while it loads it.
    turn = _TURN.get(_orientation(image))
    rgb = _rgb(image)
    return np.array(rgb if turn is None else rgb.transpose(turn))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    if image.mode == "LAB":
        raise Refusal("its colours are CIE L*a*b*; convert it to RGB first")
    return image.convert("RGB")


def _eight_bits(grey: np.ndarray, mode: str) -> UInt8[np.ndarray, "h w"]:
    """Deep grey in 8 bits: integers over 0 to 65535, floats over 0 to 1; beyond these, from the least to the most."""
    if not np.isfinite(grey).all():
        raise Refusal("it holds values that are not finite")
    low, high = (0, 1) if mode == "F" else (0, 65535)
    if grey.min() < low or grey.max() > high:
        low, high = float(grey.min()), float(grey.max())
    scaled = (grey.astype(np.float64) - low) * (255 / max(high - low, np.finfo(np.float64).tiny))
    return np.rint(scaled).astype(np.uint8)


def _from_array(array: np.ndarray, limits: Limits) -> UInt8[np.ndarray, "h w 3"]:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        shape = "×".join(map(str, array.shape))
        raise Refusal(f"an array has to be h×w, h×w×1, h×w×3 or h×w×4 (channels last), not {shape}")
    limits.check(*array.shape[:2])
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype == np.uint16:
        array = np.rint(array / 257).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):
            found = f"{array.min():g} to {array.max():g}"
            raise Refusal(f"a float array has to hold 0 to 1, not {found}: divide it, or pass uint8")
        array = np.rint(array.astype(np.float64) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise Refusal(f"an array has to be uint8, uint16, float or bool, not {array.dtype}")
    if array.shape[2] == 4:
        return np.array(_rgb(Image.fromarray(np.ascontiguousarray(array))))
    return np.require(array if array.shape[2] == 3 else np.repeat(array, 3, axis=2), requirements=["C", "W"])


def _name(source: object) -> str:
    if isinstance(source, str | os.PathLike):
        return printable(os.fspath(source))
    filename = getattr(source, "filename", "")
    if filename and isinstance(filename, str | os.PathLike):
        return printable(os.fspath(filename))
    return {"ndarray": "image array", "bytes": "image bytes"}.get(type(source).__name__, "image")


def _size(count: int | float) -> str:
    return f"{count:.0f} bytes" if count < 1024 else f"{count / 1024:.0f} KiB"
