"""What is wrong with a shard, or with what lies beside an image, is named: no member is left out in silence."""

import json
import os
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shard_sets import Files, fault, found, info, keyed, labelled, mask, pack, packed, picture
from sightline.datasets.check import check
from sightline.datasets.inventory import take_stock
from sightline.datasets.loader import OrderedLoader
from sightline.datasets.open import open_dataset
from sightline.datasets.preflight import quick
from sightline.images.decode import ImageError, decode
from sightline.images.preprocess import Preprocess

ODD = {
    "climbs": (info("../00003.png"), "has '..' in its name"),
    "absolute": (info("/etc/00003.png"), "has an absolute name"),
    "link": (info("00003.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is a link, not a file"),
    "hard link": (info("00003.png", type=tarfile.LNKTYPE, linkname="00001.png"), "is a link, not a file"),
    "device": (info("00003.png", type=tarfile.CHRTYPE), "is a device, not a file"),
    "pipe": (info("00003.png", type=tarfile.FIFOTYPE), "is a pipe, not a file"),
    "twice": (info("00001.png"), "is in it twice"),
    "two images": (info("00001.jpg", size=3), "two images have one key"),
    "case": (info("00001.PNG", size=3), "differ in case alone"),
    "label alone": (info("00009.cls", size=3), "no image has the key '00009'"),
    "later dot": (info("00009.v2.png", size=3), "no image has the key '00009'"),
    "no label": (info("00009.png", size=3), "beside it is no KEY.cls"),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_member_that_may_not_be_is_named_and_the_others_are_listed(odd: str, tmp_path: Path) -> None:
    member, reason = ODD[odd]
    samples = labelled(6)
    packed(tmp_path, samples[:3], 3)
    pack(tmp_path / "shard-000001.tar", {**samples[3], **samples[4]})
    pack(tmp_path / "shard-000000.tar", {**samples[0], **samples[1], **samples[2]}, member, info("last.cls"))
    told = fault(tmp_path)
    assert reason in told
    assert f"{tmp_path}/shard-000000.tar/{'00001.png' if odd == 'two images' else member.name}: " in told
    assert "no image has the key 'last'" in told  # what follows is listed too
    assert len(told.splitlines()) == 2
    errors = [(finding.kind, list(finding.files)) for finding in check(tmp_path, workers=0).findings
              if finding.severity == "error"]  # fmt: skip
    assert len(errors) == 2
    stock = take_stock(tmp_path)
    assert len(stock.parts["all"]) in (4, 5)


@pytest.mark.parametrize(("cut", "said"), [(-700, "is cut off"), (1300, "is cut off"), (20, "it is cut off")])
def test_a_shard_that_is_cut(cut: int, said: str, tmp_path: Path) -> None:
    packed(tmp_path, labelled(6), 3)
    shard = tmp_path / "shard-000001.tar"
    with tarfile.open(shard) as archive:
        end = [row.offset_data + row.size for row in archive.getmembers()][-2 if cut < -600 else -1]
    shard.write_bytes(shard.read_bytes()[: cut if cut > 0 else end - 10])
    told = fault(tmp_path)
    assert f"{shard}" in told
    assert said in told
    assert len(told.splitlines()) == 1
    assert "member" in [kind for kind, _ in found(tmp_path)]


def test_shards_that_are_damaged(tmp_path: Path) -> None:
    packed(tmp_path, labelled(6), 3)
    whole = (tmp_path / "shard-000001.tar").read_bytes()
    with tarfile.open(tmp_path / "shard-000001.tar") as archive:
        second = archive.getmembers()[1].offset
    for change, said in (
        (whole[:second] + b"\1" + whole[second + 1 :], "is followed by damage: a checksum is wrong"),
        (whole + whole, "something stands behind its end mark"),
        (b"", "it is cut off"),
        (b"PK\3\4" + bytes(2000), "damaged at its beginning"),
    ):
        (tmp_path / "shard-000001.tar").write_bytes(change)
        assert said in fault(tmp_path)
        assert ("member", "shard-000001.tar") in [(kind, name.partition("/")[0]) for kind, name in found(tmp_path)]
    (tmp_path / "shard-000001.tar").unlink()
    os.mkfifo(tmp_path / "shard-000001.tar")
    assert "it is not a regular file" in fault(tmp_path)


@settings(max_examples=max(settings().max_examples // 8, 10))
@given(
    st.lists(st.tuples(st.integers(0, 2**20), st.binary(min_size=1, max_size=12)), max_size=3), st.integers(0, 12_000)
)
def test_whatever_lies_in_a_shard_it_is_read_or_refused(changes: list[tuple[int, bytes]], length: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        packed(path, labelled(6), 3)
        data = bytearray((path / "shard-000000.tar").read_bytes())
        for at, put in changes:
            at %= len(data)
            data[at : at + len(put)] = put[: len(data) - at]
        (path / "shard-000000.tar").write_bytes(data[: len(data) - length // 2] if length % 2 else data)
        stock = take_stock(path)
        errors = [finding for finding in stock.findings if finding.severity == "error"]
        assert bool(errors) == (stock.splits is None)
        if errors:
            assert str(path) in fault(path)
        else:
            images = open_dataset(path).together()
            assert len(images) == 6
            for image, _, _ in images.samples:
                with suppress(ImageError):
                    decode(image)


def test_sizes_that_no_shard_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = bytearray(info("00003.png").tobuf(tarfile.GNU_FORMAT)[:512])
    block[124:136] = b"\x80" + (2**62).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    packed(tmp_path, labelled(6), 3)
    shard = pack(tmp_path / "shard-000000.tar", labelled(1)[0])
    with tarfile.open(shard) as archive:
        end = archive.getmembers()[-1].offset + 1024
    shard.write_bytes(shard.read_bytes()[:end] + bytes(block) + bytes(1024))
    assert "shard-000000.tar/00003.png: it is cut off: the archive ends before it does" in fault(tmp_path)
    monkeypatch.setenv("SIGHTLINE_ARCHIVE_FILES", "4")
    packed(tmp_path, labelled(6), 3)
    assert fault(tmp_path).count("more than 4 files") == 2


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (b"", "its label is empty"),
        (b"\xff", "its label is not UTF-8"),
        (b"-1", "numbers begin at 0"),
        (b"1\n2", "more than one line"),
        (b"x" * 5000, "over the limit"),
        (b"other", "does not stand in classes.txt"),
        (b"9" * 4000, "names 2 from 0 on"),
    ],
)
def test_labels_that_cannot_be_meant(label: bytes, reason: str, tmp_path: Path) -> None:
    samples = labelled()
    samples[7]["00007.cls"] = label
    packed(tmp_path, samples)
    (tmp_path / "classes.txt").write_text("0\n1\n")
    assert fault(tmp_path).startswith(f"{tmp_path}/shard-000001.tar/00007.png: ")
    assert reason in fault(tmp_path)
    assert {kind for kind, name in found(tmp_path) if name == "shard-000001.tar/00007.png"} <= {
        "label",
        "unknown-class",
    }
    assert len([kind for kind, name in found(tmp_path) if name == "shard-000001.tar/00007.png"]) == 1


@pytest.mark.parametrize(
    ("said", "kind", "reason"),
    [
        (b"{", "annotation", "is not valid JSON"),
        (b"[" * 100_000, "annotation", "is not valid JSON"),
        (b"\xff\xfe", "annotation", "is not valid JSON"),
        (b'{"annotations": 3}', "annotation", "not a list of objects"),
        (b'{"annotations": [3]}', "annotation", "not a list of objects"),
        (b'{"annotations": [], "images": [{}, {}]}', "annotation", "about 2 images"),
        (b'{"annotations": [], "categories": [{"id": 1}]}', "annotation", "with an 'id' and a 'name'"),
        (b'[{"bbox": [1, 2, 3], "category_id": 0}]', "annotation", "is not four numbers"),
        (b'[{"bbox": [1, 2, 3, 4]}]', "unknown-class", "of category None"),
        (b'{"annotations": [{"bbox": [1, 2, 3, 4], "category_id": 5}], "categories": [{"id": 1, "name": "a"}]}',
         "unknown-class", "of category 5"),
        (b"{}", "missing-label", "beside it is no KEY.json with 'annotations'"),
    ],
)  # fmt: skip
def test_annotations_that_cannot_be_meant(said: bytes, kind: str, reason: str, tmp_path: Path) -> None:
    good = json.dumps({"annotations": [{"bbox": [1, 2, 3, 4], "category_id": 0}]}).encode()
    packed(tmp_path, [{f"{i}.png": picture(i), f"{i}.json": said if i == 4 else good} for i in range(6)], 3)
    assert reason in fault(tmp_path, "detect")
    assert "shard-000001.tar/4.png" in fault(tmp_path, "detect")
    assert (kind, "shard-000001.tar/4.png") in found(tmp_path)


def test_boxes_outside_and_without_area_are_told(tmp_path: Path) -> None:
    boxes = {1: [10, 5, 9, 2], 2: [1, 2, 0, 4], 3: [1, 2, 3, 4]}
    packed(tmp_path, [
        {f"{i}.png": picture(i), f"{i}.json": json.dumps([{"bbox": box, "category_id": 0}]).encode()}
        for i, box in boxes.items()
    ])  # fmt: skip
    told = found(tmp_path)
    assert ("box-outside", "shard-000000.tar/1.png") in told  # measured in the image: nothing says its size
    assert ("zero-area", "shard-000000.tar/2.png") in told
    splits = open_dataset(tmp_path, task="detect")
    assert any("0×4 pixels" in note for note in splits.notes)
    assert len(keyed(splits.together())["2"][1]) == 0


@pytest.mark.parametrize(
    ("said", "kind", "reason"),
    [
        ({"4.txt": b" \n"}, "caption", "the caption is empty"),
        ({"4.txt": b"\xe9"}, "caption", "the caption is not UTF-8"),
        ({"4.txt": b"x" * 10_001}, "caption", "longer than any"),
        ({"4.txt": b"x" * 50_000}, "caption", "over the limit"),
        ({"4.json": b"{"}, "caption", "is not valid JSON"),
        ({"4.json": b'{"caption": 3}'}, "caption", "neither a text nor a list"),
        ({"4.json": b'{"captions": []}'}, "caption", "neither a text nor a list"),
        ({"4.json": b'{"caption": "\\ud800"}'}, "caption", "not UTF-8"),
        ({"4.json": b'{"url": "x"}'}, "missing-label", "beside it is no KEY.txt"),
        ({}, "missing-label", "beside it is no KEY.txt"),
    ],
)
def test_captions_that_cannot_be_meant(said: Files, kind: str, reason: str, tmp_path: Path) -> None:
    packed(tmp_path, [{f"{i}.png": picture(i), **(said if i == 4 else {f"{i}.txt": b"a"})} for i in range(6)], 3)
    assert reason in fault(tmp_path, "clip")
    assert "shard-000001.tar/4.png" in fault(tmp_path, "clip")
    assert (kind, "shard-000001.tar/4.png") in found(tmp_path)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (mask(1, 9, 12), "mask-size"),
        (mask(7), "unknown-class"),
        (picture(1), "mask"),
        (b"x", "mask"),
        (None, "missing-mask"),
    ],
)
def test_masks_that_cannot_be_meant(said: bytes | None, kind: str, tmp_path: Path) -> None:
    samples = [{f"{i}.png": picture(i), f"{i}.seg.png": mask(i % 2)} for i in range(6)]
    samples[4] = {"4.png": picture(4)} | ({} if said is None else {"4.seg.png": said})
    packed(tmp_path, samples, 3)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    assert (kind, "shard-000001.tar/4.png") in found(tmp_path)
    if said is None:
        assert "shard-000001.tar/4.png: beside it is no KEY.mask.png" in fault(tmp_path, "segment")
    else:
        images = open_dataset(tmp_path, task="segment").together()
        with pytest.raises(ImageError, match=r"shard-000001\.tar/4\.seg\.png"):
            keyed(images)["4"][1].mask(9, 13)


def test_images_that_cannot_be_read_cost_themselves(tmp_path: Path) -> None:
    samples = labelled(12)
    samples[1]["00001.png"], samples[2]["00002.png"] = b"", picture(2)[:-100]
    packed(tmp_path, samples)
    told = {name: kind for kind, name in found(tmp_path)}
    assert told["shard-000000.tar/00001.png"] == "empty-file"
    assert told["shard-000000.tar/00002.png"] in ("truncated", "unreadable")
    images = open_dataset(tmp_path).together()
    assert "empty-file" in [finding.kind for finding in quick(open_dataset(tmp_path))]
    refused = [
        name for loaded in OrderedLoader(images, Preprocess(size=(8, 8)), batch_size=4) for name, _ in loaded.refused
    ]
    assert sorted(refused) == ["shard-000000.tar/00001.png", "shard-000000.tar/00002.png"]


def test_parts_whose_classes_differ(tmp_path: Path) -> None:
    pack(tmp_path / "train-0.tar", {name: data for files in labelled(6) for name, data in files.items()})
    pack(tmp_path / "val-0.tar", {"x.png": picture(70), "x.cls": b"1"})
    splits = open_dataset(tmp_path)
    assert splits.val.counts() == {"0": 0, "1": 1}
    assert "classes of 'val' without images: '0'" in splits.notes
    pack(tmp_path / "val-0.tar", {"x.png": picture(70), "x.cls": b"2"})
    assert "classes in 'val' but none to learn: '2'" in fault(tmp_path)
    assert "classes-differ" in [kind for kind, _ in found(tmp_path)]
    pack(tmp_path / "val-0.tar", {"x.png": picture(3), "x.cls": b"1"})
    assert "leak" in [kind for kind, _ in found(tmp_path)]
    assert "leak" in [finding.kind for finding in quick(open_dataset(tmp_path))]


def test_links_out_of_the_folder_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed(tmp_path / "data", labelled(6), 3)
    packed(tmp_path / "else", labelled(9), 3)
    (tmp_path / "data" / "shard-000002.tar").symlink_to(tmp_path / "else" / "shard-000002.tar")
    splits = open_dataset(tmp_path / "data")
    assert len(splits.together()) == 6
    assert any("'shard-000002.tar'; if they are meant" in note for note in splits.notes)
    assert ("outside-link", "shard-000002.tar") in found(tmp_path / "data")
    monkeypatch.setenv("SIGHTLINE_FOLLOW_LINKS", "1")
    assert len(open_dataset(tmp_path / "data").together()) == 9
