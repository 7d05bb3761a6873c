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
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFile

from sightline.errors import UserError, printable
from sightline.images.limits import Limits, Refusal, amount
from sightline.images.structure import Counted, check_structure, check_webp


class Stored(ABC):
    """An image that lies within something else, such as an archive; light, and fit to be sent to other processes."""

    size: int
    """Its number of bytes."""

    @property
    @abstractmethod
    def where(self) -> str:
        """What it is called, for people."""

    @property
    @abstractmethod
    def content(self) -> bytes:
        """What stands for its bytes: equal where they are."""

    @property
    def whole(self) -> bool:
        """Whether `content` follows from every byte; otherwise equal contents do not make sure of equal bytes."""
        return True

    @abstractmethod
    def read(self, limit: int) -> bytes:
        """Its first `limit` bytes at most. Raises Refusal where they cannot be had."""


Source = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray | Stored


class ImageError(UserError):
    """An image that cannot be read: `file` says which, `reason` why."""

    def __init__(self, file: str, reason: str):
        super().__init__(file, reason)
        self.file, self.reason = file, reason

    def __str__(self) -> str:
        return f"{self.file}: cannot decode: {self.reason}"


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
    return decode_sized(source, limits=limits, target=target)[0]


def decode_sized(
    source: Source, *, limits: Limits | None = None, target: tuple[int, int] | None = None
) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int]]:
    """What `decode` gives, and the (height, width) that it has where nothing is decoded at a fraction of its size."""
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


class Header(NamedTuple):
    """What the header of an image says: its format, Pillow's name of its mode, its upright size in pixels.

    `orientation` is that of EXIF (1 to 8, 1 where none is told); `several` says that there is more than one frame.
    """

    format: str
    mode: str
    height: int
    width: int
    orientation: int
    several: bool


def read(source: Source, *, limits: Limits | None = None) -> bytes:
    """The bytes of a path or of bytes, as `decode` would take them. Raises ImageError (a UserError) where it would."""
    try:
        return _data(source, limits or Limits())
    except Refusal as refusal:
        raise ImageError(_name(source), str(refusal)) from refusal.__cause__


def header(source: Source, *, limits: Limits | None = None) -> Header:
    """The header of a path or of bytes, without decoding it.

    Raises ImageError (a UserError) where it cannot be read or is over a limit.
    """
    try:
        limits = limits or Limits()
        data = _data(source, limits)
        with _damage():
            image = _open(data, limits)
            height, width = _image_size(image, limits)
            name = next(name for name, known in FORMATS.items() if known.begins(data))
            return Header(name, image.mode, height, width, _orientation(image), _several(image))
    except Refusal as refusal:
        raise ImageError(_name(source), str(refusal)) from refusal.__cause__


def _several(image: ImageFile.ImageFile) -> bool:
    if image.format != "TIFF":
        return bool(getattr(image, "is_animated", False))
    try:
        image.seek(1)  # Pillow would count all pages
    except EOFError:
        return False
    return True


def _image_size(source: Source, limits: Limits) -> tuple[int, int]:
    if isinstance(source, np.ndarray):
        return source.shape[0], source.shape[1]
    with _damage():
        image = source if isinstance(source, Image.Image) else _open(_data(source, limits), limits)
        limits.check(image.height, image.width)
        # Pillow gives the size of a TIFF as it will be once loaded, and that is upright.
        sideways = image.format != "TIFF" and _orientation(image) in _SIDEWAYS
        return (image.width, image.height) if sideways else (image.height, image.width)


def _decode(
    source: Source, limits: Limits, target: tuple[int, int] | None
) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int]]:
    if isinstance(source, np.ndarray):
        return _whole(_from_array(source, limits))
    if isinstance(source, Image.Image):
        limits.check(source.height, source.width)
        with _damage():  # an image that PIL has opened may not have been read yet
            return _whole(_upright(source))
    data = _data(source, limits)
    _format(data)
    check_structure(data)
    with _damage(len(data)):
        image = _open(data, limits)
        limits.check(image.height, image.width)
        _check_tiles(image)
        if target is None or image.format != "JPEG":
            return _whole(_upright(image))
        size = (image.width, image.height) if _orientation(image) in _SIDEWAYS else (image.height, image.width)
        _draft(image, target)
        return _upright(image), size


def _whole(image: UInt8[np.ndarray, "h w 3"]) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int]]:
    return image, (image.shape[0], image.shape[1])


def _data(source: Source, limits: Limits) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        limits.check_bytes(len(data))
        return data
    if isinstance(source, str | os.PathLike):
        return _read(Path(source), limits)
    if isinstance(source, Stored):
        limits.check_bytes(source.size)
        _format(source.read(32))
        return source.read(source.size)
    raise Refusal(f"an image is a path, bytes, a PIL image or a NumPy array, not {type(source).__name__}")


