"""WebDataset shards are read as the same data in folders would be."""

import gzip
import json
import os
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from command import TINY, cli, ended, refusal, started
from marked_sets import write_coco, write_masks
from shard_sets import compare, fault, found, keyed, labelled, mask, pack, packed, picture
from sightline.datasets import member
from sightline.datasets.inventory import take_stock
from sightline.datasets.loader import TrainLoader
from sightline.datasets.open import open_dataset
from sightline.datasets.scenes import SHAPES
from sightline.datasets.shards import find_shards
from sightline.datasets.unlabelled import open_images
from sightline.errors import UserError
from sightline.evaluation.cache import Cache
from sightline.evaluation.features import Embedding
from sightline.images.decode import ImageError, decode
from sightline.model import load
from sightline.recipes.images_and_texts import ImagesAndTexts
from sightline.recipes.train import train
from sightline.training.signals import Interrupted
from sightline.training.update import Updater

SMALL = ("--embed-dim", 16, "--depth", 1, "--num-heads", 2, "--workers", 0)
MORE = {
    "detect": ("--hidden-dim=16", "--decoder-layers=1", "--decoder-heads=2", "--decoder-mlp=16"),
    "segment": (),
    "clip": (),
}


# The same as in folders


def test_classes_are_those_of_class_folders(tmp_path: Path) -> None:
    names = ("ant", "bee", "cat")
    for part, first, last in (("train", 0, 9), ("val", 9, 16)):
        samples = []
        for i in range(first, last):
            file = tmp_path / "folder" / part / names[i % 3] / f"{i:05}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture(i))
            samples.append({f"{i:05}.png": picture(i), f"{i:05}.cls": names[i % 3].encode()})
        packed(tmp_path / "shards" / part, samples)
        for number, file in enumerate(sorted((tmp_path / "shards" / part).iterdir())):
            pack(tmp_path / "named" / f"x-{part}-{number:02}.tar", {}).write_bytes(file.read_bytes())
    folder = open_dataset(tmp_path / "folder")
    for data in (
        "shards",
        "named",
        "shards/{train,val}/shard-{000000..000001}.tar",
        "named/x-{train,val}-{00..01}.tar",
    ):
        shards = open_dataset(tmp_path / data)
        assert not shards.drawn
        for part in ("train", "val"):
            compare(getattr(folder, part), getattr(shards, part), lambda a, b: a == b)
    assert "x-train-00.tar/00000.png" in list(open_dataset(tmp_path / "named").train.samples.names)


def test_numbers_and_their_names(tmp_path: Path) -> None:
    samples = [{f"{i}.png": picture(i), f"{i}.cls": b"%03d\n" % (i % 11)} for i in range(22)]
    packed(tmp_path, samples)
    plain = open_dataset(tmp_path)
    assert plain.train.classes == tuple(map(str, range(11)))
    assert plain.together().counts() == dict.fromkeys(plain.train.classes, 2)
    (tmp_path / "classes.txt").write_text("\n".join(f"c{20 - i}" for i in range(300)))
    named = open_dataset(tmp_path).together()
    assert named.classes == tuple(f"c{i}" for i in range(10, 21))
    assert keyed(named)["3"][1] == "c17"
    (tmp_path / "classes.txt").write_text("a\nb\n")
    assert "its label is 2, and classes.txt names 2 from 0 on" in fault(tmp_path)


def test_masks_are_those_of_folders(tmp_path: Path) -> None:
    root = write_masks(tmp_path / "folder", 6, kind="P")
    samples = []
    for i, file in enumerate(sorted((root / "images").iterdir())):
        kind, other = ("mask.png", "seg.png") if i % 2 else ("seg.png", "txt")
        data = (root / "masks" / file.name).read_bytes()
        extra = {f"{file.stem}.{other}": mask(0)} if i % 2 else {}
        samples.append({file.name: file.read_bytes(), f"{file.stem}.{kind}": data, **extra})
    packed(tmp_path / "shards", samples, 4)
    assert "classes.txt cannot be read" in fault(tmp_path / "shards", "segment")
    assert ("unusable", "") in found(tmp_path / "shards")
    (tmp_path / "shards" / "classes.txt").write_bytes((root / "classes.txt").read_bytes())
    folder, shards = (open_dataset(path, task="segment").together() for path in (root, tmp_path / "shards"))
    compare(folder, shards, lambda a, b: np.array_equal(a.mask(64, 64), b.mask(64, 64)))
    assert not [kind for kind, _ in found(tmp_path / "shards") if kind not in ("other-file", "mode")]


