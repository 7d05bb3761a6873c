"""The reader: every kind of picture comes out upright and in the right colours, and nothing else gets through."""

import io
import os
import pickle
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sightline.errors import UserError
from sightline.images.decode import ImageError, Limits, decode, image_size

WIDTH, HEIGHT = 62, 46


def card() -> Image.Image:
    """Red, green, blue and white quarters: every turn and every swap of colours shows."""
    array = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    array[:23, :31], array[:23, 31:], array[23:, :31], array[23:, 31:] = (255, 0, 0), (0, 255, 0), (0, 0, 255), 255
    return Image.fromarray(array)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    with io.BytesIO() as buffer:
        image.save(buffer, kind, **options)
        return buffer.getvalue()


def assert_card(array: np.ndarray, tolerance: int = 24) -> None:
    assert array.shape == (HEIGHT, WIDTH, 3)
    assert array.dtype == np.uint8
    for row, column, colour in ((4, 4, (255, 0, 0)), (4, -5, (0, 255, 0)), (-5, 4, (0, 0, 255)), (-5, -5, (255,) * 3)):
        assert np.abs(array[row, column].astype(int) - colour).max() <= tolerance


def noise(height: int = 37, width: int = 53) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


CARDS = {
    "jpeg": encoded(card(), "JPEG", quality=95),
    "progressive jpeg": encoded(card(), "JPEG", quality=95, progressive=True),
    "png": encoded(card(), "PNG"),
    "palette png": encoded(card().quantize(8), "PNG"),
    "palette png, transparency per entry": encoded(card().quantize(8), "PNG", transparency=bytes([255] * 8)),
    "gif": encoded(card(), "GIF"),
    "animated gif": encoded(card(), "GIF", save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT), "black")]),
    "webp": encoded(card(), "WEBP", quality=95),
    "animated webp": encoded(
        card(), "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT))]
    ),
    "bmp": encoded(card(), "BMP"),
    "ppm": encoded(card(), "PPM"),
    "tiff": encoded(card(), "TIFF"),
    "tiff, two pages": encoded(
        card(), "TIFF", save_all=True, append_images=[Image.new("RGB", (WIDTH, HEIGHT))], compression="tiff_lzw"
    ),
    "cmyk jpeg": encoded(card().convert("CMYK"), "JPEG", quality=95),
    "cmyk tiff": encoded(card().convert("CMYK"), "TIFF"),
    "bytes after the end": encoded(card(), "JPEG", quality=95) + b"PK\x03\x04 more",
    "broken colour profile": encoded(card(), "JPEG", quality=95, icc_profile=b"not a profile"),
    "broken exif": encoded(card(), "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x12\x01"),
    "opaque alpha": encoded(card().convert("RGBA"), "PNG"),
    "ycbcr tiff": encoded(card().convert("YCbCr"), "TIFF"),
}


@pytest.mark.parametrize("name", CARDS)
def test_kind_comes_out_right(name, tmp_path):
    (tmp_path / "card.txt").write_bytes(CARDS[name])  # the name's ending says nothing
    assert_card(decode(tmp_path / "card.txt"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(kind, orientation, tmp_path):
    undo = [
        None,
        "FLIP_LEFT_RIGHT",
        "ROTATE_180",
        "FLIP_TOP_BOTTOM",
        "TRANSPOSE",
        "ROTATE_90",
        "TRANSVERSE",
        "ROTATE_270",
    ]
    turn = undo[orientation - 1]
    stored = card() if turn is None else card().transpose(Image.Transpose[turn])
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, kind, exif=exif, quality=95)
    assert_card(decode(data))
    (tmp_path / "card").write_bytes(data)
    with Image.open(tmp_path / "card") as image:
        assert_card(decode(image))
    assert_card(decode(data, target=(23, 31)))


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]), seed=st.integers(0, 99))
def test_path_bytes_and_pil_agree(kind, seed, tmp_path_factory):
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 40)), int(rng.integers(1, 40)), 3)
    data = encoded(Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)), kind)
    path = tmp_path_factory.mktemp("same") / "x"
    path.write_bytes(data)
    with Image.open(path) as image:
        from_pil = decode(image)
    assert np.array_equal(decode(path), decode(data))
    assert np.array_equal(from_pil, decode(data))
    assert np.array_equal(decode(str(path)), decode(bytearray(data)))


