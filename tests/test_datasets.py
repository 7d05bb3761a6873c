import csv
import hashlib
import os
import pickle
import random
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sightline.datasets import digits
from sightline.datasets.folder import read_classes, write_images
from sightline.datasets.image_set import ImageSet, Names, Samples, unlabelled
from sightline.datasets.naming import class_names, natural
from sightline.datasets.open import open_dataset
from sightline.datasets.scan import list_images
from sightline.datasets.split import hold_out
from sightline.errors import UserError

calm = settings(deadline=None)  # other processes may be at work


def touch(root: Path, *names: str) -> Path:
    """Files that are images by their names; what is inside is not looked at."""
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode("utf-8", "surrogateescape"))
    return root


def table(root: Path, *lines: str) -> Path:
    file = root / "list.csv"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogateescape")
    return file


def names(images: ImageSet) -> list[str]:
    return list(images.samples.names)


def fault(source: str | Path, **options: float) -> str:
    with pytest.raises(UserError) as caught:
        open_dataset(source, **options)
    return str(caught.value)


def tree(root: Path) -> dict[str, tuple[float, str]]:
    files = (file for file in sorted(root.rglob("*")) if file.is_file())
    return {str(file): (file.stat().st_mtime_ns, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files}


# Names


@calm
@given(st.lists(st.integers(0, 10**30), min_size=2, unique=True))
def test_numbers_in_names_order_as_numbers(numbers):
    assert sorted((f"class {n} b" for n in numbers), key=natural) == [f"class {n} b" for n in sorted(numbers)]


@calm
@given(st.lists(st.text(), unique=True), st.randoms())
def test_the_order_of_names_depends_on_nothing_else(words, chance: random.Random):
    shuffled = list(words)
    chance.shuffle(shuffled)
    assert sorted(words, key=natural) == sorted(shuffled, key=natural)


def test_natural_order_by_hand():
    assert sorted(["b10", "B2", "a", "Ä", "10", "9x", "9", "01", "1"], key=natural) == [
        *("01", "1", "9", "9x", "10"),
        *("a", "B2", "b10", "Ä"),
    ]
    assert sorted(["9" * 5000, "8" * 5000], key=natural)[0][0] == "8"  # longer than Python's limit on digits


@calm
@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=9)))
def test_names_come_back(words):
    packed = Names(words)
    assert list(packed) == words
    assert list(pickle.loads(pickle.dumps(packed))) == words
    assert [packed[-i - 1] for i in range(len(words))] == words[::-1]


@pytest.mark.parametrize("pair", [("Cat", "cat"), ("Straße", "STRASSE"), ("é", unicodedata.normalize("NFD", "é"))])
def test_classes_that_a_file_system_could_confuse_are_named(pair, tmp_path):
    with pytest.raises(UserError, match="differ only in") as caught:
        class_names(pair, "here")
    assert all(ascii(name)[1:-1] in str(caught.value).replace("\\\\", "\\") for name in pair)
    file = table(touch(tmp_path, "1.png", "2.png"), "path,label", f"1.png,{pair[0]}", f"2.png,{pair[1]}")
    assert "differ only in" in fault(file)


# Layouts


def test_folder_with_parts(tmp_path):
    touch(
        tmp_path, *(f"{part}/{label}/{i}.jpg" for part in ("train", "valid") for label in ("10", "2") for i in range(3))
    )
    touch(tmp_path, "test/2/1.jpg", "train/2/deeper/still/x.PNG", "readme.txt")
    splits = open_dataset(tmp_path)
    assert splits.train.classes == splits.val.classes == ("2", "10")
    assert splits.train.counts() == {"2": 4, "10": 3}
    assert names(splits.train)[:4] == [*(f"train/2/{i}.jpg" for i in range(3)), "train/2/deeper/still/x.PNG"]
    assert names(splits.val) == [f"valid/{label}/{i}.jpg" for label in ("2", "10") for i in range(3)]
    assert splits.train.samples[0].image == tmp_path / "train/2/0.jpg"
    assert any("folders left out: 'test'" in note for note in splits.notes)