def test_boxes_are_those_of_coco(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "folder", 7, 3)
    for part in ("train", "val"):
        document = json.loads((root / f"{part}.json").read_text())
        samples = []
        for image in document["images"]:
            rows = [row for row in document["annotations"] if row["image_id"] == image["id"]]
            said = {"image": image, "annotations": rows, "categories": document["categories"]}
            stem = Path(image["file_name"]).stem
            data = (root / "images" / image["file_name"]).read_bytes()
            samples.append({image["file_name"]: data, f"{stem}.json": json.dumps(said).encode()})
        packed(tmp_path / "shards" / part, samples)
    folder, shards = (open_dataset(path, task="detect") for path in (root, tmp_path / "shards"))
    for part in ("train", "val"):
        compare(getattr(folder, part), getattr(shards, part), lambda a, b: a.content() == b.content())


@pytest.mark.parametrize("form", ["list", "names", "classes.txt"])
def test_ways_to_say_what_a_box_is_around(form: str, tmp_path: Path) -> None:
    samples = []
    for i in range(4):
        row = {"bbox": [1, 2, 3, 4]} | ({"category": SHAPES[i % 2]} if form == "names" else {"category_id": i % 2})
        said = [row] if form == "list" else {"annotations": [row], "width": 13, "height": 9}
        samples.append({f"{i}.png": picture(i), f"{i}.json": json.dumps(said).encode()})
    packed(tmp_path, samples)
    if form == "classes.txt":
        (tmp_path / "classes.txt").write_text("one\nzero\nnever\n")
    images = open_dataset(tmp_path, task="detect").together()
    expected = {"list": ("0", "1"), "names": tuple(sorted(SHAPES[:2])), "classes.txt": ("never", "one", "zero")}[form]
    assert images.classes == expected
    marks = keyed(images)["1"][1]
    assert marks.boxes.tolist() == [[1, 2, 4, 6]]
    assert images.classes[marks.labels[0]] == {"list": "1", "names": SHAPES[1], "classes.txt": "zero"}[form]