@contextmanager
def _damage(size: int | None = None) -> Generator[None]:
    """Turn what Pillow raises into a reason; its readers meet damage with every kind of exception."""
    try:
        yield
    except Refusal:
        raise
    except MemoryError as error:
        raise Refusal("there is too little memory for it") from error
    except Exception as error:
        if "truncated" in str(error):
            raise Refusal("image file is truncated" + (f" (it ends after {amount(size)})" if size else "")) from error
        text = printable(str(error) or type(error).__name__, limit=120)
        raise Refusal(f"the file is damaged ({text})") from error


def _read(path: Path, limits: Limits) -> bytes:
    try:
        _check_regular(path.stat().st_mode)  # opening a device may do something
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            _check_regular(status.st_mode)  # it may have changed hands, and a pipe would block
            limits.check_bytes(status.st_size)
            _format(file.read(512))
            file.seek(0)
            return file.read(status.st_size)
    except OSError as error:
        raise Refusal(os.strerror(error.errno) if error.errno else str(error)) from error
    except ValueError as error:  # a path that no file can have
        raise Refusal(str(error)) from error


def _check_regular(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise Refusal("it is a directory, not a file")
    if not stat.S_ISREG(mode):  # a pipe would block, a device never end
        raise Refusal("it is not a regular file")


def _format(head: bytes) -> Format:
    for known in FORMATS.values():
        if known.begins(head):
            return known
    if head.startswith((b"PK\3\4", b"\x1f\x8b")) or head[257:262] == b"ustar":
        raise Refusal("it is an archive, not an image; unpack it into a folder and name that")
    raise Refusal(f"its content is none of {', '.join(FORMATS)}")


def _open(data: bytes, limits: Limits) -> ImageFile.ImageFile:
    known = _format(data)
    if known is FORMATS["WebP"]:
        check_webp(data, limits)
    reader = getattr(importlib.import_module(f"PIL.{known.module}"), known.reader)
    with _quiet():
        return reader(Counted(data))


_QUIET = threading.Lock()


@contextmanager
def _quiet() -> Generator[None]:
    """Keep Pillow's warnings about odd metadata to itself; filters belong to the process, hence one at a time."""
    with _QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _check_tiles(image: ImageFile.ImageFile) -> None:
    """A tile of a TIFF is decoded as a whole, however small the image is that it belongs to."""
    tags = getattr(image, "tag_v2", {})
    width, height = tags.get(322, 0), tags.get(323, 0)
    if width * height > max(image.width * image.height, 2**22):
        raise Refusal(f"its tiles of {width}×{height} are larger than the image of {image.width}×{image.height}")


def _draft(image: Image.Image, target: tuple[int, int]) -> None:
    height, width = target
    if _orientation(image) in _SIDEWAYS:
        height, width = width, height
    image.draft(None, (2 * width, 2 * height))


# The pixels as they are stored, seen in those of the upright image.
_STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
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
    orientation = _orientation(image)
    height, width = (image.width, image.height) if orientation in _SIDEWAYS else (image.height, image.width)
    upright = np.empty((height, width, 3), dtype=np.uint8)
    stored = _STORED.get(orientation, lambda same: same)(upright)
    scale = _scale(image) if image.mode.startswith("I") or image.mode == "F" else None
    for rows, part in _parts(image):
        stored[rows] = np.asarray(_rgb(part)) if scale is None else _eight_bits(np.asarray(part), *scale)[..., None]
    return upright


def _parts(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """The image in strips: converting a large one as a whole would take several times its memory."""
    step = max(2**20 // image.width, 1)
    if step >= image.height:
        yield slice(None), image
        return
    for top in range(0, image.height, step):
        bottom = min(top + step, image.height)
        yield slice(top, bottom), image.crop((0, top, image.width, bottom))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    if image.mode == "LAB":
        raise Refusal("its colours are CIE L*a*b*; convert it to RGB first")
    return image.convert("RGB")


def _scale(image: Image.Image) -> tuple[float, float]:
    """What is black and what is white in deep grey: integers span 0 to 65535, floats 0 to 1, or least to most."""
    low, high = (0.0, 1.0) if image.mode == "F" else (0.0, 65535.0)
    ends = [(part.min(), part.max()) for part in (np.asarray(part) for _, part in _parts(image))]
    least, most = float(min(low for low, _ in ends)), float(max(high for _, high in ends))
    if not np.isfinite([least, most, *(end for pair in ends for end in pair)]).all():
        raise Refusal("it holds values that are not finite")
    return (least, most) if least < low or most > high else (low, high)


def _eight_bits(grey: np.ndarray, low: float, high: float) -> UInt8[np.ndarray, "h w"]:
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
    if isinstance(source, Stored):
        return printable(source.where)
    filename = getattr(source, "filename", "")
    if filename and isinstance(filename, str | os.PathLike):
        return printable(os.fspath(filename))
    return {"ndarray": "image array", "bytes": "image bytes"}.get(type(source).__name__, "image")