@pytest.mark.parametrize("part", ["val", "valid", "validation", "test", "Val"])
def test_every_name_of_the_validation_part(part, tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", f"{part}/a/1.jpg", f"{part}/b/1.jpg")
    assert names(open_dataset(tmp_path).val) == [f"{part}/a/1.jpg", f"{part}/b/1.jpg"]


def test_training_part_alone_is_split(tmp_path):
    touch(tmp_path, *(f"train/{label}/{i}.jpg" for label in "ab" for i in range(10)))
    splits = open_dataset(tmp_path)
    assert (splits.train.counts(), splits.val.counts()) == ({"a": 8, "b": 8}, {"a": 2, "b": 2})
    assert any("no folder 'val'" in note for note in splits.notes)


def test_a_class_of_railway_trains_is_a_class(tmp_path):
    touch(tmp_path, *(f"{label}/{i}.jpg" for label in ("car", "train") for i in range(5)))
    assert open_dataset(tmp_path).train.classes == ("car", "train")


def test_plain_class_folders(tmp_path):
    touch(tmp_path, *(f"{label}/{i}.webp" for label, count in (("ä 猫", 7), ("b", 1), ("c", 2)) for i in range(count)))
    splits = open_dataset(tmp_path, seed=3)
    assert splits.train.counts() == {"b": 1, "c": 1, "ä 猫": 6}
    assert splits.val.counts() == {"b": 0, "c": 1, "ä 猫": 1}
    assert any("20%" in note for note in splits.notes)
    assert any("'b'" in note for note in splits.notes)
    assert names(open_dataset(tmp_path, seed=3).val) == names(splits.val)
    assert any(names(open_dataset(tmp_path, seed=seed).val) != names(splits.val) for seed in range(5))


def test_order_is_independent_of_creation(tmp_path):
    files = [f"{label}/{i}.png" for label in ("10", "9", "b", "A") for i in range(4)]
    first, second = touch(tmp_path / "x", *files), touch(tmp_path / "y", *files[::-1])
    one, two = open_dataset(first), open_dataset(second)
    assert one.train.classes == two.train.classes == ("9", "10", "A", "b")
    assert (names(one.train), names(one.val)) == (names(two.train), names(two.val))
    assert one.train.fingerprint() == two.train.fingerprint()


def test_csv_with_held_out_share(tmp_path):
    touch(tmp_path, *(f"x/{i}.jpg" for i in range(20)))
    lines = [
        f'"x/{i}.jpg", {("cat", "Ünï, dog")[i % 2]} ' if i % 2 == 0 else f'x/{i}.jpg,"Ünï, dog"' for i in range(20)
    ]
    file = table(tmp_path, "\ufeffpath,label", *[line.replace(", cat", ",cat") for line in lines], "./x/0.jpg,cat")
    splits = open_dataset(file)
    assert splits.train.counts() == {"cat": 8, "Ünï, dog": 8}
    assert sorted(names(splits.train) + names(splits.val)) == sorted(f"x/{i}.jpg" for i in range(20))
    assert splits.train.samples[0].image.is_file()
    assert any("repeat another one, left out: 1" in note for note in splits.notes)


def test_csv_with_parts_and_other_columns(tmp_path):
    touch(tmp_path, *(f"{i}.jpg" for i in range(5)))
    rows = [("", "Label", "split", "path"), (0, "b", "Train", "0.jpg"), (1, "a", "train", "1.jpg")]
    rows += [(2, "a", "validation", "2.jpg"), (3, "b", "validation", tmp_path / "3.jpg"), (4, "z", "test", "4.jpg")]
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    splits = open_dataset(tmp_path / "list.csv")
    assert [(s.name, s.target) for s in splits.train.samples] == [("0.jpg", 1), ("1.jpg", 0)]
    assert [(s.name, s.target) for s in splits.val.samples] == [("2.jpg", 0), ("3.jpg", 1)]
    assert splits.notes == ["parts left out: 'test'"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "columns path,label and reads nothing"),
        (["file,label", "a.png,x"], "'file,label'"),
        (["path,label", "a.png"], "line 2: fewer cells"),
        (["path,label", "a.png,x,y"], "line 2: more cells"),
        (["path,label", "a.png,x", "b.png, "], "line 3: the label is missing"),
        (["path,label", ",x"], "line 2: the path is missing"),
        (["path,label", "../a.png,x"], "outside"),
        (["path,label", "/etc/passwd,x"], "outside"),
        (["path,label", "a.png,x", "c.png,y"], "line 3: there is no such file: 'c.png'"),
        (["path,label", "a\0.png,x"], "no such file"),
        (["path,label", "a.png,x", "b.png,x"], "only one class"),
        (["path,label", "a.png,x", "./a.png,y"], "line 3: 'a.png' stands differently in line 2"),
        (["path,label,split", "a.png,x,train", "b.png,y,later"], "line 3: the split is 'later'"),
        (["path,label,split", "a.png,x,train", "b.png,y,train"], "has no 'val'"),
        (["path,label,split", "a.png,x,val", "b.png,y,val"], "has no 'train'"),
        (["path,label,split", "a.png,x,train", "b.png,y,train", "d.png,x,val", "e.png,z,val"], "'y'; .*'z'"),
        (["path,label", "a.png,x", 'b.png,"y'], "not a CSV table"),
        (["path,label", "a.png,x", f"b.png,{'y' * 200_000}"], "not a CSV table"),
        (["path,label", "a.png,x", "b.png,\udce4"], "not valid UTF-8"),
    ],
)
def test_csv_faults_are_named(lines, words, tmp_path):
    touch(tmp_path, "a.png", "b.png", "d.png", "e.png")
    with pytest.raises(UserError, match=words) as caught:
        open_dataset(
            table(tmp_path, *lines) if lines else touch(tmp_path, "list.csv") and _emptied(tmp_path / "list.csv")
        )
    assert "list.csv" in str(caught.value)


