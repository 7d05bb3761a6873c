"""Images are read out of archives as out of folders, and an archive that could do harm is refused by name."""

import gzip
import hashlib
import io
import os
import pickle
import stat
import struct
import tarfile
import time
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from command import TINY, cli, refusal
from sightline.datasets import gzipped
from sightline.datasets.archive import open_archive
from sightline.datasets.loader import OrderedLoader
from sightline.datasets.open import open_dataset
from sightline.errors import UserError
from sightline.images.decode import ImageError, decode, image_size
from sightline.images.preprocess import Preprocess


def picture(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    with io.BytesIO() as stream:
        Image.fromarray(pixels).save(stream, kind)
        return stream.getvalue()


FILES = {f"{label}/{i}.png": picture(10 * place + i) for place, label in enumerate("ab") for i in range(5)}
PARTS = {f"{part}/{name}": data for part in ("train", "val") for name, data in FILES.items()}


def zipped(path: Path, files: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.filename, info.compress_type = name, how  # as it is
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of names that are there twice
                archive.writestr(info, data)
    return path


def tarred(path: Path, files: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    mode = "w:gz" if path.name.endswith("gz") else "w"
    with tarfile.open(path, mode, format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def tarred_as(path: Path, **settings) -> Path:
    """A tar archive with one odd member between two images."""
    with tarfile.open(path, "w") as archive:
        for info in (tarfile.TarInfo("a/1.png"), tarfile.TarInfo("odd"), tarfile.TarInfo("b/1.png")):
            for name, value in settings.items() if info.name == "odd" else ():
                setattr(info, name, value)
            archive.addfile(info)
    return path


MAKERS = {"x.zip": zipped, "x.tar": tarred, "x.tar.gz": tarred, "x.tgz": tarred}


def fault(path: Path) -> str:
    before = time.perf_counter()
    with pytest.raises(UserError) as caught:
        open_dataset(path)
    assert time.perf_counter() - before < 1
    assert str(path) in str(caught.value)
    return str(caught.value)


# As a folder


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("files", [FILES, PARTS], ids=["plain", "parts"])
def test_an_archive_is_read_as_its_folder_would_be(name, files, tmp_path):
    for file, data in files.items():
        (tmp_path / "folder" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / file).write_bytes(data)
    folder, archive = open_dataset(tmp_path / "folder"), open_dataset(MAKERS[name](tmp_path / name, files))
    for one, other in ((folder.train, archive.train), (folder.val, archive.val)):
        assert list(one.samples.names) == list(other.samples.names)
        assert (one.classes, one.targets.tolist()) == (other.classes, other.targets.tolist())
        for on_disk, inside in zip(one.samples, other.samples, strict=True):
            assert inside.image.read(10**6) == on_disk.image.read_bytes()
            assert np.array_equal(decode(inside.image), decode(on_disk.image))
            assert image_size(pickle.loads(pickle.dumps(inside.image))) == (9, 13)


@pytest.mark.parametrize("name", MAKERS)
def test_a_folder_around_everything_and_what_lies_about(name, tmp_path):
    files = {f"./photos/{file}": data for file, data in FILES.items()}
    more = {"photos/read.me": b"x", "__MACOSX/photos/a/._1.png": b"x", "photos/a/.DS_Store": b"", "photos/c/x.txt": b""}
    splits = open_dataset(MAKERS[name](tmp_path / name, files | more))
    assert splits.train.counts() == {"a": 4, "b": 4}
    assert set(splits.together().samples.names) == {f"photos/{file}" for file in FILES}
    assert any("classes without images: 'c'" in note for note in splits.notes)
    assert any("no image files: 'read.me', 'x.txt'" in note for note in splits.notes)
    assert any("hidden files and folders left out: 2" in note for note in splits.notes)


def test_layouts_are_refused_as_those_of_folders(tmp_path):
    assert "only one class" in fault(zipped(tmp_path / "1.zip", {"a/1.png": b"1", "a/2.png": b"2"}))
    assert "no images found" in fault(zipped(tmp_path / "2.zip", {}))
    assert "only in the training part: 'b'" in fault(
        zipped(tmp_path / "3.zip", {"train/a/1.png": b"", "train/b/1.png": b"", "val/a/1.png": b""})
    )
    assert "upper and lower case" in fault(zipped(tmp_path / "4.zip", {"a/1.png": b"", "A/1.png": b""}))


def test_names_of_every_kind(tmp_path):
    odd = {
        "ä 写/🐈.png": picture(1),
        "ä 写/new\nline.png": picture(2),
        "b/" + "n" * 200 + ".png": picture(3),
        "b/2.png": b"2",
    }
    for path in (
        zipped(tmp_path / "n.zip", odd),
        tarred(tmp_path / "n.tar", odd),
        tarred(tmp_path / "g.tar", odd, tarfile.GNU_FORMAT),
    ):
        images = open_dataset(path).together()
        assert set(images.samples.names) == set(odd)
        assert all(sample.image.read(10**6) == odd[sample.name] for sample in images.samples)
    latin = {
        os.fsdecode(b"a/\xff.png"): picture(1),
        "a/2.png": picture(2),
        "b/1.png": picture(3),
        "b/2.png": picture(4),
    }
    with tarfile.open(tmp_path / "l.tar", "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as archive:
        for name, data in latin.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    images = open_dataset(tmp_path / "l.tar").together()
    assert set(images.samples.names) == set(latin)
    assert len(images.fingerprint()) == 64


def test_the_fingerprint_knows_contents(tmp_path):
    other = FILES | {"a/1.png": picture(77)}
    assert len(other["a/1.png"]) == len(FILES["a/1.png"])  # noise does not compress: a size would not tell
    for name, make in MAKERS.items():
        one = open_dataset(make(tmp_path / name, FILES)).train.fingerprint()
        (tmp_path / "later").mkdir(exist_ok=True)
        again = open_dataset(make(tmp_path / "later" / name, FILES)).train.fingerprint()
        assert one == again != open_dataset(make(tmp_path / name, other)).train.fingerprint()


def test_random_access_into_gzip(tmp_path, monkeypatch):
    monkeypatch.setattr(gzipped, "SPAN", 3000)
    monkeypatch.setattr(gzipped, "STEP", 700)
    files = {f"{'ab'[i % 2]}/{i}.png": np.random.default_rng(i).bytes(i * 37 % 2000) for i in range(200)}
    path = tarred(tmp_path / "x.tgz", files)
    packed = path.read_bytes()
    half = len(packed) // 2
    whole = gzip.decompress(packed)
    path.write_bytes(gzip.compress(whole[:half]) + gzip.compress(whole[half:]) + bytes(100))  # as pigz and cat make it
    archive, *_ = open_archive(path)
    for fresh in (False, True):
        if fresh:  # as in a process that was not forked from this one
            gzipped._OPENED.clear()
        for i in np.random.default_rng(0).permutation(200):
            name = f"{'ab'[i % 2]}/{i}.png"
            assert archive[name].read(10**6) == files[name]
            assert archive[name].read(11) == files[name][:11]


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tgz"])
def test_every_reader_gives_the_bits_of_the_file(name, tmp_path):
    contract = Preprocess((17, 23), resize="crop")
    images = open_dataset(MAKERS[name](tmp_path / name, PARTS)).val
    expected = {file: contract(data) for file, data in PARTS.items()}
    for workers in (0, 1):
        seen = 0
        for loaded in OrderedLoader(images, contract, batch_size=4, workers=workers):
            assert not loaded.refused
            for i, pixels in zip(loaded.batch.index.tolist(), loaded.batch.pixels, strict=True):
                assert torch.equal(pixels, expected[images.samples.names[i]])
                seen += 1
        assert seen == len(images) == 10


# What is refused


NAMES = {"../x.png": "'..'", "a/../../x.png": "'..'", "/x.png": "absolute", "C:/x.png": "absolute",
         "c:x.png": "absolute", "a\\x.png": "backslash",
         "..\\x.png": "backslash", "a/" * 2500 + "x.png": "4,096"}  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:12])
@pytest.mark.parametrize("archive", ["x.zip", "x.tar", "x.tgz"])
def test_names_that_lead_out(archive, name, tmp_path):
    message = fault(MAKERS[archive](tmp_path / archive, FILES | {name: picture(0)}))
    assert NAMES[name] in message
    assert name[:50].replace("\\", "") in message.replace("\\", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == [archive]


@pytest.mark.parametrize("archive", ["x.zip", "x.tar"])
def test_members_that_are_there_twice(archive, tmp_path):
    message = fault(MAKERS[archive](tmp_path / archive, {**FILES, "./a//1.png": picture(0)}))
    assert "'./a//1.png' is in it twice" in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "a link"),
        ({"type": tarfile.LNKTYPE, "linkname": "a/1.png"}, "a link"),
        ({"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}, "a device"),
        ({"type": tarfile.BLKTYPE}, "a device"),
        ({"type": tarfile.FIFOTYPE}, "a pipe"),
        ({"type": tarfile.GNUTYPE_SPARSE}, "a file with holes"),
        ({"type": b"Z"}, "neither a file nor a folder"),
        ({"pax_headers": {"GNU.sparse.major": "1"}}, "a file with holes"),
    ],
)
def test_members_of_a_tar_that_are_no_files(settings, words, tmp_path):
    message = fault(tarred_as(tmp_path / "x.tar", **settings))
    assert "'odd' is " in message
    assert words in message


@pytest.mark.parametrize(
    ("mode", "words"), [(stat.S_IFLNK, "a link"), (stat.S_IFCHR, "a device"), (stat.S_IFIFO, "a pipe")]
)
def test_members_of_a_zip_that_are_no_files(mode, words, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        info = zipfile.ZipInfo("train/x.png")
        info.external_attr = (mode | 0o777) << 16
        archive.writestr(info, b"/etc/passwd")
    assert f"'train/x.png' is {words}" in fault(tmp_path / "x.zip")


def altered(path: Path, change) -> Path:
    """The archive with its central directory and its local headers changed alike: `change(header, is_central)`."""
    data = bytearray(path.read_bytes())
    for mark, central in ((b"PK\3\4", False), (b"PK\1\2", True)):
        place = -1
        while (place := data.find(mark, place + 1)) >= 0:
            change(memoryview(data)[place:], central)
    path.write_bytes(data)
    return path


def test_encrypted_and_unknown_packing(tmp_path):
    def encrypt(header, central):
        header[8 if central else 6] |= 1

    def repack(header, central):
        header[10 if central else 8] = 12

    assert "is encrypted" in fault(altered(zipped(tmp_path / "e.zip", FILES), encrypt))
    assert "method 12" in fault(altered(zipped(tmp_path / "m.zip", FILES), repack))
    for mark, kind in ((b"BZh9", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"7z\xbc\xaf\x27\x1c", "7z")):
        (tmp_path / "x.tar").write_bytes(mark + bytes(99))
        assert f"{kind} is not read" in fault(tmp_path / "x.tar")


def test_bombs(tmp_path):
    zeros = bytes(2**24)
    cases = {
        zipped(tmp_path / "declared.zip", {**FILES, "a/z.png": zeros}): "'a/z.png' is a bomb",
        tarred(tmp_path / "x.tgz", {**FILES, "a/z.png": zeros}): "is a bomb",
        tarred(tmp_path / "more.tgz", {**FILES, "z.txt": zeros}): "is a bomb",
    }
    for path, words in cases.items():
        tracemalloc.start()
        assert words in fault(path)
        assert tracemalloc.get_traced_memory()[1] < 15e6
        tracemalloc.stop()


def test_a_bomb_that_understates_its_size(tmp_path):
    def lie(header, central):
        struct.pack_into("<L", header, 24 if central else 22, 90_000)

    path = altered(zipped(tmp_path / "x.zip", {"a/z.png": b"\x89PNG\r\n\x1a\n" + bytes(2**26), "b/1.png": b""}), lie)
    with pytest.raises(UserError, match=r"'b/1\.png' is a bomb|two sizes"):
        open_dataset(path)

    def only_the_first(header, central):
        if b"z.png" in bytes(header[:60]):
            lie(header, central)

    path = altered(
        zipped(tmp_path / "y.zip", {"a/z.png": b"\x89PNG\r\n\x1a\n" + bytes(2**23), "b/1.png": b"1"}), only_the_first
    )
    archive, *_ = open_archive(path)
    tracemalloc.start()
    with pytest.raises(ImageError, match=r"y\.zip/a/z\.png: cannot decode: it holds more than the 90,000 bytes"):
        decode(archive["a/z.png"])
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


def test_members_that_share_their_bytes(tmp_path):
    path = zipped(tmp_path / "x.zip", {"a/1.png": picture(1), "b/1.png": picture(2)}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    second = data.rindex(b"PK\1\2")
    struct.pack_into("<L", data, second + 42, 0)  # both lie where the first one does
    data[second + 46 : second + 53] = b"a/2.png"
    path.write_bytes(data)
    assert "two headers" in fault(path)
    data[second + 46 : second + 53] = b"a/1.png"
    path.write_bytes(data)
    assert "twice" in fault(path)


def test_limits(tmp_path, monkeypatch):
    for make, name in ((zipped, "x.zip"), (tarred, "x.tar"), (tarred, "x.tgz")):
        path = make(tmp_path / name, FILES)
        monkeypatch.setenv("SIGHTLINE_ARCHIVE_FILES", "9")
        assert "more than 9 files" in fault(path)
        monkeypatch.delenv("SIGHTLINE_ARCHIVE_FILES")
        monkeypatch.setenv("SIGHTLINE_ARCHIVE_BYTES", "2000")
        assert "over the limit of 2,000" in fault(path)
        monkeypatch.delenv("SIGHTLINE_ARCHIVE_BYTES")
        assert len(open_dataset(path).train) == 8
    huge = tarfile.TarInfo("a/x.png")
    huge.size = 2**40
    (tmp_path / "h.tar").write_bytes(huge.tobuf())
    assert "'a/x.png' is cut off" in fault(tmp_path / "h.tar")
    with gzip.open(tmp_path / "h.tgz", "wb") as file:
        file.write(huge.tobuf())
    assert "over the limit" in fault(tmp_path / "h.tgz")
    with (tmp_path / "s.tar").open("wb") as file:  # a hole of 8 GB
        file.truncate(2**33)
    assert "something stands behind its end mark" in fault(tmp_path / "s.tar")


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tgz"])
def test_cut_anywhere_is_refused(name, tmp_path):
    path = MAKERS[name](tmp_path / name, FILES)
    data = path.read_bytes()
    end = len(data)
    if name == "x.tar":  # its last record is filled up: half of the end mark is enough
        end = -(-len(data.rstrip(b"\0")) // 512 + -1) * 512
    for cut in {0, 1, 7, 100, 512, 1000, *np.linspace(2, end - 1, num=25, dtype=int).tolist(), end - 1}:
        path.write_bytes(data[:cut])
        with pytest.raises(UserError, match=r"cut off|no ZIP|damaged|no images"):
            open_dataset(path)


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tgz"])
def test_a_damaged_member_costs_itself(name, tmp_path):
    path = MAKERS[name](tmp_path / name, FILES)
    archive, *_ = open_archive(path)
    data = bytearray(path.read_bytes())
    place = len(data) // 2 if name == "x.tgz" else archive["a/3.png"].offset + 100
    data[place] ^= 0x10
    path.write_bytes(data)
    bad = []
    for member in archive.values():
        try:
            decode(member)
        except ImageError as error:
            bad.append(str(error))
    assert 1 <= len(bad) <= (1 if name != "x.tgz" else 10)
    assert all("the archive is damaged" in text or "it is damaged" in text for text in bad)
    assert name == "x.tgz" or "/a/3.png: cannot decode" in bad[0]


def test_an_archive_that_goes_away_costs_its_images(tmp_path):
    path = zipped(tmp_path / "x.zip", FILES)
    archive, *_ = open_archive(path)
    path.unlink()
    with pytest.raises(ImageError, match="cannot read the archive: No such file"):
        decode(archive["a/1.png"])


def test_what_is_no_archive(tmp_path):
    os.mkfifo(tmp_path / "pipe.zip")
    (tmp_path / "text.zip").write_text("no archive at all " * 99)
    (tmp_path / "empty.tar").touch()
    (tmp_path / "image.zip").write_bytes(picture(0) * 3)
    (tmp_path / "more.tar").write_bytes(tarred(tmp_path / "x.tar", FILES).read_bytes() * 2)
    (tmp_path / "before.zip").write_bytes(b"GIF89a" + zipped(tmp_path / "x.zip", FILES).read_bytes())
    (tmp_path / "nested.zip").write_bytes(
        zipped(tmp_path / "n.zip", {"a/x.zip": (tmp_path / "x.zip").read_bytes()}).read_bytes()
    )
    for name, words in {
        "pipe.zip": "not a regular file",
        "text.zip": "neither a ZIP nor a tar",
        "empty.tar": "cut off",
        "image.zip": "neither a ZIP nor a tar",
        "more.tar": "joined",
        "before.zip": "neither a ZIP nor a tar",
        "nested.zip": "no images found",
    }.items():
        assert words in fault(tmp_path / name), name


def test_sizes_and_counts_of_64_bits(tmp_path):
    path = zipped(tmp_path / "x.zip", FILES)
    data = path.read_bytes()
    end = data.rindex(b"PK\5\6")
    count, length, start = struct.unpack_from("<H2L", data, end + 10)
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    path.write_bytes(data[:end] + record + locator + data[end : end + 8] + b"\xff" * 12 + data[end + 20 :])
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == 10
    assert len(open_dataset(path).together()) == 10
    path.write_bytes(
        data[:end]
        + record.replace(bytes([count]), b"\xff")
        + locator
        + data[end : end + 8]
        + b"\xff" * 12
        + data[end + 20 :]
    )
    assert "list of" in fault(path)
    with zipfile.ZipFile(path, "w") as archive, archive.open(zipfile.ZipInfo("a/1.png"), "w", force_zip64=True) as file:
        file.write(picture(1))
    assert "only one class" in fault(path)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["x.zip", "x.tar", "x.tgz"]))
def test_any_bytes_are_images_or_a_user_error(data, kind, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    path = MAKERS[kind](folder / kind, dict(list(FILES.items())[2:8]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        images = open_dataset(path).together()
    except UserError:
        return
    for image, *_ in images.samples:
        try:
            decode(image)
        except ImageError:
            continue


# Commands


def test_train_evaluate_resume_and_check(tmp_path):
    path = zipped(tmp_path / "photos.zip", PARTS | {"train/a/bad.png": picture(3)[:60]})
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    out = tmp_path / "run"
    lenient = ("--refused-limit", 0.5) if "--refused-limit" in cli("train", "--help").out else ()
    said = cli("train", path, "--epochs", 1, *TINY, *lenient, "--out", out, "--json")
    assert said.status == 0, said.err
    assert said.document["counts"] == {"evaluated": 10, "refused": 0}
    assert "train/a/bad.png" in said.err
    said = cli("evaluate", out, path, "--workers", 0, "--json")
    assert said.document["counts"] == {"evaluated": 10, "refused": 0}
    assert cli("train", path, "--out", out, "--resume", "--json").status == 0
    zipped(path, PARTS | {"train/a/bad.png": picture(5)[:60]})
    assert "have changed" in refusal("train", path, "--out", out, "--resume")
    zipped(path, PARTS | {"train/a/bad.png": picture(3)[:60]})
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    assert sorted(item.name for item in tmp_path.iterdir()) == ["photos.zip", "run"]
