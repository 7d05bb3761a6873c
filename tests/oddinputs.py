"""A second set of hostile and awkward inputs, in the form of `badinputs` and unlike its own.

python tests/oddinputs.py DIR && python proofs/hostile.py DIR
"""

import gzip
import io
import json
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

import badinputs as kit

RGB = np.zeros((48, 64, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
BIG = 10**9


def make(folder: str) -> list[dict[str, Any]]:
    """Writes everything and its `manifest.json`; returns the items."""
    out = kit.Out(folder, "odd")
    images(out)
    archives(out)
    checkpoints(out)
    configurations(out)
    tables(out)
    return out.done()


def animated_png(frames: int, width: int, height: int) -> bytes:
    """An animated PNG that says it has so many frames, each as large as the canvas."""
    row = zlib.compress(b"\0" * ((3 * width + 1) * height))
    control = kit.chunk(b"acTL", struct.pack(">II", frames, 0))
    places = struct.pack(">IIIII", 0, width, height, 0, 0) + struct.pack(">HHBB", 1, 1, 0, 0)
    return kit.png(width, height, 8, 2, row, control + kit.chunk(b"fcTL", places))


def bmp(width: int, height: int, bits: int = 24, compression: int = 0, data: bytes = b"", colours: int = 0) -> bytes:
    """A BMP with a header of 40 bytes."""
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, colours, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(data), 0, 0, 54) + head + data


def gif_frames(count: int, side: int) -> bytes:
    """An animation of one-pixel frames before a canvas of side × side."""
    head = b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + b"\xff\0\0\0\0\0"
    return head + (b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2\x44\1\0") * count + b";"


def images(out: Any) -> None:
    """Pictures as cameras, scanners and attackers write them."""
    red, size = "tl=red", "size=64x48"
    picture = Image.fromarray(RGB)
    deep = (np.arange(48 * 64).reshape(48, 64) * 21).astype(np.uint16)
    colours = Image.fromarray(RGB).convert("P")

    def image(name: str, data: bytes, expect: str, why: str, **more: Any) -> None:
        out.w(f"image/{name}", data, expect, why, **more)

    image("cmyk_adobe.jpg", kit.jpg(picture.convert("CMYK")), "accept", "CMYK with Adobe's mark", check=f"{size};{red}")
    image("ycck.tif", kit.enc(picture.convert("CMYK"), "TIFF"), "accept", "CMYK in a TIFF", check=f"{size};{red}")
    image("tail_2mb.jpg", kit.jpg(picture) + bytes(2 << 20), "accept", "2 MB of zeros behind the end", check=red)
    image("tail_zip.jpg", kit.jpg(picture) + kit.fixed_zip([("a", b"a", None)]), "accept", "an archive behind the end")
    image("grey16.png", kit.enc(Image.fromarray(deep), "PNG"), "accept", "16-bit grey", check=f"{size};not_constant")
    rgb16 = kit.png(64, 48, 16, 2, zlib.compress(b"".join(b"\0" + b"\xff\xff\0\0\0\0" * 64 for _ in range(48))))
    image("rgb16.png", rgb16, "accept", "16-bit RGB", check=f"{size};{red}")
    rows = b"".join(b"\0" + b"\xff\xff\0\0\0\0\xff\xff" * 64 for _ in range(48))
    image("rgba16.png", kit.png(64, 48, 16, 6, zlib.compress(rows)), "accept", "16-bit RGBA", check=f"{size};{red}")
    image("interlaced.png", interlaced(), "accept", "Adam7, the seven passes", check="size=8x8")
    image("transparent_palette.gif", kit.enc(colours, "GIF", transparency=1), "accept", "an unused transparent entry")
    image(
        "top_down.bmp", bmp(64, -48, data=b"\0\0\xff" * 64 * 48), "accept", "negative height: top row first", check=red
    )
    image("thin.bmp", bmp(1, 1, data=b"\0\0\xff\0"), "accept", "one pixel", check="size=1x1")
    image("multi_strip.tif", strips(), "accept", "a strip for every 5 rows, the last shorter", check=f"{size};{red}")
    image("big_endian.tif", kit.tiff(64, 48, 8, 1, 1, 1, bytes(range(64)) * 48, endian=">"), "accept", "MM", check=size)
    image("float.tif", kit.enc(Image.fromarray(deep.astype(np.float32)), "TIFF"), "accept", "32-bit float", check=size)
    image("lossless.webp", kit.enc(picture, "WEBP", lossless=True), "accept", "VP8L", check=f"{size};{red}")
    image("few_frames.png", animated_png(1, 64, 48), "accept", "animated, one frame", check=size)
    image("many_frames.png", animated_png(2**31 - 1, 64, 48), "either", "says 2^31 frames", max_mb=100)
    image("frames.gif", gif_frames(20_000, 64), "either", "20,000 frames", max_s=1, max_mb=100)
    image("frames_big.gif", gif_frames(2_000, 9000), "reject", "2,000 frames of 81 million pixels", max_s=1, max_mb=100)
    image("apng_bomb.png", bomb_png(), "reject", "animated, 400 million pixels a frame", max_s=1, max_mb=100)
    image("webp_bomb.webp", canvas_webp(16383, 16383), "reject", "a canvas of 268 million", max_s=1, max_mb=100)
    image("negative.bmp", bmp(-64, 48, data=bytes(9216)), "reject", "negative width")
    image("lowest.bmp", bmp(64, -(2**31), data=bytes(9216)), "reject", "the lowest height there is")
    image("no_rows.bmp", bmp(64, 0), "reject", "no rows")
    image("rle_bomb.bmp", bmp(30000, 30000, 8, 1, b"\xff\1" * 64), "reject", "run lengths, 900 million", max_mb=100)
    image("rle_endless.bmp", bmp(7000, 7000, 8, 1, b"\0\2\0\0" * 99), "reject", "run lengths that never advance")
    image("palette_huge.bmp", bmp(8, 8, 8, 0, bytes(64), 2**31 - 1), "reject", "2^31 colours", max_mb=100)
    image("strip_outside.tif", kit.tiff(64, 48, 8, 1, 1, 1, b"", rows=48), "reject", "no strip at all")
    image("ifd_loop.tif", kit.tiff(64, 48, 8, 1, 1, 1, bytes(3072), next_ifd=8), "either", "directories in a circle")
    image("bits_odd.tif", kit.tiff(64, 48, 13, 1, 1, 1, bytes(6000)), "reject", "13 bits a sample")
    image(
        "strip_huge.tif",
        kit.tiff(64, 48, 8, 1, 1, 1, b"", extra=((330, 4, 2**30, 8),)),
        "reject",
        "2^30 subdirectories",
    )
    image("deflate_bomb.tif", kit.tiff(20000, 20000, 8, 1, 1, 8, kit.zeros_deflated(1 << 24)), "reject", "bomb")
    image("cut_mid.webp", kit.enc(kit.noise(1), "WEBP")[:-200], "reject", "cut")
    image("riff_lies.webp", b"RIFF\xff\xff\xff\xffWEBPVP8 " + bytes(40), "reject", "a chunk of 4 GB")
    image("zero_width.png", kit.png(0, 48, 8, 2, zlib.compress(b"")), "reject", "no columns")
    image("bad_depth.png", kit.png(64, 48, 3, 2, zlib.compress(bytes(9999))), "reject", "3 bits a sample")
    image("no_header.png", b"\x89PNG\r\n\x1a\n" + kit.chunk(b"IEND", b""), "reject", "neither header nor pixels")
    image("twice.png", kit.enc(picture, "PNG") * 2, "accept", "a second file behind the end", check=f"{size};{red}")
    image("soi_only.jpg", b"\xff\xd8\xff", "reject", "three bytes")
    image("no_scan.jpg", kit.jpg(picture)[:200], "reject", "tables alone")
    image("twelve_bit.jpg", kit.jpg(picture).replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "reject", "12 bits")
    exif = b"Exif\0\0II*\0\x08\0\0\0" + b"\xff\xff" + b"\x12\x01\x03\0\xff\xff\xff\xff\0\0\0\0" * 20
    image("exif_lies.jpg", kit.jpeg_insert(kit.jpg(picture), kit.seg(0xE1, exif)), "accept", "EXIF of 2^32", check=red)
    odd = kit.exif(9)
    image(
        "exif_nine.jpg",
        kit.jpg(picture, exif=odd),
        "accept",
        "an orientation that does not exist",
        check=f"{size};{red}",
    )
    image("heif.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), "reject", "HEIC named .jpg")
    image("pdf.png", b"%PDF-1.7\n" + bytes(99), "reject", "a document")
    image("icns.png", b"icns" + bytes(60), "reject", "a format that nobody allowed")
    image("psd.jpg", b"8BPS\0\1" + bytes(60), "reject", "another")
    image("ppm_negative.ppm", b"P6 -8 8 255\n" + bytes(192), "reject", "negative width")
    image("pam.ppm", b"P7\nWIDTH 2\nHEIGHT 2\nDEPTH 3\nMAXVAL 255\nENDHDR\n" + bytes(12), "reject", "PAM")
    image(
        "jp2_bomb.jp2",
        kit.enc(picture, "JPEG2000").replace(struct.pack(">II", 48, 64), struct.pack(">II", 60000, 60000)),
        "reject",
        "3.6 billion pixels",
        max_mb=100,
    )


def interlaced() -> bytes:
    """8×8 red pixels in the seven passes of Adam7."""
    passes = [(1, 1), (1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4)]
    data = b"".join((b"\0" + b"\xff\0\0" * width) * height for width, height in passes)
    head = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 1)
    return (
        b"\x89PNG\r\n\x1a\n"
        + kit.chunk(b"IHDR", head)
        + kit.chunk(b"IDAT", zlib.compress(data))
        + kit.chunk(b"IEND", b"")
    )


def strips() -> bytes:
    """A TIFF of 64×48 red pixels in strips of five rows."""
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, "TIFF", tiffinfo={278: 5})
    return file.getvalue()


def bomb_png() -> bytes:
    """An animated PNG whose frames have 400 million pixels."""
    places = struct.pack(">IIIII", 0, 20000, 20000, 0, 0) + struct.pack(">HHBB", 1, 1, 0, 0)
    control = kit.chunk(b"acTL", struct.pack(">II", 9, 0)) + kit.chunk(b"fcTL", places)
    return kit.png(20000, 20000, 8, 2, kit.zeros_deflated(1 << 20), control)


def canvas_webp(width: int, height: int) -> bytes:
    """An animation of small frames before a large canvas."""
    sizes = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"VP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + sizes + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def archives(out: Any) -> None:
    """ZIP and tar files that lie."""
    picture = kit.jpg()
    names = [f"{part}/{label}/{i}.jpg" for part in ("train", "val") for label in "ab" for i in range(4)]
    good: list[tuple[str, bytes, int | None]] = [(name, kit.jpg(kit.noise(i)), None) for i, name in enumerate(names)]

    def archive(name: str, data: bytes, expect: str, why: str, **more: Any) -> None:
        out.w(f"archive/{name}", data, expect, why, max_s=1, max_mb=100, **more)

    plain = kit.fixed_zip(good)
    archive("plain.zip", plain, "accept", "control", check="files=16")
    archive("commented.zip", plain[:-2] + struct.pack("<H", 500) + b"x" * 500, "accept", "a comment", check="files=16")
    archive("self_extracting.zip", b"#!/bin/sh\n" + plain, "either", "a program before it")
    archive("twice.zip", kit.fixed_zip([*good, good[0]]), "reject", "a name twice")
    archive(
        "case.zip",
        kit.fixed_zip([*good, ("train/a/0.JPG", kit.jpg(kit.noise(99)), None)]),
        "either",
        "names that differ in case",
    )
    archive("link.zip", kit.fixed_zip([*good, ("train/a/l.jpg", b"/etc/passwd", 0o120777)]), "reject", "a link")
    archive("pipe.zip", kit.fixed_zip([*good, ("train/a/p.jpg", b"", 0o010644)]), "reject", "a pipe")
    archive("device.zip", kit.fixed_zip([*good, ("train/a/d.jpg", b"", 0o020644)]), "reject", "a device")
    archive("encrypted.zip", flagged(plain, 1), "reject", "encrypted members")
    archive("encrypted_table.zip", flagged(plain, 0x40), "reject", "strong encryption")
    archive("bzip2.zip", kit.fixed_zip(good, zipfile.ZIP_BZIP2), "reject", "a packing that is not read")
    archive("drive.zip", kit.fixed_zip([*good, ("C:/x.jpg", picture, None)]), "reject", "a drive's letter")
    archive("backslash.zip", kit.fixed_zip([*good, ("..\\..\\x.jpg", picture, None)]), "reject", "backslashes")
    archive("zip64_lies.zip", zip64(2**62), "reject", "a table of contents at 2^62")
    archive("count_lies.zip", counted(plain, 65535), "reject", "more entries than there are")
    archive("overlap.zip", overlapping(), "reject", "fifty members of the same bytes")
    archive("nested.zip", kit.fixed_zip([("train.zip", plain, None)]), "reject", "an archive in an archive")
    archive("empty.zip", b"PK\5\6" + bytes(18), "reject", "no members")
    archive("sizes_lie.zip", shorter(plain), "either", "a size that is not that of the content: one image refused")
    tar = [(name, data, tarfile.REGTYPE, "", None) for name, data, _ in good]
    archive("plain.tar", kit.fixed_tar(tar), "accept", "control", check="files=16")
    archive(
        "hard_link.tar",
        kit.fixed_tar([*tar, ("train/a/h.jpg", b"", tarfile.LNKTYPE, "/etc/passwd", None)]),
        "reject",
        "a hard link",
    )
    archive(
        "device.tar", kit.fixed_tar([*tar, ("train/a/z.jpg", b"", tarfile.CHRTYPE, "", None)]), "reject", "a device"
    )
    archive(
        "pax_size.tar",
        kit.fixed_tar([*tar, ("train/a/x.jpg", picture, tarfile.REGTYPE, "", {"size": "99999999999999"})]),
        "reject",
        "a size in the extended header",
    )
    archive(
        "bomb.tar.gz",
        gzip.compress(kit.fixed_tar([("train/a/0.jpg", bytes(1 << 28), tarfile.REGTYPE, "", None)]), mtime=0),
        "reject",
        "256 MB in 256 kB",
    )
    archive("cut.tar.gz", gzip.compress(kit.fixed_tar(tar), mtime=0)[:-4000], "reject", "cut")
    archive("noise.tar", np.random.default_rng(0).bytes(10240), "reject", "noise")


def flagged(data: bytes, flag: int) -> bytes:
    """An archive whose members, in both headers, have a flag."""
    changed = bytearray(data)
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = data.find(mark)
        while at >= 0:
            changed[at + place] |= flag
            at = data.find(mark, at + 4)
    return bytes(changed)


def zip64(place: int) -> bytes:
    """An end of a large archive whose table of contents lies nowhere."""
    record = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 2**40, 2**40, 2**60, place)
    locator = b"PK\6\7" + struct.pack("<IQI", 0, 0, 1)
    return record + locator + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)