def _emptied(file: Path) -> Path:
    file.write_bytes(b"")
    return file


# What lies about in folders


def test_clutter_is_ignored_and_told(tmp_path):
    touch(tmp_path, *(f"{label}/{i}.jpg" for label in "ab" for i in range(5)), "loose.png", "a/notes.txt")
    touch(tmp_path, "a/._1.jpg", "a/.DS_Store", "b/Thumbs.db", "__MACOSX/x/1.jpg", ".git/x.png")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    images, notes = read_classes(tmp_path)
    assert images.counts() == {"a": 5, "b": 5}
    assert notes == [
        "classes without images: 'empty'",
        "images left out, being in no class folder: 'loose.png'",
        "left out, being no image files: 'notes.txt'",
        "left out, being pipes, devices or links that lead nowhere: 'pipe.jpg'",
        "hidden files and folders left out: 5",
    ]


def test_links(tmp_path, monkeypatch):
    root = touch(tmp_path / "data", "a/1.jpg", "a/sub/2.jpg", "b/1.jpg")
    outside = touch(tmp_path / "elsewhere", "3.jpg", "deep/4.jpg")
    (root / "a" / "5.jpg").symlink_to(outside / "3.jpg")
    (root / "a" / "gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    (root / "a" / "round.jpg").symlink_to("round.jpg")
    (root / "a" / "0 itself").symlink_to(root / "a")
    (root / "a" / "sub" / "up").symlink_to(root)
    (root / "a" / "0 other name of sub").symlink_to("sub")
    (root / "a" / "more").symlink_to(outside)
    (root / "a" / "more again").symlink_to(outside)
    (root / "c").symlink_to(outside)
    (outside / "deep" / "back").symlink_to(root)
    images, notes = read_classes(root)
    assert names(images) == ["a/1.jpg", "a/sub/2.jpg", "b/1.jpg"]
    assert notes == [
        "left out, being pipes, devices or links that lead nowhere: 'gone.jpg', 'round.jpg'",
        "left out, being links that lead out of the folder: '5.jpg', 'c', 'more' and 1 more; "
        "if they are meant, set SIGHTLINE_FOLLOW_LINKS=1",
        "links to folders that are read already, not followed: 3",
    ]
    assert "data/a/5.jpg" in names(read_classes(tmp_path)[0])  # within this root it leads nowhere else
    monkeypatch.setenv("SIGHTLINE_FOLLOW_LINKS", "1")
    images, notes = read_classes(root)
    expected = ["1.jpg", "5.jpg", "more/3.jpg", "more/deep/4.jpg", "sub/2.jpg"]
    assert names(images) == [*(f"a/{name}" for name in expected), "b/1.jpg", "c/3.jpg", "c/deep/4.jpg"]
    assert notes[1:] == ["links to folders that are read already, not followed: 6"]


def test_a_folder_of_nothing_but_links_says_how_they_are_followed(tmp_path):
    touch(tmp_path / "elsewhere", "1.jpg", "2.jpg")
    for label in "ab":
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in (1, 2):
            (tmp_path / "data" / label / f"{i}.jpg").symlink_to(tmp_path / "elsewhere" / f"{i}.jpg")
    message = fault(tmp_path / "data")
    assert "no images found" in message
    assert "4 links that lead out" in message
    assert "SIGHTLINE_FOLLOW_LINKS=1" in message


def test_file_names_that_are_not_utf8_survive(tmp_path):
    odd = os.fsdecode(b"a/\xff\xe4.jpg")
    touch(tmp_path, odd, "b/1.jpg", "b/2.jpg")
    images, _ = read_classes(tmp_path)
    assert names(images)[0] == odd
    assert images.samples[0].image.read_bytes() == b"a/\xff\xe4.jpg"
    assert len(images.fingerprint()) == 64
    file = table(tmp_path, "path,label", f"{odd},x", "b/1.jpg,y", "b/2.jpg,y")
    assert odd in names(open_dataset(file).train)


def test_class_names_that_are_not_text_are_refused(tmp_path):
    touch(tmp_path, os.fsdecode(b"\xff/1.jpg"), "b/1.jpg")
    assert "not valid UTF-8" in fault(tmp_path)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ((), "no images found"),
        (("1.jpg", "2.jpg"), "no images found in class folders"),
        (("a/x.txt", "b/y.txt"), "no images found"),
        (("only/1.jpg", "only/2.jpg"), "only one class has images ('only')"),
        (("train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg"), "only in the training part: 'b'"),
        (("train/a/1.jpg", "train/b/1.jpg", *(f"val/{c}/1.jpg" for c in "abc")), "only in the validation part: 'c'"),
        (("train/a/1.jpg", "train/b/1.jpg", "train/c/x", *(f"val/{c}/1.jpg" for c in "abc")), "none to learn: 'c'"),
        (("train/a/1.jpg", "train/b/1.jpg", "val/a/x", "val/b/x"), "no images in 'val'"),
        (("a/1.jpg", "b/1.jpg"), "no class has more than one image"),
        (("val/a/1.jpg", "test/a/1.jpg"), "no folder 'train'"),
        (("Train/a/1.jpg", "train/b/1.jpg"), "upper and lower case"),
        (("A/1.jpg", "a/1.jpg"), "'A' and 'a'"),
    ],
)
def test_folder_faults_are_named(files, words, tmp_path):
    message = fault(touch(tmp_path / "data", *files) if files else tmp_path)
    assert words in message
    assert str(tmp_path) in message


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "a/1.jpg", "b/locked/1.jpg")
    locked = tmp_path / "b" / "locked"
    locked.chmod(0)
    if os.access(locked, os.R_OK):  # the superuser may read everything
        read = os.scandir

        def refuse(path):
            if Path(path) == locked:
                raise PermissionError(13, "Permission denied", str(path))
            return read(path)

        monkeypatch.setattr(os, "scandir", refuse)
    message = fault(tmp_path)
    locked.chmod(0o700)
    assert str(locked) in message
    assert "Permission denied" in message


