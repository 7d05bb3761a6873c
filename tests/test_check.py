"""What a check of a dataset finds, and what it leaves alone."""

import importlib.util
import os
import signal
import sys
import tarfile
import time
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from sightline.datasets import examine
from sightline.datasets.check import Checked, check
from sightline.datasets.digits import digits
from sightline.datasets.duplicates import candidates, nearly, same
from sightline.datasets.examine import each, fine, look, unexplained
from sightline.datasets.image_set import Names, Samples
from sightline.datasets.open import open_dataset
from sightline.datasets.preflight import quick
from sightline.errors import UserError
from sightline.evaluation.suspects import suspects
from sightline.images.decode import header


def _proof():
    path = Path(__file__).parents[1] / "proofs" / "check.py"
    spec = importlib.util.spec_from_file_location("proof_of_check", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


proof = _proof()


def scene(seed: int, width: int = 96, height: int = 72) -> Image.Image:
    """A picture with something in it."""
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **settings) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def sound(root: Path, *, train: int = 12, val: int = 3, classes: tuple[str, ...] = ("a", "b")) -> Path:
    """A dataset without a fault."""
    seed = 0
    for part, count in (("train", train), ("val", val)):
        for label in classes:
            for i in range(count):
                write(root / part / label / f"{i:03}.png", encoded(scene(seed, 48, 36)))
                seed += 1
    return root


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def kinds(checked: Checked) -> dict[str, list[set[str]]]:
    found: dict[str, list[set[str]]] = {}
    for finding in checked.findings:
        found.setdefault(finding.kind, []).append(set(finding.files))
    return found


def looked(root: Path | str, **options) -> dict[str, list[set[str]]]:
    return kinds(check(root, workers=0, **options))


# All of it


def test_every_planted_fault_is_found_and_none_invented(tmp_path):
    made = proof.Set(tmp_path / "set", 40, 3)
    for plant in (proof.plant_files, proof.plant_looks, proof.plant_copies, proof.plant_names):
        plant(made, 2)
    checked = check(made.root, workers=1)
    rows = proof.compared(made.planted, [finding.to_json() for finding in checked.findings])
    assert {kind: row for kind, row in rows.items() if row[0] != row[1] or row[2]} == {}
    assert len(rows) >= 30
    assert checked.severity == "error"


def test_a_sound_set_has_no_findings(tmp_path):
    checked = check(sound(tmp_path), workers=0)
    assert checked.findings == []
    assert checked.severity is None
    document = checked.to_json()
    assert document["fit"]
    assert document["parts"] == {"train": {"a": 12, "b": 12}, "val": {"a": 3, "b": 3}}
    assert document["statistics"]["width"] == {"min": 48, "median": 48, "max": 48}
    assert document["statistics"]["formats"] == {"PNG": 30}


def test_the_share_of_unreadable_training_images_decides(tmp_path):
    sound(tmp_path, train=50, val=2)
    write(tmp_path / "train/a/x.png", b"")
    write(tmp_path / "val/a/x.png", b"")  # no training image
    found = looked(tmp_path, quick=True)  # 1 of 101
    assert found["empty-file"] == [{"train/a/x.png"}, {"val/a/x.png"}]
    assert "refused-share" not in found
    (tmp_path / "train/b/049.png").unlink()  # 1 of 100
    assert "refused-share" not in looked(tmp_path, quick=True)
    (tmp_path / "train/b/048.png").unlink()
    assert looked(tmp_path, quick=True)["refused-share"] == [{"train/a/x.png"}]