def test_captions_are_those_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "table").mkdir()
    rows, samples = [], []
    for i in range(8):
        (tmp_path / "table" / f"{i}.png").write_bytes(picture(i))
        rows.append({"path": f"{i}.png", "caption": f"é {i}"})
        said = {f"{i}.txt": f"\ufeff é {i}\n".encode(), f"{i}.json": b"not looked at"}
        if i % 2:
            rows.append({"path": f"{i}.png", "caption": "again"})
            said = {f"{i}.json": json.dumps({"captions" if i == 1 else "caption": [f"é {i}", "again"]}).encode()}
        samples.append({f"{i}.png": picture(i), **said})
    (tmp_path / "table" / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    packed(tmp_path / "shards", samples)
    folder, shards = (open_dataset(tmp_path / name, task="clip").together() for name in ("table", "shards"))
    compare(folder, shards, lambda a, b: a.captions == b.captions)


def test_images_without_labels(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for i in range(12):
        (tmp_path / "folder" / f"{i}.png").write_bytes(picture(i))
    bare = packed(tmp_path / "bare", [{f"{i}.png": picture(i), f"{i}.meta": b"x"} for i in range(12)])
    single = pack(tmp_path / "single.tar", {f"all/{i}.png": picture(i) for i in range(12)})
    same = packed(tmp_path / "same", [{f"{i}.png": picture(i), f"{i}.cls": b"0"} for i in range(12)])
    folder = open_images(tmp_path / "folder")
    for path in (bare, single, same):
        shards = open_images(path)
        compare(folder.together(), shards.together(), lambda a, b: a == b == -1)
        assert (len(shards.train), len(shards.val), shards.drawn) == (11, 1, True)
    known = open_images(packed(tmp_path / "known", labelled()))
    assert (known.train.classes, len(known.val)) == (("0", "1"), 2)
    assert "none of 12 images has what is to be learned beside it" in fault(bare)
    assert not [kind for kind, _ in found(bare) if kind not in ("other-file",)]
    parts = open_images(packed(tmp_path / "parts" / "train", labelled()[:3]).parent)  # the one part there is
    assert len(parts.train) + len(parts.val) == 3


def test_what_reads_texts_takes_classes_too(tmp_path: Path) -> None:
    classes = packed(tmp_path / "classes", labelled())
    texts = packed(tmp_path / "texts", [{**files, f"{i:05}.txt": b"x"} for i, files in enumerate(labelled())])
    opened = ImagesAndTexts().open(classes, 0)
    assert opened.train.classes == ("0", "1")
    for path in (texts, f"{texts}/shard-{{000000..000002}}.tar", texts / "shard-000000.tar"):
        assert ImagesAndTexts().open(path, 0).train.samples.marks is not None


# What counts as shards


def test_a_single_archive_is_a_shard_where_it_looks_like_one(tmp_path: Path) -> None:
    shard = pack(tmp_path / "shard.tar", {name: data for files in labelled() for name, data in files.items()})
    assert open_dataset(shard).together().counts() == {"0": 6, "1": 6}
    folders = {f"{label}/{i}.{kind}": picture(i) for label in "ab" for i in range(4) for kind in ("png", "txt")}
    classes = pack(tmp_path / "classes.tar", folders)
    assert open_dataset(classes).train.classes == ("a", "b")
    assert take_stock(classes).parts["all"].classes == ("a", "b")
    assert find_shards(pack(tmp_path / "texts.tar", {"1.png": picture(1), "1.txt": b"x"}), ("txt",)) is not None
    assert find_shards(tmp_path / "texts.tar", ("cls",)) is None
    (tmp_path / "broken.tar").write_bytes(b"\1" * 2000)
    assert "neither a ZIP nor a tar" in fault(tmp_path / "broken.tar")
    assert "checksum" in fault(tmp_path / "broken.tar", "segment") or "damaged" in fault(
        tmp_path / "broken.tar", "clip"
    )


def test_folders_that_only_contain_an_archive_too(tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(2):
            (tmp_path / label / f"{i}.png").write_bytes(picture(i))
    pack(tmp_path / "old.tar", {"1.png": b""})
    assert open_dataset(tmp_path).train.classes == ("a", "b")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "1.png").write_bytes(picture(1))
    pack(tmp_path / "flat" / "old.tar", {"1.png": b""})
    assert "archives in a folder are read as shards where no images lie in it" in fault(tmp_path / "flat")


def test_patterns(tmp_path: Path) -> None:
    packed(tmp_path, labelled(24), 2)
    assert len(open_dataset(tmp_path / "shard-{000001..000003}.tar").together()) == 6
    assert len(open_dataset(tmp_path / "{shard-000002,shard-000011}.tar").together()) == 4
    told = fault(tmp_path / "shard-{000010..000013}.tar")
    assert "shard-000012.tar: cannot read the shard: No such file" in told
    assert "shard-000013.tar" in told
    assert "names a shard twice" in fault(tmp_path / "shard-{000001,000001}.tar")
    assert "for no shards" in fault(tmp_path / "shard-{3..1}.tar")
    assert "more than 100,000" in fault(tmp_path / "shard-{0..999}-{0..999}.tar")
    assert "does not exist" in fault(tmp_path / "shard-{x}.tar")
    for name in ("x-{9..11}.tar", "y-{08..10}.tar", "z-{0..1}.tar"):
        files = find_shards(tmp_path / name)
        assert files is not None
        wanted = {"x": ["x-9.tar", "x-10.tar", "x-11.tar"], "y": ["y-08.tar", "y-09.tar", "y-10.tar"]}
        assert files.parts["all"] == wanted.get(name[0], ["z-0.tar", "z-1.tar"])


def test_parts_are_told_by_all_names_or_none(tmp_path: Path) -> None:
    for name in ("train-0.tar", "extra-0.tar"):
        pack(tmp_path / name, {})
    assert "no part stands in the names of 'extra-0.tar'" in fault(tmp_path)
    (tmp_path / "extra-0.tar").rename(tmp_path / "train-1.tar")
    assert "no images in 2 shards" in fault(tmp_path)
    (tmp_path / "train-0.tar").rename(tmp_path / "val-1.tar")
    (tmp_path / "train-1.tar").rename(tmp_path / "test-1.tar")
    assert "none is for training" in fault(tmp_path)
    pack(tmp_path / "both" / "0.tar", {})
    pack(tmp_path / "both" / "train" / "0.tar", {})
    assert "shards lie in it and in its folders 'train'" in fault(tmp_path / "both")


def test_compressed_shards_are_refused(tmp_path: Path) -> None:
    shard = packed(tmp_path / "plain", labelled()) / "shard-000000.tar"
    data = gzip.compress(shard.read_bytes())
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "0.tar.gz").write_bytes(data)
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "0.tar").write_bytes(data)
    assert "decompress them (gunzip)" in fault(tmp_path / "named")
    assert "decompress them" in fault(tmp_path / "named" / "{0,1}.tar.gz")
    assert "decompress them" in fault(tmp_path / "named" / "0.tar.gz", "segment")
    assert "not compressed" in fault(tmp_path / "named" / "0.tar.gz")
    assert "it is compressed: decompress it" in fault(tmp_path / "hidden")
    assert found(tmp_path / "hidden") == [("member", "0.tar")]