def test_sources_that_are_no_dataset(tmp_path):
    assert "Did you mean digits?" in fault("builtin:digit")
    assert "does not exist" in fault(tmp_path / "nowhere")
    assert "is none of these" in fault(touch(tmp_path, "x.rar") / "x.rar")
    assert "between 0 and 1" in fault("builtin:digits", held_out=1.0)
    (tmp_path / "not.csv").mkdir()
    assert "no images" in fault(tmp_path / "not.csv")


def test_user_data_is_never_changed(tmp_path):
    touch(tmp_path, *(f"{part}/{label}/{i}.jpg" for part in ("train", "val") for label in "ab" for i in range(3)))
    file = table(tmp_path, "path,label", *(f"train/{label}/{i}.jpg,{label}" for label in "ab" for i in (0, 1)))
    before = tree(tmp_path)
    for source in (tmp_path, tmp_path / "train", file):
        open_dataset(source).train.fingerprint()
    list_images([tmp_path])
    assert tree(tmp_path) == before


# Splits and sets


@calm
@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=5).filter(lambda counts: max(counts) > 1),
    st.integers(0, 2**32),
    st.floats(0.01, 0.99),
    st.randoms(),
)
def test_held_out_share_is_stratified_and_follows_names_alone(counts, seed, share, chance: random.Random):
    pairs = [(f"{t}/{i}", t) for t, count in enumerate(counts) for i in range(count)]
    splits = []
    for _ in range(2):
        named, targets = zip(*pairs, strict=True)
        images = ImageSet(tuple(map(str, range(len(counts)))), Samples(Names(named), np.array(targets)))
        splits.append(hold_out(images, "here", seed=seed, share=share))
        chance.shuffle(pairs)
    train, val = splits[0].train, splits[0].val
    assert {*names(train)} ^ {*names(val)} == {name for name, _ in pairs}
    assert len(train) + len(val) == len(pairs)
    assert {*names(val)} == {*names(splits[1].val)}
    for t, count in enumerate(counts):
        held = val.counts()[str(t)]
        assert held == 0 if count == 1 else 1 <= held < count
        assert abs(held - share * count) <= 1