def test_quick_looks_at_headers_alone(tmp_path):
    sound(tmp_path)
    data = encoded(scene(99), "JPEG")
    write(tmp_path / "train/a/cut.jpg", data[: len(data) // 2])
    write(tmp_path / "train/a/wrong.jpg", encoded(scene(98)))
    write(tmp_path / "train/a/none.jpg", b"no image")
    found = looked(tmp_path, quick=True)
    assert found["mislabelled"] == [{"train/a/wrong.jpg"}]
    assert found["no-image"] == [{"train/a/none.jpg"}]
    assert "truncated" not in found
    assert looked(tmp_path)["truncated"] == [{"train/a/cut.jpg"}]


# Structure


def test_a_table_names_each_bad_row(tmp_path):
    for i in range(4):
        write(tmp_path / f"{i}.png", encoded(scene(i)))
    lines = ["path,label", "0.png,a", "1.png,a", "2.png,b", "3.png,b", "../x.png,a", "gone.png,a", "0.png,b"]
    file = tmp_path / "list.csv"
    file.write_text("\n".join([*lines, ",a", "1.png,", "2.png,b", "one cell", "3.png,=SUM(A1)"]))
    checked = check(file, workers=0)
    rows = [finding.reason for finding in checked.findings if finding.kind == "row"]
    assert [reason.split("line ")[1].split(":")[0] for reason in rows] == ["6", "7", "8", "9", "10", "12", "13"]
    assert [finding.kind for finding in checked.findings if finding.severity == "error"] == ["row"] * 7
    assert {"formula", "repeated-row"} <= set(kinds(checked))
    assert checked.to_json()["counts"]["images"] == 4


@pytest.mark.parametrize("name", ["set.zip", "set.tar", "set.tgz"])
def test_an_archive_is_checked_as_a_folder_is(name, tmp_path):
    folder = sound(tmp_path / "set")
    write(folder / "val/c/0.png", encoded(scene(50)))
    write(folder / "val/a/leak.png", (folder / "train/a/000.png").read_bytes())
    file = tmp_path / name
    if name.endswith("zip"):
        with zipfile.ZipFile(file, "w") as archive:
            for path in sorted(folder.rglob("*.png")):
                archive.write(path, path.relative_to(folder))
    else:
        with tarfile.open(file, "w:gz" if name.endswith("tgz") else "w") as archive:
            archive.add(folder, ".")
    found = kinds(check(file, workers=1))
    assert set(found) == {"classes-differ", "leak"}
    assert {Path(path).name for path in found["leak"][0]} == {"000.png", "leak.png"}


def test_what_is_no_dataset_is_no_finding(tmp_path):
    for source in (tmp_path / "nowhere", "builtin:nothing", write(tmp_path / "a.jpg", b"x")):
        with pytest.raises(UserError):
            check(source, workers=0)


def test_images_without_classes_are_looked_at_all_the_same(tmp_path):
    write(tmp_path / "good.png", encoded(scene(1)))
    write(tmp_path / "bad.png", b"no image")
    found = looked(tmp_path)
    assert found["no-image"] == [{"bad.png"}]
    assert "unusable" in found


def test_links_out_of_the_folder_are_named(tmp_path):
    outside = write(tmp_path / "elsewhere/x.png", encoded(scene(70)))
    root = sound(tmp_path / "set")
    (root / "train/a/out.png").symlink_to(outside)
    assert looked(root) == {"outside-link": [{"train/a/out.png"}]}


def test_a_drawn_split_says_which_copies_it_divides(tmp_path):
    for i in range(40):
        data = encoded(scene(i // 2, 40, 30))  # each twice
        write(tmp_path / "ab"[i // 20] / f"{i}.png", data)
    reasons = [f.reason for f in check(tmp_path, workers=0).findings if f.kind == "duplicate"]
    assert len(reasons) == 20
    split = open_dataset(tmp_path)
    held = {Path(name).stem for name in split.val.samples.names}
    divided = sum(len({str(i), str(i + 1)} & held) == 1 for i in range(0, 40, 2))
    assert sum("divided between training and validation" in reason for reason in reasons) == divided > 0


# Duplicates


WAYS = {
    "JPEG": lambda image: encoded(image, "JPEG", quality=60),
    "WebP": lambda image: encoded(image, "WEBP", quality=70),
    "smaller": lambda image: encoded(image.resize((72, 54), Image.Resampling.BICUBIC)),
    "larger": lambda image: encoded(image.resize((192, 144), Image.Resampling.LANCZOS), "JPEG"),
    "brighter": lambda image: encoded(ImageEnhance.Brightness(image).enhance(1.1)),
    "darker": lambda image: encoded(ImageEnhance.Brightness(image).enhance(0.88)),
    "flatter": lambda image: encoded(ImageEnhance.Contrast(image).enhance(0.9), "JPEG"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_picture_saved_again_is_nearly_the_same(way, tmp_path):
    root = sound(tmp_path)
    image = scene(500)
    write(root / "train/a/one.png", encoded(image))
    write(root / "val/a/two.png", WAYS[way](image))
    assert looked(root).get("near-leak") == [{"train/a/one.png", "val/a/two.png"}]


def drawn(box: tuple[int, int, int, int], paint: tuple[int, int, int], ground: int = 255) -> Image.Image:
    image = Image.new("RGB", (96, 72), (ground, ground, ground))
    image.paste(paint, box)
    return image


UNLIKE = {
    "another place": (drawn((10, 10, 40, 40), (200, 30, 30)), drawn((16, 10, 46, 40), (200, 30, 30))),
    "another colour": (drawn((10, 10, 40, 40), (200, 30, 30)), drawn((10, 10, 40, 40), (30, 110, 30))),
    "one more thing": (scene(7), (lambda image: (image.paste((250, 250, 250), (40, 30, 52, 40)), image)[1])(scene(7))),
    "mirrored": (scene(7), scene(7).transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "another noise": tuple(
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)) for i in range(2)
    ),
    "flat greys": (Image.new("RGB", (64, 64), (90, 90, 90)), Image.new("RGB", (64, 64), (96, 96, 96))),
    "skies": tuple(
        Image.fromarray(np.linspace(low, high, 64)[:, None, None].repeat(64, 1).repeat(3, 2).astype(np.uint8))
        for low, high in ((100, 140), (104, 147))
    ),
}


@pytest.mark.parametrize("pair", UNLIKE)
def test_alike_is_not_the_same(pair, tmp_path):
    for i, image in enumerate(UNLIKE[pair]):
        write(tmp_path / "train" / "ab"[i] / f"{i}.png", encoded(image))
    assert not {"near-duplicate", "near-contradiction", "duplicate", "contradiction"} & set(looked(tmp_path))


def test_no_digit_is_another_one(monkeypatch):
    few = digits().select(np.arange(500))
    monkeypatch.setattr("sightline.datasets.digits.digits", lambda: few)
    checked = check("builtin:digits")
    assert checked.findings == []
    assert len(checked.readable) == 500


def test_equal_pixels_are_found_whatever_holds_them(tmp_path):
    root = sound(tmp_path)
    image = scene(300)
    for name, data in (
        ("train/a/x.png", encoded(image, compress_level=1)),
        ("train/b/x.bmp", encoded(image, "BMP")),
        ("val/a/x.png", encoded(image, compress_level=9)),
    ):
        write(root / name, data)
    group = {"train/a/x.png", "train/b/x.bmp", "val/a/x.png"}
    assert looked(root) == {"leak": [group], "contradiction": [group]}


@given(st.lists(st.integers(0, 3), max_size=40), st.data())
@settings(max_examples=50)
def test_groups_of_equal_digests(numbers, data):
    known = np.array([data.draw(st.booleans()) for _ in numbers], dtype=bool)
    digests = np.zeros((len(numbers), 16), dtype=np.uint8)
    digests[:, 7] = numbers
    expected = [[i for i, n in enumerate(numbers) if n == value and known[i]] for value in range(4)]
    assert same(digests, known) == sorted(group for group in expected if len(group) > 1)


def test_candidates_are_those_of_all_pairs(monkeypatch):
    monkeypatch.setattr("sightline.datasets.duplicates.BLOCK", 8)
    random = np.random.default_rng(0)
    base = random.normal(0, 40, (30, 16, 16))
    lumas = np.concatenate([base, base[:9] + random.normal(0, 4, (9, 16, 16))]).astype(np.float16)
    aspects = np.ones(39, dtype=np.float32)
    aspects[38] = 1.5
    pairs, scores, every = candidates(lumas, aspects)
    assert every
    assert sorted(map(tuple, pairs.tolist())) == [(i, i + 30) for i in range(8)]
    flat = lumas.reshape(39, -1).astype(np.float64)
    for (i, j), score in zip(pairs.tolist(), scores, strict=True):
        assert score == pytest.approx(np.corrcoef(flat[i], flat[j])[0, 1], abs=1e-3)


def test_of_too_many_candidates_the_best_are_kept(monkeypatch):
    monkeypatch.setattr("sightline.datasets.duplicates.BLOCK", 8)
    monkeypatch.setattr("sightline.datasets.duplicates.MOST", 40)
    random = np.random.default_rng(0)
    one = random.normal(0, 40, (16, 16))
    lumas = np.stack([one + random.normal(0, 1 + i / 10, (16, 16)) for i in range(40)]).astype(np.float16)
    pairs, _, every = candidates(lumas, np.ones(40, dtype=np.float32))
    assert not every
    assert 20 <= len(pairs) <= 40
    assert pairs[:5].max() < 8  # those of little noise


@given(st.lists(st.floats(-3, 3), min_size=6, max_size=6))
def test_smooth_surfaces_explain_themselves(factors):
    y, x = np.mgrid[-1:1:16j, -1:1:16j]
    a, b, c, d, e, f = factors
    surface = 40 * (a + b * x + c * y + d * x * x + e * x * y + f * y * y)
    bump = np.zeros((16, 16))
    bump[3, 4] = 30
    assert np.abs(unexplained(surface.astype(np.float32))).max() < 1e-2
    assert np.allclose(
        unexplained((surface + bump).astype(np.float32)), unexplained(bump.astype(np.float32)), atol=1e-2
    )


def test_likeness_does_not_depend_on_order():
    pictures = [fine(encoded(scene(i))) for i in range(4)] + [fine(WAYS["smaller"](scene(0)))]
    for one in pictures:
        assert [nearly(one, other) for other in pictures] == [nearly(other, one) for other in pictures]
    assert nearly(pictures[0], pictures[4])
    assert not nearly(pictures[0], pictures[1])


# Processes


def _deadly(source) -> str:
    name = Path(source).name
    if name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "hang":
        time.sleep(60)
    return name


@pytest.mark.parametrize("bad", ["kill", "hang"])
def test_a_process_that_dies_or_hangs_costs_one_image(bad, monkeypatch):
    monkeypatch.setattr(examine, "PATIENCE", 0.5)
    monkeypatch.setattr(examine, "CHUNK", 4)
    names = [str(i) for i in range(23)]
    names[5] = bad
    samples = Samples(Names(names), np.zeros(23, dtype=np.int64), Path("/"))
    answers = list(each(_deadly, samples, range(23), workers=2))
    assert sorted(row for row, _ in answers) == list(range(23))
    assert {row: answer for row, answer in answers if answer != names[row]} == {5: None}


def test_a_crash_is_a_finding(tmp_path, monkeypatch):
    root = sound(tmp_path)

    def decode(data: bytes, **options):
        if data == marked:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(data, **options)

    real, marked = examine.decode, (root / "train/b/003.png").read_bytes()
    monkeypatch.setattr(examine, "decode", decode)
    found = kinds(check(root, workers=2))
    assert found == {"crash": [{"train/b/003.png"}], "refused-share": [{"train/b/003.png"}]}


def test_errors_in_the_work_are_not_swallowed():
    samples = Samples(Names(["x"]), np.zeros(1, dtype=np.int64), Path("/"))
    with pytest.raises(ZeroDivisionError):
        list(each(_broken, samples, [0], workers=1))


def _broken(source) -> float:
    return 1 / 0


# Headers


def test_a_header_says_what_an_image_is():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert header(encoded(scene(1), "JPEG", exif=exif)) == ("JPEG", "RGB", 96, 72, 6, False)
    assert header(encoded(scene(1).convert("P"), "GIF"))[:4] == ("GIF", "P", 72, 96)
    two = {"save_all": True, "append_images": [scene(2)]}
    for kind in ("GIF", "TIFF", "WEBP", "PNG"):
        assert header(encoded(scene(1), kind, **two)).several
        assert not header(encoded(scene(1), kind)).several


def test_a_look_measures_a_picture():
    half = np.zeros((64, 64, 3), dtype=np.uint8)
    half[:, 32:] = 255
    blank = look(np.full((9, 7, 3), 80, dtype=np.uint8))
    assert blank.blank
    assert blank.spread == pytest.approx(0, abs=1e-3)
    seen = look(half)
    assert not seen.blank
    assert seen.spread > 30
    assert seen.digest != blank.digest
    assert look(np.full((7, 9, 3), 80, dtype=np.uint8)).digest != blank.digest  # the same bytes in another shape


# Before every training


def test_the_quick_part_finds_leaks(tmp_path):
    root = sound(tmp_path)
    first = (root / "train/a/000.png").read_bytes()
    write(root / "val/a/again.png", first)
    write(root / "val/b/other.png", (root / "train/a/001.png").read_bytes())
    write(root / "train/a/none.png", b"")
    write(root / "val/a/bad.png", b"no image")
    found = {finding.kind: finding for finding in quick(open_dataset(root))}
    assert set(found) == {"leak", "contradiction", "empty-file", "no-image"}
    assert set(found["leak"].files) == {"train/a/000.png", "train/a/001.png", "val/a/again.png", "val/b/other.png"}
    assert set(found["contradiction"].files) == {"train/a/001.png", "val/b/other.png"}
    assert found["empty-file"].files == ["train/a/none.png"]
    assert "the accuracy measured will be too good" in found["leak"].line()


def test_equal_sizes_are_no_leak(tmp_path):
    for name in ("train/a/1.ppm", "train/b/2.ppm", "val/a/3.ppm", "val/b/4.ppm"):
        seed = int(Path(name).stem)
        write(tmp_path / name, encoded(scene(seed), "PPM"))  # all of one size
    assert {finding.kind for finding in quick(open_dataset(tmp_path))} == {"tiny-class"}


def test_the_quick_part_says_what_it_left_out(tmp_path, monkeypatch):
    root = sound(tmp_path)
    monkeypatch.setattr("sightline.datasets.preflight.HEADERS", 5)
    told = [finding.line() for finding in quick(open_dataset(root))]
    assert [line for line in told if "the headers of 5 of 24 images were read" in line]


def test_the_quick_part_is_silent_about_the_digits():
    assert quick(open_dataset("builtin:digits")) == []


def test_unequal_classes(tmp_path):
    for label, count in (("many", 55), ("few", 5)):
        for i in range(count):
            write(tmp_path / label / f"{i}.png", encoded(scene(1000 * len(label) + i, 16, 12)))
    found = {finding.kind: finding for finding in quick(open_dataset(tmp_path))}
    assert set(found) == {"tiny-class", "imbalance"}
    assert found["tiny-class"].classes == ["few"]
    assert "'many' has 44 training images, 'few' has 4" in found["imbalance"].reason


# Labels


def test_labels_that_the_neighbours_contradict_are_named():
    images = digits().select(np.arange(800))
    pixels = np.stack([array[..., 0] for array in images.samples.arrays]).reshape(800, -1).astype(np.float32)
    labels = images.targets.copy()
    wrong = (10, 100, 350, 555, 790)
    for row in wrong:
        labels[row] = (labels[row] + 5) % 10
    found = suspects(torch.from_numpy(pixels), labels)
    assert set(wrong) <= {suspect.row for suspect in found[:8]}
    assert all(suspect.believed == images.targets[suspect.row] for suspect in found if suspect.row in wrong)
    assert len(found) <= 12
    known = labels.copy()
    known[10] = images.targets[10]  # a model that learned the other four by heart
    assert suspects(torch.from_numpy(pixels), labels, answers=known)[0].row == 10


def test_too_few_neighbours_contradict_nothing():
    assert suspects(torch.eye(3), np.arange(3)) == []