def test_deep_grey_spans_the_range():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    expected = np.arange(256).reshape(16, 16)
    for data in (encoded(Image.fromarray(ramp), "PNG"), encoded(Image.fromarray(ramp), "TIFF")):
        assert np.array_equal(decode(data)[..., 0], expected)
    assert np.array_equal(decode(b"P5 16 16 65535\n" + ramp.astype(">u2").tobytes())[..., 1], expected)
    assert np.array_equal(decode(Image.fromarray(ramp.astype(np.int32)))[..., 2], expected)
    unit = Image.fromarray((np.arange(256).reshape(16, 16) / 255).astype(np.float32))
    assert np.array_equal(decode(encoded(unit, "TIFF"))[..., 0], expected)
    wide = Image.fromarray((np.arange(256).reshape(16, 16) * 1000 - 5000).astype(np.float32))
    assert np.array_equal(decode(encoded(wide, "TIFF"))[..., 0], expected)  # stretched from least to most
    with pytest.raises(ImageError, match="not finite"):
        decode(Image.fromarray(np.full((3, 5), np.nan, np.float32)))


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (5, 3), (10, 20, 30, 0))
    assert (decode(encoded(clear, "PNG")) == 255).all()
    half = Image.new("RGBA", (5, 3), (100, 0, 200, 51))  # 51/255 = 0.2
    assert np.array_equal(decode(half)[0, 0], [224, 204, 244])
    assert np.array_equal(decode(np.asarray(half)), decode(half))
    assert np.array_equal(decode(Image.new("LA", (5, 3), (100, 51)))[0, 0], [224] * 3)
    keyed = Image.new("P", (5, 3), 1)
    keyed.putpalette([9, 9, 9, 200, 100, 50])
    assert (decode(encoded(keyed, "PNG", transparency=1)) == 255).all()
    assert (decode(encoded(keyed, "PNG", transparency=0)) == (200, 100, 50)).all()


def test_grey_and_bilevel():
    assert np.array_equal(decode(encoded(Image.new("L", (5, 3), 77), "PNG")), np.full((3, 5, 3), 77, np.uint8))
    dots = np.indices((3, 5)).sum(0) % 2 == 1
    assert np.array_equal(decode(encoded(Image.fromarray(dots), "PNG"))[..., 0], dots * 255)
    assert decode(encoded(Image.new("RGB", (1, 1), "red"), "PNG")).tolist() == [[[255, 0, 0]]]