def test_fingerprint_covers_names_classes_and_content(tmp_path):
    root = touch(tmp_path / "one", "a/1.jpg", "b/1.jpg")
    first = read_classes(root)[0].fingerprint()
    assert read_classes(root.rename(tmp_path / "moved"))[0].fingerprint() == first
    (tmp_path / "moved/a/1.jpg").write_bytes(b"another length")
    seen = {first, read_classes(tmp_path / "moved")[0].fingerprint()}
    (tmp_path / "moved/b").rename(tmp_path / "moved/c")
    seen.add(read_classes(tmp_path / "moved")[0].fingerprint())
    arrays = [np.full((5, 7, 3), value, np.uint8) for value in (1, 2)]
    for pixels in (arrays, arrays[::-1], [a.reshape(7, 5, 3) for a in arrays]):
        samples = Samples(Names(["x", "y"]), np.array([0, 1]), arrays=pixels)
        seen |= {ImageSet(classes, samples).fingerprint() for classes in (("a", "b"), ("b", "a"))}
    assert len(seen) == 9
    gone = unlabelled([tmp_path / "nothing.jpg"])
    assert (gone.counts(), gone.targets.tolist(), len(gone.fingerprint())) == ({}, [-1], 64)


def test_a_large_set_is_small(tmp_path):
    count = 10**5
    words = [f"train/class {i % 1000}/image {i:08}.jpg" for i in range(count)]
    packed = Names(words)
    assert len(packed._text) + packed._ends.nbytes < 45 * count
    images = ImageSet(tuple(map(str, range(1000))), Samples(packed, np.arange(count) % 1000, tmp_path))
    assert len(pickle.dumps(images)) < 55 * count
    assert images.samples[-1].image == tmp_path / words[-1]
    assert set(images.counts().values()) == {100}