# What a training needs


def test_a_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    one, two = (packed(tmp_path / name, labelled()) for name in ("one", "two"))
    before = open_dataset(one).train.fingerprint()
    assert open_dataset(two).train.fingerprint() == before
    for change in ({"00003.png": picture(99)}, {"00003.cls": b"0"}, {"00003.png": picture(3) + b"x"}):
        changed = labelled()
        changed[3] |= change
        packed(two, changed)
        splits = open_dataset(two, seed=0)
        assert splits.together().fingerprint() != open_dataset(one).together().fingerprint()
    masks = [{f"{i}.png": picture(i), f"{i}.seg.png": mask(i % 2)} for i in range(6)]
    prints = []
    for value in (0, 1):
        masks[2]["2.seg.png"] = mask(value)
        packed(tmp_path / "masks", masks)
        (tmp_path / "masks" / "classes.txt").write_text("a\nb\n")
        prints.append(open_dataset(tmp_path / "masks", task="segment").together().fingerprint())
    assert prints[0] != prints[1]


def test_large_members_are_known_by_their_ends_and_never_read_between(tmp_path: Path) -> None:
    large = picture(1, 90, 90)
    assert len(large) > 3 * member.ENDS
    samples = labelled(4)
    samples[1]["00001.png"] = large
    shard = packed(tmp_path, samples) / "shard-000000.tar"
    whole = shard.read_bytes()
    splits, at = open_dataset(tmp_path), whole.index(large)
    image = next(image for image, _, name in splits.together().samples if name.endswith("00001.png"))
    assert image.read(10**6) == large
    assert image.content != member.Member(image.archive, "x", member.STORED, at, len(large), len(large), 0).content
    assert not image.whole
    for place in (at + 10, at + len(large) - 10):
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ImageError, match="changed meanwhile"):
            decode(image)
    shard.unlink()
    with pytest.raises(ImageError, match="No such file"):
        decode(image)