def test_arrays():
    rgb = np.asarray(noise(3, 5))
    assert np.array_equal(decode(rgb), rgb)
    assert np.array_equal(decode(rgb.astype(np.uint16) * 257), rgb)
    assert np.array_equal(decode(rgb.astype(np.float32) / 255), rgb)
    assert np.array_equal(decode(rgb / 255), rgb)
    grey = rgb[..., 0]
    assert np.array_equal(decode(grey), decode(grey[..., None]))
    assert np.array_equal(decode(grey), np.stack([grey] * 3, axis=-1))
    assert np.array_equal(decode(grey > 99)[..., 1], (grey > 99) * 255)
    assert decode(rgb[::-1]).flags.c_contiguous
    for wrong, reason in (
        (rgb.transpose(2, 0, 1), "channels last"),
        (rgb.astype(np.float32), "0 to 1"),
        (rgb.astype(np.int64), "int64"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (np.full((3, 5), np.nan), "nan"),
    ):
        with pytest.raises(ImageError, match=reason):
            decode(wrong)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((width + 7) // 8 + 1) * min(height, 99))
    parts = (_png_chunk(b"IHDR", header), extra, _png_chunk(b"IDAT", pixels), _png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _wrong_checksum() -> bytes:
    data = bytearray(encoded(noise(), "PNG"))
    place = data.index(b"IDAT")
    length = int.from_bytes(data[place - 4 : place], "big")
    data[place + 4 + length] ^= 0xFF
    return bytes(data)


def _jpeg_of(width: int, height: int) -> bytes:
    data = bytearray(encoded(card(), "JPEG"))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(data)


JPEG, PNG, WEBP = (encoded(noise(), kind) for kind in ("JPEG", "PNG", "WEBP"))
REFUSED = {
    "empty": (b"", "empty"),
    "text": (b"this is not an image\n" * 9, "none of JPEG, PNG"),
    "html": (b"<!doctype html><html></html>", "none of"),
    "svg": (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "none of"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "none of"),
    "jpeg cut at 10 %": (JPEG[: len(JPEG) // 10], "truncated|damaged"),
    "jpeg cut at half": (JPEG[: len(JPEG) // 2], r"truncated \(it ends after \d+ "),
    "jpeg cut at 95 %": (JPEG[: len(JPEG) * 19 // 20], "truncated"),
    "png cut": (PNG[: len(PNG) // 2], r"truncated \([\d.]+ of [\d.]+ KiB\)"),
    "webp cut": (WEBP[: len(WEBP) // 2], r"truncated \([\d.]+ of [\d.]+ KiB\)"),
    "gif cut": (encoded(noise(), "GIF")[:900], "truncated|damaged"),
    "png with a wrong checksum": (_wrong_checksum(), "checksum"),
    "bomb": (
        _png(30_000, 30_000),
        "900.0 million pixels is over the limit of 50 million; raise it with SIGHTLINE_IMAGE",
    ),
    "bomb within Pillow's limits": (_png(13_000, 13_000), "169.0 million pixels"),
    "jpeg that claims more": (_jpeg_of(65_500, 65_500), "million pixels"),
    "sliver": (
        _png(20_000, 3),
        "aspect ratio of 6667:1, over the limit of 5000:1; raise it with SIGHTLINE_IMAGE_ASPECT",
    ),
    "text bomb": (_png(8, 8, _png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26)))), "too large"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_name_and_reason(name, tmp_path):
    data, reason = REFUSED[name]
    path = tmp_path / "bad\n.jpg"
    path.write_bytes(data)
    began = time.perf_counter()
    with pytest.raises(ImageError, match=reason) as caught:
        decode(path)
    assert time.perf_counter() - began < 2
    assert r"bad\n.jpg: cannot decode: " in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))  # it crosses from a loader's workers
    assert (str(again), again.reason) == (str(caught.value), caught.value.reason)
    with pytest.raises(UserError, match=reason):
        decode(data)


def test_no_warning_escapes(recwarn):
    for data in (*CARDS.values(), *(data for data, _ in REFUSED.values())):
        try:
            decode(data)
        except ImageError:
            continue
    assert not recwarn.list


def test_only_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    with (tmp_path / "huge.jpg").open("wb") as sparse:
        sparse.write(CARDS["jpeg"])
        sparse.truncate(2**33)
    for name, reason in {
        "pipe.jpg": "not a regular file",
        "folder.jpg": "directory",
        "broken.jpg": "No such file",
        "loop.jpg": "symbolic links",
        "absent.jpg": "No such file",
        "huge.jpg": "8388608 KiB is over the limit of 262144 KiB; raise it with SIGHTLINE_IMAGE_BYTES",
        "nul\0.jpg": "null",
    }.items():
        with pytest.raises(ImageError, match=reason):
            decode(tmp_path / name)
    with pytest.raises(ImageError, match="not a regular file"):
        decode("/dev/zero")
    (tmp_path / "real.jpg").write_bytes(CARDS["jpeg"])
    (tmp_path / "link.jpg").symlink_to(tmp_path / "real.jpg")
    assert_card(decode(tmp_path / "link.jpg"))


def test_limits_can_be_raised(monkeypatch):
    data = encoded(Image.new("1", (20_000, 3)), "PNG")
    assert decode(data, limits=Limits(aspect=7000)).shape == (3, 20_000, 3)
    monkeypatch.setenv("SIGHTLINE_IMAGE_ASPECT", "inf")
    assert decode(data).shape == (3, 20_000, 3)
    with pytest.raises(ImageError, match=r"over the limit of 0\.05 million"):
        decode(data, limits=Limits(pixels=50_000))
    with pytest.raises(ImageError, match="over the limit of 9 bytes"):
        decode(data, limits=Limits(bytes=9))
    with pytest.raises(UserError, match="positive"):
        Limits(pixels=0)
    monkeypatch.setenv("SIGHTLINE_IMAGE_ASPECT", "wide")
    with pytest.raises(UserError, match="SIGHTLINE_IMAGE_ASPECT has to be a number"):
        decode(data)
    assert decode(encoded(Image.new("1", (4000, 1)), "PNG"), limits=Limits(aspect=5000)).shape == (1, 4000, 3)


@pytest.mark.parametrize(
    ("target", "size"), [((59, 80), (120, 160)), ((60, 80), (120, 160)), ((61, 80), (240, 320)), ((121, 3), (480, 640))]
)
def test_draft_leaves_twice_the_target(target, size):
    data = encoded(noise(480, 640), "JPEG")
    assert decode(data, target=target).shape[:2] == size
    assert decode(data).shape[:2] == (480, 640)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(noise(640, 480).transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif)
    assert decode(turned, target=target[::-1]).shape[:2] == size[::-1]


SEEDS = [*CARDS.values(), encoded(noise(), "JPEG2000"), encoded(noise(), "TIFF", compression="jpeg")]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_bytes_are_an_image_or_a_user_error(data):
    content = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(0, 5))):
        reach = data.draw(st.sampled_from([32, 300, len(content)]))
        content[data.draw(st.integers(0, min(reach, len(content)) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.sampled_from([None, 7, 31, 150, len(content) // 2]))])
    try:
        image = decode(content)
    except ImageError as error:
        image, text = None, str(error)
    if image is None:
        assert text.startswith("image bytes: cannot decode: ")
        assert "0x" not in text  # no addresses
    else:
        assert image.dtype == np.uint8
        assert image.shape[2] == 3


@given(st.binary(max_size=64))
def test_noise_is_a_user_error(content):
    with pytest.raises(UserError):
        decode(content)


def test_a_callers_image_stays_as_it_was():
    image = card().convert("RGBA")
    before = image.tobytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(image)
    assert (image.mode, image.tobytes()) == ("RGBA", before)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_the_size_in_the_header_is_that_of_the_upright_image(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(), kind, exif=exif)
    (tmp_path / "image").write_bytes(data)
    image = decode(data)
    assert image_size(data) == image_size(tmp_path / "image") == image_size(image) == image.shape[:2]


def test_the_size_of_what_is_no_image_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "text.jpg").write_text("no image")
    for name, reason in (("pipe.jpg", "not a regular file"), ("text.jpg", "content"), ("none.jpg", "No such file")):
        with pytest.raises(ImageError, match=reason):
            image_size(tmp_path / name)
    with pytest.raises(ImageError, match="limit"):
        image_size(noise(), limits=Limits(pixels=100))
