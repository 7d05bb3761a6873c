"""Files that were made to do harm: each is answered or refused in time and in bounds, and nothing else happens.

`proofs/hostile.py` does the same with every file and every entry point; here are the decisive ones.
"""

import contextlib
import csv
import gzip
import io
import json
import os
import resource
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import badinputs
from command import TINY, cli
from sightline.datasets.open import open_dataset
from sightline.datasets.table import read_table
from sightline.errors import UserError
from sightline.images.decode import ImageError, Limits, decode, image_size
from sightline.inference.files import write_csv
from sightline.inference.predictor import Answer
from sightline.types import Prediction, Score


@pytest.fixture(scope="module")
def kit(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kit")
    badinputs.public(str(folder))
    return folder


def items(kit: Path, family: str) -> list[dict]:
    return [item for item in json.loads((kit / "manifest.json").read_text())["items"] if item["family"] == family]


def resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def read(source: Path | bytes, **options) -> tuple[np.ndarray | None, ImageError | None]:
    """The image, or why there is none; any other exception is a failure."""
    try:
        return decode(source, **options), None
    except ImageError as error:
        return None, error


def test_every_image_meets_its_expectation(kit):
    assert len(items(kit, "image")) == 41
    for item in items(kit, "image"):
        before, began = resident(), time.perf_counter()
        image, refused = read(kit / item["path"])
        if refused is not None:
            assert item["expect"] != "accept", str(refused)
            assert refused.file.endswith(item["path"])
            assert refused.reason
        if image is not None:
            assert item["expect"] != "reject", item["path"]
            facts = dict(fact.partition("=")[::2] for fact in (item["check"] or "").split(";"))
            if "size" in facts:
                assert f"{image.shape[1]}x{image.shape[0]}" == facts["size"], item["path"]
            if facts.get("tl") == "red":
                assert np.abs(image[8, 8].astype(int) - (255, 0, 0)).max() < 60, item["path"]
        assert time.perf_counter() - began < 4 * item["max_s"], item["path"]  # other tests may be at work
        assert resident() - before < item["max_mb"], item["path"]


def progressive(side: int, scans: int) -> bytes:
    """A grey JPEG in which each scan but the first is a dozen bytes that visit every block."""
    blocks = (-(-side // 8)) ** 2
    data = b"\xff\xd8" + badinputs.seg(0xDB, b"\0" + bytes([1] * 64))
    data += badinputs.seg(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0")
    data += badinputs.seg(0xC4, b"\0" + bytes([1] + [0] * 15) + b"\0")
    data += badinputs.seg(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\xe0")
    data += badinputs.seg(0xDA, b"\1\1\0\0\0\0") + bytes(blocks // 8 + 1)
    body = bytes(15 * -(-blocks // 2**14) // 8 + 2)
    for i in range(scans):
        data += badinputs.seg(0xDA, bytes([1, 1, 0, 1 + i % 63, 1 + i % 63, 0])) + body
    return data + b"\xff\xd9"


def webp(width: int, height: int) -> bytes:
    """An animation whose canvas is as large as it says, and whose frame is small."""
    frame = badinputs.enc(badinputs.quad(), "WEBP", lossless=True)[12:]
    sizes = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"VP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + sizes + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    inside = bytes(6) + struct.pack("<I", 63)[:3] + struct.pack("<I", 47)[:3] + bytes(4) + frame
    body += b"ANMF" + struct.pack("<I", len(inside)) + inside
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def gif(screen: tuple[int, int], frame: tuple[int, int], extra: bytes = b"") -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + extra
    return head + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\2\2\x44\1\0;"


def tiled(side: int) -> bytes:
    """A TIFF of 64×48 pixels in one tile of side × side."""
    data = badinputs.zeros_deflated(1 << 20)
    entries = [(256, 4, 64), (257, 4, 48), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1)]
    entries += [(322, 4, side), (323, 4, side), (324, 4, 8 + 2 + 120 + 4), (325, 4, len(data))]
    packed = b"".join(
        struct.pack("<HHI", tag, kind, 1) + (struct.pack("<HH", value, 0) if kind == 3 else struct.pack("<I", value))
        for tag, kind, value in entries
    )
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + struct.pack("<I", 0) + data


JPEG, PNG = badinputs.jpg(), badinputs.enc(badinputs.noise(4), "PNG")
START = badinputs.png(64, 48, 8, 2, b"")[:33]
FIVE = zlib.compress(b"\0\0\0\0\0" * 4)
COSTLY = {  # what would take a naive reader seconds, minutes or gigabytes: bytes, and the reason of the refusal
    "jpeg of 1,000 scans": (lambda: progressive(7000, 1000), "scans"),
    "jpeg of filling": (lambda: JPEG[:2] + b"\xff" * 2_000_000 + JPEG[2:], "pieces"),
    "jpeg of comments": (lambda: JPEG[:2] + badinputs.seg(0xFE, b"x") * 200_000 + JPEG[2:], "pieces"),
    "png of empty chunks": (lambda: START + badinputs.chunk(b"IDAT", b"") * 200_000, "chunks"),
    "png of zeros": (lambda: START + bytes(1 << 24), "PNG chunk"),
    "png with a large profile": (
        lambda: badinputs.png(4, 4, 8, 0, FIVE, badinputs.chunk(b"iCCP", b"x\0\0" + badinputs.zeros_deflated(1 << 26))),
        "too large",
    ),
    "png without end": (lambda: PNG[:-12], "truncated"),
    "png without pixels": (lambda: badinputs.png(64, 48, 8, 2, zlib.compress(bytes(99))), "truncated"),
    "png of 2^31": (lambda: badinputs.png(2**31 - 1, 2**31 - 1, 8, 2, b""), "over the limit"),
    "webp of 16,383": (lambda: webp(16383, 16383), "over the limit"),
    "webp of 2^24": (lambda: webp(2**24, 2**24), "over the limit"),
    "gif of 65,535": (lambda: gif((65535, 65535), (1, 1)), "over the limit"),
    "gif with a larger frame": (lambda: gif((1, 1), (65535, 65535)), "limit"),
    "gif of extensions": (lambda: gif((4, 4), (4, 4), b"\x21\xfe\1a\0" * 200_000), "pieces"),
    "bmp of 2^31": (
        lambda: b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, *[0] * 6),
        "over the limit",
    ),
    "tiff of 2^31": (lambda: badinputs.tiff(2**31 - 1, 2**31 - 1, 8, 1, 1, 1, bytes(16)), "over the limit"),
    "tiff in a large tile": (lambda: tiled(30000), "tiles of 30000×30000"),
    "ppm of text": (lambda: b"P3 7000 7000 255\n" + b"1 " * 99, "147,000,000 values"),
    "ppm of comment": (lambda: b"P6 #" + b"x" * (1 << 21) + b"\n8 8 255\n" + bytes(192), "pieces"),
    "ppm of no size": (lambda: b"P6 " + b"9" * 50 + b" " + b"9" * 50 + b" 255\n", "damaged|over"),
    "pfm of nothing": (lambda: b"Pf 4 4 -1.0\n" + struct.pack("<f", float("nan")) * 16, "not finite"),
}


@pytest.mark.parametrize("name", COSTLY)
def test_work_is_bounded(name):
    make, reason = COSTLY[name]
    data = make()
    before, began = resident(), time.perf_counter()
    with pytest.raises(ImageError, match=reason):
        decode(data)
    assert time.perf_counter() - began < 5  # half a second, where nothing else is at work
    assert resident() - before < 100


def test_large_images_are_converted_in_strips():
    data = badinputs.png(5000, 5000, 8, 6, badinputs.zeros_deflated(20_001 * 5000))  # RGBA: 100 MB, and 75 MB as RGB
    before = resident()
    assert decode(data).shape == (5000, 5000, 3)
    assert resident() - before < 260
    rng = np.random.default_rng(0)
    layer = Image.fromarray(rng.integers(0, 256, (1500, 1400, 4), dtype=np.uint8))  # two strips
    white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    assert np.array_equal(decode(layer), np.asarray(Image.alpha_composite(white, layer).convert("RGB")))
    deep = rng.integers(0, 65536, (1500, 1400)).astype(np.uint16)
    assert np.array_equal(decode(Image.fromarray(deep))[..., 0], np.rint(deep / 257).astype(np.uint8))


SEEDS = [JPEG, PNG, badinputs.jpg(progressive=True), webp(70, 50), gif((9, 9), (9, 9)), tiled(64)]
SEEDS += [badinputs.enc(badinputs.noise(1, 20, 16), kind) for kind in ("GIF", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000")]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_spliced_and_shifted_files_are_images_or_refusals(data):
    content = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content)))
        match data.draw(st.sampled_from(["cut", "insert", "repeat", "number", "splice"])):
            case "cut":
                del content[place : place + data.draw(st.integers(1, 40))]
            case "insert":
                content[place:place] = data.draw(st.binary(max_size=12))
            case "repeat":
                content[place:place] = content[place : place + 64] * data.draw(st.integers(1, 9))
            case "number":
                number = data.draw(st.sampled_from([0, 1, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1]))
                content[place : place + 4] = struct.pack(data.draw(st.sampled_from(["<I", ">I"])), number)
            case "splice":
                content[place:] = data.draw(st.sampled_from(SEEDS))[place:]
    image, refused = read(bytes(content), limits=Limits(pixels=4_000_000))
    assert image is not None or "0x" not in str(refused)  # no addresses
    with contextlib.suppress(ImageError):
        image_size(bytes(content))


# Tables


def test_a_table_names_every_faulty_row(kit):
    with pytest.raises(UserError) as caught:
        open_dataset(kit / "dataset" / "csv" / "labels.csv")
    for line, words in {2: "outside", 3: "no such file", 4: "no such file"}.items():
        assert any(f"line {line}: " in row and words in row for row in str(caught.value).splitlines())


def test_tables_that_never_end(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "device.csv").symlink_to("/dev/zero")
    (tmp_path / "wide.csv").write_text("path,label" + ",x" * 2**20 + "\n")
    with (tmp_path / "holes.csv").open("wb") as file:
        file.write(b"path,label\n")
        file.truncate(2**33)
    for name, words in {"pipe": "regular", "device": "regular", "wide": "characters", "holes": "characters"}.items():
        began = time.perf_counter()
        with pytest.raises(UserError, match=words):
            read_table(tmp_path / f"{name}.csv", seed=0, held_out=0.2)
        assert time.perf_counter() - began < 2


def test_no_cell_is_computed():
    names = ["=1+1", "+1", "-rf.jpg", "@x", "\t=1", "\r=1", " =1", "＝1", "a;=1", "a,b", "plain"]
    answers = [Answer(n, Prediction((Score(n, 0, 1.0),))) for n in names] + [Answer(n, error=n) for n in names]
    with io.StringIO(newline="") as stream:
        assert len(list(write_csv(answers, stream))) == len(answers)
        text = stream.getvalue()
    rows = list(csv.reader(io.StringIO(text, newline="")))[1:]
    assert [Path(row[0]) for row in rows] == [Path(n) for n in names + names]  # the same files
    assert rows[10] == ["plain", "plain", "0", "1.0", ""]
    for row in [*rows, *csv.reader(io.StringIO(text, newline=""), delimiter=";")]:
        assert not [cell for cell in row if cell.strip()[:1] in tuple("=+-@＝") and cell]


# Commands


def test_a_run_names_what_it_cannot_read_and_counts_it(kit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    bad = {
        "cut.jpg": "truncated_50.jpg",
        "<b>&.png": "png_bad_idat_crc.png",
        "big.png": "bomb_warnzone_13000x13000.png",
    }
    for part in ("train", "val"):
        for label in ("<img src=x onerror=alert(1)>", "=b"):
            (data / part / label).mkdir(parents=True)
            for i in range(6):
                (data / part / label / f"{i}.jpg").write_bytes(badinputs.jpg(badinputs.noise(i)))
        for name, item in bad.items():
            (data / part / "=b" / name).write_bytes((kit / "image" / item).read_bytes())
    small = (*TINY, "--patch-size", 8, "--image-size", 16, "--epochs", 1, "--batch-size", 18, "--json")
    said = cli("train", data, *small, "--refused-limit", 1, "--out", "run")
    assert said.status == 0, said.err
    assert said.document["counts"] == {"evaluated": 12, "refused": 3}
    record = json.loads(Path("run/run.json").read_text())
    for part in ("train", "val"):
        assert {name for name, _ in record["refused"][part]} == {f"{part}/=b/{name}" for name in bad}
        assert all(f"{part}/=b/{name}" in said.err for name in bad)
    for page in ("run/report.html", "run/README.md"):
        assert "<img src=x" not in Path(page).read_text()
        assert "<b>&" not in Path(page).read_text()
    said = cli("train", data, *small, "--out", "stopped")
    assert said.status in (1, 2)
    assert "=b/" in said.err
    said = cli("evaluate", "run", data, "--workers", 0, "--json")
    assert said.document["counts"] == {"evaluated": 12, "refused": 3}
    hits = sum(row[i] for i, row in enumerate(said.document["confusion"]))
    assert said.document["metrics"]["top1"] == pytest.approx(hits / 15)
    assert not list(tmp_path.glob("BADINPUT*"))


def test_an_archive_for_an_image_is_told_what_to_do(tmp_path):
    files = {"x.zip": badinputs.fixed_zip([("a.jpg", JPEG, None)])}
    files["x.tar"] = badinputs.fixed_tar([("a.jpg", JPEG, b"0", "", None)])
    files["x.tar.gz"] = gzip.compress(files["x.tar"])
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match="is an archive, not an image; unpack it into a folder and name that"):
            decode(tmp_path / name)


def test_archives_of_the_kit(kit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for item in items(kit, "archive"):
        if item["expect"] == "reject":
            began = time.perf_counter()
            said = cli("check", kit / item["path"], "--workers", 0)
            assert said.status == 2
            assert str(kit / item["path"]) in said.out + said.err
            assert time.perf_counter() - began < 5
        else:
            assert len(open_dataset(kit / item["path"]).together()) == 6
    assert list(tmp_path.iterdir()) == []