def counted(data: bytes, count: int) -> bytes:
    """An archive that says it has so many members."""
    at = data.rindex(b"PK\5\6")
    return data[: at + 8] + struct.pack("<HH", count, count) + data[at + 12 :]


def overlapping() -> bytes:
    """Fifty entries in the table of contents for the same bytes."""
    data = kit.fixed_zip([("train/a/0.jpg", kit.jpg(), None)])
    at = data.index(b"PK\1\2")
    entry = data[at : data.rindex(b"PK\5\6")]
    table = b"".join(entry.replace(b"0.jpg", b"%05d" % i) for i in range(50))
    return data[:at] + table + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 50, 50, len(table), at, 0)


def shorter(data: bytes) -> bytes:
    """An archive whose first member claims to be a byte shorter, in the table of contents alone."""
    at = data.index(b"PK\1\2") + 24
    return data[:at] + struct.pack("<I", struct.unpack_from("<I", data, at)[0] - 1) + data[at + 4 :]


def checkpoints(out: Any) -> None:
    """Weights that lie, break off or are not what they should be."""
    state = kit.tiny_state()
    first, name = next(iter(state)), "blocks.0.mlp.fc1.weight"

    def weights(file: str, data: bytes, expect: str, why: str, **more: Any) -> None:
        out.w(f"ckpt/{file}", data, expect, why, max_mb=100, **more)

    def changed(file: str, value: np.ndarray, why: str) -> None:
        weights(f"{file}.safetensors", kit.st({**state, name: value}), "reject", why, check=f"names={name}")

    weights("good.safetensors", kit.st(state), "accept", "control")
    weights("good.pth", kit.torch_state(state), "accept", "control")
    weights("good_half.safetensors", kit.st({k: v.astype(np.float16) for k, v in state.items()}), "accept", "fp16")
    weights("good_double.pth", kit.torch_state({k: v.astype(np.float64) for k, v in state.items()}), "accept", "fp64")
    changed("negative_inf", np.full_like(state[name], -np.inf), "-Inf")
    changed(
        "one_nan",
        np.where(np.arange(state[name].size).reshape(state[name].shape) == 5, np.nan, state[name]).astype(np.float32),
        "one NaN",
    )
    changed("zero", np.zeros_like(state[name]), "a kernel of zeros")
    changed("whole", np.ones(state[name].shape, np.int32), "whole numbers")
    changed("transposed", state[name].T.copy(), "transposed")
    changed("double_overflow", np.full(state[name].shape, 1e300), "too large for float32")
    changed("flat", state[name].ravel(), "one axis")
    changed("empty", np.zeros((0, 8), np.float32), "no numbers")
    header = json.dumps({first: {"dtype": "F32", "shape": [1, 1, 8], "data_offsets": [0, 32]}}).encode()
    weights(
        "deep.safetensors", kit.st_raw(b'{"__metadata__":' + b"[" * 50000 + b"]" * 50000 + b"}"), "reject", "deep JSON"
    )
    weights("repeated.safetensors", kit.st_raw(header[:-1] + b"," + header[1:], bytes(32)), "reject", "a name twice")
    weights(
        "negative.safetensors",
        kit.st_raw({first: {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)),
        "reject",
        "a negative side",
    )
    weights(
        "backwards.safetensors",
        kit.st_raw({first: {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, bytes(4)),
        "reject",
        "an end before the start",
    )
    weights(
        "product.safetensors",
        kit.st_raw({first: {"dtype": "F32", "shape": [2**33, 2**33], "data_offsets": [0, 4]}}, bytes(4)),
        "reject",
        "sides whose product overflows",
    )
    weights(
        "strange.safetensors",
        kit.st_raw({first: {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        "reject",
        "an unknown type",
    )
    weights(
        "many.safetensors",
        kit.st_raw({f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(30000)}),
        "reject",
        "30,000 tensors of nothing",
    )
    weights(
        "gap.safetensors",
        kit.st_raw({first: {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)),
        "reject",
        "a hole",
    )
    weights("list.safetensors", kit.st_raw(b"[1,2]"), "reject", "no object")
    pairs = [(k, v) for k, v in state.items()]
    arrays = [
        (f"{k}.npy", kit.npy(str({"descr": "<f4", "fortran_order": False, "shape": v.shape}), v.tobytes()))
        for k, v in pairs
    ]
    weights(
        "objects.npz",
        kit.npz([("a.npy", kit.npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"\x80\4."))]),
        "reject",
        "an array of objects",
    )
    weights(
        "struct.npz",
        kit.npz([("a.npy", kit.npy("{'descr': [('x', '<f4')], 'fortran_order': False, 'shape': (1,), }", bytes(4)))]),
        "reject",
        "a structured array",
    )
    weights(
        "code.npz",
        kit.npz([("a.npy", kit.npy("__import__('os').mkdir('BADINPUT_CANARY_npz')", bytes(4)))]),
        "reject",
        "code for a header",
    )
    weights("deep.npz", kit.npz([("a.npy", kit.npy("(" * 3000 + ")" * 3000, bytes(4)))]), "reject", "a deep header")
    weights(
        "negative.npz",
        kit.npz([("a.npy", kit.npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }", bytes(4)))]),
        "reject",
        "a negative side",
    )
    weights(
        "true.npz",
        kit.npz([("a.npy", kit.npy("{'descr': '<f4', 'fortran_order': False, 'shape': (True,), }", bytes(4)))]),
        "reject",
        "a side that is True",
    )
    weights(
        "endless.npz",
        kit.npz(
            [("a.npy", kit.npy("{'descr': '<f4', 'fortran_order': False, 'shape': (%s,), }" % ("9" * 4000), bytes(4)))]
        ),
        "reject",
        "a side of 4,000 digits",
    )
    weights(
        "bomb.npz",
        kit.npz(
            [("a.npy", kit.npy("{'descr': '<f4', 'fortran_order': False, 'shape': (67108864,), }", bytes(1 << 28)))]
        ),
        "reject",
        "256 MB of zeros",
        max_s=1,
    )
    weights("foreign.npz", kit.npz(arrays), "either", "the names of timm, as nobody writes them to .npz")
    weights("text.npz", b"PK\3\4 and nothing more", "reject", "no archive")
    weights("proto0.pth", b"cos\nmkdir\n(S'BADINPUT_CANARY_p0'\ntR.", "reject", "an old pickle that calls")
    weights("inst.pth", b"(S'BADINPUT_CANARY_inst'\nios\nmkdir\n.", "reject", "an instance that calls")
    weights("extension.pth", b"\x80\2\x82\1.", "reject", "an extension code")
    weights("persistent.pth", b"\x80\2X\1\0\0\0xQ.", "reject", "a reference to nothing")
    weights("memo.pth", b"\x80\2N" + b"r\xff\xff\xff\x7f" + b".", "reject", "a memo at 2^31", max_s=1)
    weights("long.pth", b"\x80\2\x8b\xff\xff\xff\x7f" + bytes(8), "reject", "a number of 2 GB")
    weights("frame.pth", b"\x80\4\x95" + b"\xff" * 8 + b"N.", "reject", "a frame of 2^64")
    weights("doubling.pth", b"\x80\2]q\0" + b"h\0h\0\x86q\0" * 64 + b".", "reject", "2^64 items by reference", max_s=1)
    weights("self.pth", b"\x80\2}q\0X\1\0\0\0ah\0s.", "reject", "a dictionary in itself", max_s=1)
    negative = kit.p_dict([(first, kit.p_tensor("0", 8, (1, 1, 8), (8, 8, 1), offset=-8))])
    weights("before.pth", kit.torch_zip(negative, {"0": bytes(32)}), "reject", "numbers before the storage")
    beyond = kit.p_dict([(first, kit.p_tensor("0", 8, (1, 1, 8), (8, 8, 2**40)))])
    weights("stride.pth", kit.torch_zip(beyond, {"0": bytes(32)}), "reject", "a stride of 2^40")
    wide = kit.p_dict([(first, kit.p_tensor("0", 1, (2**20, 2**20), (0, 0)))])
    weights("expanded.pth", kit.torch_zip(wide, {"0": bytes(4)}), "reject", "2^40 values of one", max_s=1)
    up = kit.p_dict([(first, kit.p_tensor("../../etc/passwd", 8, (1, 1, 8), (8, 8, 1)))])
    weights("path.pth", kit.torch_zip(up, {"../../etc/passwd": bytes(32)}), "reject", "a storage whose key is a path")


def configurations(out: Any) -> None:
    """Configurations of transformers that ask for too much, or for what there is not."""
    deep = '{"model_type": "vit", "x": ' + "[" * 100_000 + "]" * 100_000 + "}"

    def config(name: str, data: bytes, why: str, expect: str = "reject") -> None:
        out.w(f"config/{name}/config.json", data, expect, why, max_mb=100)

    def vit(name: str, why: str, **settings: Any) -> None:
        config(name, kit.vit_config(**settings), why)

    config("good", kit.vit_config(), "control", "accept")
    config("deep", deep.encode(), "deep JSON")
    config("twice", kit.vit_config()[:-1] + b', "hidden_size": 16}', "a key twice")
    config("bom", b"\xff\xfe" + kit.vit_config().decode().encode("utf-16-le"), "UTF-16")
    config("list", b"[]", "no object")
    config("digits", kit.vit_config().replace(b'"hidden_size": 8', b'"hidden_size": ' + b"9" * 5000), "5,000 digits")
    config("nul", kit.vit_config() + b"\0", "a zero byte behind it")
    config("unicode", kit.vit_config().replace(b'"vit"', b'"\\ud800"'), "half a surrogate")
    vit("width", "a billion wide", hidden_size=BIG)
    vit("mlp", "a billion hidden units", intermediate_size=BIG)
    vit("classes", "a billion classes", id2label=None, label2id=None, num_labels=BIG)
    vit("channels", "a billion channels", num_channels=BIG)
    vit("heads", "no heads", num_attention_heads=0)
    vit("negative", "negative layers", num_hidden_layers=-1)
    vit("boolean", "a truth for a number", num_hidden_layers=True)
    vit("text", "text for a number", hidden_size="8")
    vit("fraction", "half a layer", num_hidden_layers=0.5)
    vit("epsilon", "an eps that is no number", layer_norm_eps=float("nan"))
    vit("activation", "an activation by a path", hidden_act="os.system")
    vit("private", "a private key", _attn_implementation_internal="x")
    vit("remote", "code from elsewhere", auto_map={"AutoModel": "x/y--z.Z"}, trust_remote_code=True)
    vit("labels", "labels that are no object", id2label=["a", "b", "c", "d"])
    vit("sides", "an image of three sides", image_size=[32, 32, 32])
    vit("patch", "a patch larger than the image", patch_size=10**6)
    vit("type", "a type that is no text", model_type=["vit"])
    swin: Mapping[str, Any] = {"model_type": "swin", "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
    for name, more in {
        "swin_depths": {"depths": [BIG, BIG]},
        "swin_stages": {"depths": [1] * 100_000, "num_heads": [1] * 100_000},
        "swin_window": {"window_size": BIG},
        "swin_image": {"image_size": BIG},
        "swin_wide": {"embed_dim": BIG, "num_heads": [1, 1]},
    }.items():
        config(name, json.dumps({**swin, **more}).encode(), f"Swin: {more!r:.60}")
    for kind in ("beit", "dinov2", "deit", "vit_mae", "resnet", "bit", "vit_hybrid", "dinov2_with_registers"):
        config(f"{kind}_huge", json.dumps({"model_type": kind, "hidden_size": BIG, "image_size": BIG}).encode(), kind)


def tables(out: Any) -> None:
    """Tables as spreadsheets and attackers write them."""
    picture = kit.jpg()

    def table(name: str, text: bytes, expect: str, why: str) -> None:
        for i in range(8):
            out.w(f"dataset/{name}/{i}.jpg", kit.jpg(kit.noise(i)) if i else picture, "accept", "a picture")
        out.w(f"dataset/{name}/labels.csv", text, expect, why)

    rows = b"".join(b"%d.jpg,%s\n" % (i, b"ab"[i % 2 : i % 2 + 1]) for i in range(8))
    table("bom", b"\xef\xbb\xbfpath,label\n" + rows, "accept", "a mark of UTF-8 before it")
    table("crlf", (b"path,label\n" + rows).replace(b"\n", b"\r\n"), "accept", "lines of Windows")
    table("quoted", b'"path","label"\n' + rows, "accept", "quotes")


if __name__ == "__main__":
    print(f"{len(make(sys.argv[1]))} items")