# Lists of images


def test_list_images(tmp_path, monkeypatch):
    monkeypatch.chdir(touch(tmp_path, "d/10.jpg", "d/9.jpg", "d/e/1.png", "d/notes.txt", "z[1].jpg", "notes.txt"))
    assert list_images(["d"]) == [Path("d/9.jpg"), Path("d/10.jpg"), Path("d/e/1.png")]
    assert list_images(["d/10.jpg", "d", tmp_path / "d" / "9.jpg"]) == [
        *(Path("d/10.jpg"), Path("d/9.jpg"), Path("d/e/1.png"))
    ]
    assert list_images(["d/*.jpg"]) == [Path("d/9.jpg"), Path("d/10.jpg")]
    assert list_images(["**/*.png", "z[1].jpg", "missing.jpg", "notes.txt"]) == [
        *map(Path, ("d/e/1.png", "z[1].jpg", "missing.jpg", "notes.txt"))
    ]
    for source, words in (("x*.jpg", "nothing matches"), (str(touch(tmp_path / "n", "t.txt")), "no images found")):
        with pytest.raises(UserError, match=words):
            list_images([source])


# Digits


def test_digits():
    splits = open_dataset("builtin:digits", seed=1)
    whole = digits.digits()
    assert len(whole) == 1797 == len(splits.train) + len(splits.val)
    assert whole.classes == splits.val.classes == tuple("0123456789")
    assert whole.counts() == dict(zip("0123456789", [178, 182, 177, 183, 181, 182, 181, 179, 174, 180], strict=True))
    assert splits.val.counts() == dict(zip("0123456789", [36, 36, 35, 37, 36, 36, 36, 36, 35, 36], strict=True))
    image, target, name = whole.samples[0]
    assert (image.shape, image.dtype, target, name) == ((8, 8, 3), np.uint8, 0, "0/0000.png")
    assert image[0, :, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # 0 0 5 13 9 1 0 0 of 16
    assert (image[..., 0] == image[..., 1]).all()
    assert (image[..., 0] == image[..., 2]).all()
    assert splits.train.fingerprint() != open_dataset("builtin:digits", seed=2).train.fingerprint()


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert 'pip install "sightline[train]"' in fault("builtin:digits")


def test_written_digits_are_the_same_set(tmp_path):
    rows = np.arange(0, 1797, 30)
    subset = digits.digits().select(rows)
    files = write_images(subset, tmp_path, scale=3)
    found, notes = read_classes(tmp_path)
    assert notes == []
    assert (found.classes, found.counts()) == (subset.classes, subset.counts())
    by_hash = hold_out(subset, "", seed=5, share=0.2), hold_out(found, "", seed=5, share=0.2)
    assert {*names(by_hash[0].val)} == {*names(by_hash[1].val)}
    for file, (image, target, name) in zip(files, subset.samples, strict=True):
        assert file == tmp_path / name
        assert file.parent.name == str(target)
        pixels = np.asarray(Image.open(file))
        assert pixels.shape == (24, 24, 3)
        assert (pixels[1::3, 2::3] == image).all()


def test_both_parts_together_are_the_whole(tmp_path):
    splits = open_dataset("builtin:digits", seed=3)
    whole = splits.together()
    assert splits.drawn
    assert sorted(whole.samples.names) == sorted([*splits.train.samples.names, *splits.val.samples.names])
    assert whole.counts() == {name: splits.train.counts()[name] + n for name, n in splits.val.counts().items()}
    last = whole.samples[len(whole) - 1]
    assert (last.name, last.target) == (splits.val.samples[-1].name, splits.val.samples[-1].target)
    assert np.array_equal(last.image, splits.val.samples[-1].image)