def test_kept_features_follow_from_every_byte(tmp_path: Path) -> None:
    """Also from those that no checksum of a shard covers."""
    pixels = np.random.default_rng(0).integers(0, 256, (70, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.bmp")
    data = (tmp_path / "x.bmp").read_bytes()
    shard = packed(tmp_path / "data", [{"1.bmp": data, "1.cls": b"0"}, {"2.bmp": data, "2.cls": b"1"},
                                       {"3.png": picture(3), "3.cls": b"1"}]) / "shard-000000.tar"  # fmt: skip
    model = load("builtin:tiny")
    embedding = Embedding(model.network, model.preprocess, torch.device("cpu"), torch.float32,
                          batch_size=4, cache=Cache(tmp_path / "kept", 2**20))  # fmt: skip

    def features() -> tuple[torch.Tensor, bool]:
        found = embedding(open_dataset(tmp_path / "data").train)
        return found.vectors, found.cached

    first, again = features(), features()
    assert (first[1], again[1]) == (False, True)
    whole = shard.read_bytes()
    for at in (whole.index(data), whole.rindex(data)):
        whole = whole[: at + 7000] + bytes(200) + whole[at + 7200 :]
    shard.write_bytes(whole)
    changed = features()
    assert not changed[1]
    assert not torch.equal(changed[0], first[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_in_processes(workers: int, tmp_path: Path) -> None:
    images = open_dataset(packed(tmp_path, labelled())).train
    sent = pickle.loads(pickle.dumps(images))
    assert sent.fingerprint() == images.fingerprint()
    loader = TrainLoader(sent, _pixels, batch_size=3, seed=1, steps=range(4), workers=workers)
    batches = [loaded.batch for loaded in loader]
    expected = TrainLoader(images, _pixels, batch_size=3, seed=1, steps=range(4), workers=0)
    for mine, theirs in zip(batches, expected, strict=True):
        assert mine is not None
        assert theirs.batch is not None
        assert torch.equal(mine.pixels, theirs.batch.pixels)
        assert torch.equal(mine.targets, theirs.batch.targets)


def _pixels(image: np.ndarray, key: int) -> torch.Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1).float() + key % 7


# The commands


def test_shards_through_the_commands(tmp_path: Path) -> None:
    data = packed(tmp_path / "digits", labelled(24), 12)
    checked = started("check", f"{data}/shard-{{000000..000001}}.tar", "--json", "--quiet", "--workers", 2)
    said = cli("train", data, "--epochs", 1, *TINY, "--out", tmp_path / "run", "--json")
    assert said.status == 0, said.err
    judged = cli("evaluate", tmp_path / "run", f"{data}/shard-{{000000..000001}}.tar", "--workers", 0, "--json")
    assert judged.status == 0, judged.err
    assert judged.document["metrics"] == pytest.approx(said.document["metrics"])  # of the same images: held out by name
    assert cli("evaluate", tmp_path / "run", data, "--protocol", "knn", "--no-cache", "--json").status == 0
    answer = ended(checked)
    assert answer.status == 0, answer.err
    assert answer.document["counts"]["images"] == answer.document["counts"]["readable"] == 24
    pack(data / "shard-000001.tar", {"a.png": picture(1)})
    assert "shard-000001.tar/a.png: beside it is no KEY.cls" in refusal("train", data, "--out", tmp_path / "other")
    assert cli("check", data, "--workers", 0).status == 2


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = packed(tmp_path / "data", labelled(40), 12)
    small = {"embed_dim": 16, "depth": 1, "num_heads": 2, "tokenizer": "patch"}
    words = {"epochs": 3, "workers": 0, "network": small, "batch_size": 8, "quiet": True}
    whole = train(data, out=tmp_path / "whole", **words)
    plain = Updater.__call__

    def stopping_at_7(self, batch, step, *words):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, batch, step, *words)

    monkeypatch.setattr(Updater, "__call__", stopping_at_7)
    with pytest.raises(Interrupted):
        train(data, out=tmp_path / "parts", **words)
    monkeypatch.undo()
    shard = data / "shard-000002.tar"
    original = shard.read_bytes()
    pack(
        shard,
        {name: content for sample in labelled(36)[24:36] for name, content in sample.items()}
        | {"00024.png": picture(99)},
    )
    with pytest.raises(UserError, match="have changed since the run"):
        train(data, out=tmp_path / "parts", resume=True)
    shard.write_bytes(original)
    assert train(data, out=tmp_path / "parts", resume=True).metrics == whole.metrics
    mine, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert mine == theirs


@pytest.mark.parametrize("task", ["detect", "segment", "clip"])
def test_every_task_learns_from_shards(task: str, tmp_path: Path) -> None:
    box = json.dumps([{"bbox": [1, 2, 3, 4], "category_id": 0}]).encode()
    beside = {"detect": {"json": box}, "segment": {"seg.png": mask()}, "clip": {"txt": b"a word"}}[task]
    samples = [{f"{i}.png": picture(i), **{f"{i}.{kind}": data for kind, data in beside.items()}} for i in range(12)]
    data = packed(tmp_path / "data", samples)
    (data / "classes.txt").write_text("a\nb\n")
    said = cli(
        "train", data, "--task", task, "--epochs", 3, "--batch-size", 8, *SMALL, *MORE[task], "--out", tmp_path / "run"
    )
    assert said.status == 0, said.err
    judged = cli("evaluate", tmp_path / "run", data, "--workers", 0, "--json")
    assert judged.status == 0, judged.err
    assert judged.document["counts"] == {"evaluated": 2, "refused": 0}


def test_learning_without_labels_from_shards(tmp_path: Path) -> None:
    data = packed(tmp_path / "data", [{f"{i}.png": picture(i)} for i in range(16)])
    said = cli(
        "pretrain", data, "--objective", "mae", "--epochs", 1, *SMALL, "--image-size", 16, "--out", tmp_path / "run"
    )
    assert said.status == 0, said.err
    assert "16 images without labels (no image has a label beside it)" in said.err
