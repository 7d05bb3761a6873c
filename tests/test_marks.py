"""Boxes, masks and captions: drawn, read from other tools' files, moved with the pixels, and weighed."""

import json
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from examples import examples
from marked_sets import IDS, packed, runs, write_coco, write_masks
from sightline.datasets.check import check
from sightline.datasets.marks import IGNORE, Objects
from sightline.datasets.open import open_dataset
from sightline.datasets.rle import box_of, decode, unpacked
from sightline.datasets.scenes import COLOURS, PAIRS, SHAPES, UNSEEN, VISIBLE, scene
from sightline.errors import UserError
from sightline.evaluation.detection import Boxes, average_precision
from sightline.evaluation.segmentation import Masks, PixelCounts, confusion, intersection_over_union
from sightline.heads.detect import Detected
from sightline.images.augment import Augment
from sightline.images.decode import ImageError
from sightline.images.marked import MarkedImages, original_boxes, placed_boxes, placed_mask
from sightline.images.preprocess import Preprocess
from sightline.recipes.task import task_of
from sightline.types import Batch


class TestScenes:
    def test_a_scene_follows_from_its_seed_and_number(self):
        (one, first), (again, second), (other, _) = scene(3, 7), scene(3, 7), scene(4, 7)
        assert np.array_equal(one, again)
        assert first.content() == second.content()
        assert not np.array_equal(one, other)

    def test_pairs_that_are_not_to_be_seen_are_in_no_captioned_scene(self):
        for place in (0, 1):  # neither the colour nor the shape tells one from all others
            assert sorted(np.unique([pair[place] for pair in UNSEEN], return_counts=True)[1]) == [2, 2, 2]
        seen = [pair for pair in PAIRS if pair not in UNSEEN]
        found = [scene(5, number, pairs=seen)[1] for number in range(60)]
        shown = {(c, SHAPES[k]) for one in found for c, k in zip(one.colours, one.objects.labels, strict=True)}
        assert len(shown) > 20
        assert not shown & set(UNSEEN)

    @pytest.mark.parametrize(("pairs", "count"), [("all", 30), ("seen", 24), ("unseen", 6)])
    def test_objects_are_of_the_pairs_that_are_asked_for(self, pairs, count):
        own = open_dataset(f"builtin:objects:pairs={pairs}", task="clip", seed=2)
        assert sorted(own.val.counts().values()) == [20] * count
        found = open_dataset(f"builtin:objects:pairs={pairs},choices=all", task="clip", seed=2)
        assert found.val.classes == tuple(f"{colour} {shape}" for colour, shape in PAIRS)
        assert found.val.samples.marks is None
        for images, each in ((found.train, 50), (found.val, 20)):
            assert sorted(images.counts().values()) == [0] * (30 - count) + [each] * count
        named = [found.val.classes[target] for target in found.val.targets]
        assert named == [own.val.classes[target] for target in own.val.targets]
        known = {image.tobytes() for image in found.train.samples.arrays}
        assert not known & {image.tobytes() for image in found.val.samples.arrays}

    def test_boxes_masks_and_captions_agree(self):
        for number in range(40):
            pixels, found = scene(1, number)
            assert pixels.shape == (64, 64, 3)
            assert found.pixels.shape == (64, 64)
            assert 1 <= len(found.objects) <= 5
            areas = np.zeros(len(SHAPES))
            for label, box, area, colour in zip(
                found.objects.labels, found.objects.boxes, found.objects.area, found.colours, strict=True
            ):
                left, top, right, bottom = box.astype(int)
                part = found.pixels[top:bottom, left:right] == label + 1
                assert part[0].any()
                assert part[-1].any()
                assert part[:, 0].any()
                assert part[:, -1].any()
                areas[label] += area
                assert f"{colour} {SHAPES[label]}" in found.caption
                assert colour in COLOURS
            counted = np.bincount(found.pixels.ravel(), minlength=6)[1:]
            assert (areas == counted).all()  # every pixel of a class belongs to one of its objects

    def test_objects_are_covered_but_never_too_far(self):
        hidden = 0
        for number in range(60):
            _, found = scene(2, number)
            boxes = found.objects.boxes
            for i, box in enumerate(boxes):
                inner = [np.minimum(box[2:], b[2:]) - np.maximum(box[:2], b[:2]) for b in boxes[i + 1 :]]
                hidden += any((sides > 2).all() for sides in inner)
        assert hidden > 10
        assert 0 < VISIBLE < 1

    def test_only_tasks_with_marks_can_learn_from_them(self):
        with pytest.raises(UserError, match="--task detect or --task segment"):
            open_dataset("builtin:scenes")


class TestRunLengths:
    @examples(40)
    @given(st.integers(1, 9), st.integers(1, 7), st.integers(0, 2**31))
    def test_they_are_those_of_pycocotools(self, height, width, seed):
        mask = (np.random.default_rng(seed).random((height, width)) < 0.4).astype(np.uint8)
        assert np.array_equal(decode({"size": [height, width], "counts": packed(mask)}), mask)
        assert np.array_equal(decode({"size": [height, width], "counts": runs(mask)}), mask)
        assert unpacked(packed(mask)) == runs(mask)

    @examples(60)
    @given(st.binary(max_size=20), st.integers(1, 40))
    def test_nonsense_is_refused(self, text, side):
        with suppress(ValueError):
            assert decode({"size": [side, side], "counts": text}).shape == (side, side)

    def test_runs_have_to_cover_the_mask_before_anything_is_made_of_them(self):
        for counts in ([10**12], [5], [2, 3, 2]):
            with pytest.raises(ValueError, match=f"run lengths of {sum(counts)} pixels for a mask of 2×3"):
                decode({"size": [2, 3], "counts": counts})

    def test_boxes_of_polygons(self):
        assert box_of([[2, 3, 7, 3, 7, 11], [1, 4, 2, 5, 1, 6]]) == (1, 3, 6, 8)
        for odd in ([], [[]], [["a", "b"]], [[float("nan"), 1]], 7):
            with pytest.raises(ValueError, match=r"polygon|segmentation"):
                box_of(odd)


class TestCoco:
    def test_another_tools_file_says_the_same_as_the_scenes(self, tmp_path):
        splits = open_dataset(write_coco(tmp_path / "coco"), task="detect")
        assert splits.train.classes == tuple(sorted(SHAPES))
        assert (len(splits.train), len(splits.val)) == (24, 8)
        for number, (_, objects, name) in enumerate(splits.train.samples):
            assert name == f"images/{number:04}.png"
            _, found = scene(0, number)
            assert [splits.train.classes[i] for i in objects.labels] == [SHAPES[i] for i in found.objects.labels]
            assert np.array_equal(objects.boxes, found.objects.boxes)

    def test_a_single_file_is_split_by_the_seed(self, tmp_path):
        write_coco(tmp_path / "coco")
        (tmp_path / "coco" / "val.json").unlink()
        one, two = (open_dataset(tmp_path / "coco" / "train.json", task="detect", seed=seed) for seed in (0, 1))
        assert len(one.val) == round(24 * 0.2)
        assert list(one.val.samples.names) != list(two.val.samples.names)
        assert one.train.fingerprint() != two.train.fingerprint()

    FAULTS = (
        (lambda d: d["annotations"][0].update(category_id=99), "unknown-class", "category 99", True),
        (lambda d: d["annotations"][0].update(image_id=5), "annotation", "image 5, which is not there", True),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, "x", 4]), "annotation", "not four numbers", True),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, float("nan"), 4]), "annotation", "not four numbers", True),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, 0, 4]), "zero-area", "0×4 pixels", False),
        (lambda d: d["annotations"][0].update(bbox=[50, 2, 40, 4]), "box-outside", "reaches out of its image", False),
        (lambda d: d["categories"].append({"id": 3, "name": "again"}), "annotation", "is there twice", True),
        (lambda d: d["images"].append(d["images"][0]), "annotation", "two images have the id", True),
    )

    @pytest.mark.parametrize(("spoil", "kind", "words", "refused"), FAULTS)
    def test_faults_are_named(self, tmp_path, spoil, kind, words, refused):
        file = write_coco(tmp_path / "coco", 4, 2) / "train.json"
        document = json.loads(file.read_text())
        spoil(document)
        file.write_text(json.dumps(document))
        checked = check(tmp_path / "coco", workers=0)
        assert kind in {finding.kind for finding in checked.findings}
        if refused:
            with pytest.raises(UserError, match=words):
                open_dataset(tmp_path / "coco", task="detect")
            assert checked.severity == "error"
        else:
            notes = open_dataset(tmp_path / "coco", task="detect").notes
            assert any(words in note for note in notes)

    @pytest.mark.parametrize(
        "text", ["", "[]", '{"images": 3}', '{"images": [], "annotations": [1], "categories": []}']
    )
    def test_what_is_no_such_file_is_refused(self, tmp_path, text):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=r"a\.json"):
            open_dataset(tmp_path / "a.json", task="detect")

    def test_crowds_are_neither_learned_nor_counted(self, tmp_path):
        file = write_coco(tmp_path / "coco", 4, 2) / "train.json"
        document = json.loads(file.read_text())
        for row in document["annotations"]:
            row["iscrowd"] = 1
        file.write_text(json.dumps(document))
        images = open_dataset(tmp_path / "coco", task="detect").train
        joint = task_of("detect").prepared(Preprocess(size=(64, 64), resize="squash"))
        _, target = joint(images.samples[0].image, images.samples[0].target, 0)
        assert len(target.labels) == 0
        assert IDS


class TestMasks:
    @pytest.mark.parametrize("kind", ["L", "P", "I;16"])
    def test_every_kind_of_file_says_the_same(self, tmp_path, kind):
        splits = open_dataset(write_masks(tmp_path / "masks", 10, kind=kind), task="segment")
        assert splits.train.classes == ("background", *SHAPES)
        assert (len(splits.train), len(splits.val)) == (8, 2)
        for _, marks, name in splits.train.samples:
            wanted = scene(0, int(name[-8:-4]))[1].pixels.copy()
            wanted[0, :3] = IGNORE
            assert np.array_equal(marks.mask(64, 64), wanted)

    def test_parts_lie_inside_or_outside(self, tmp_path):
        for part in ("train", "val"):
            write_masks(tmp_path / "a" / part, 4)
        (tmp_path / "a" / "train" / "classes.txt").rename(tmp_path / "a" / "classes.txt")
        splits = open_dataset(tmp_path / "a", task="segment")
        assert (len(splits.train), len(splits.val)) == (4, 4)

    def test_faults_are_named(self, tmp_path):
        folder = write_masks(tmp_path / "masks", 8)
        Image.new("L", (10, 10)).save(folder / "masks" / "0001.png")
        Image.new("L", (64, 64), 77).save(folder / "masks" / "0002.png")
        Image.new("RGB", (64, 64)).save(folder / "masks" / "0003.png")
        whole = (folder / "masks" / "0004.png").read_bytes()
        (folder / "masks" / "0004.png").write_bytes(whole[: len(whole) // 2])
        kinds = {f.kind: (f.reason, f.files) for f in check(folder, workers=0).findings}
        assert "10×10 pixels, and the image 64×64" in kinds["mask-size"][0]
        assert "class 77" in kinds["unknown-class"][0]
        assert {"images/0003.png", "images/0004.png"} >= set(kinds["mask"][1])
        images = open_dataset(folder, task="segment").together()
        for number in range(1, 5):
            sample = next(s for s in images.samples if s.name.endswith(f"{number:04}.png"))
            with pytest.raises(ImageError):
                sample.target.mask(64, 64)
        (folder / "masks" / "0005.png").unlink()
        assert "missing-mask" in {f.kind for f in check(folder, workers=0).findings}
        with pytest.raises(UserError, match=r"without a mask of the same stem: '0005\.png'"):
            open_dataset(folder, task="segment")

    @pytest.mark.parametrize("text", ["a\n", "a\nb\na\n", "a\n\nb\n"])
    def test_names_of_classes_have_to_be_names(self, tmp_path, text):
        folder = write_masks(tmp_path / "masks", 2)
        (folder / "classes.txt").write_text(text)
        with pytest.raises(UserError, match=r"classes\.txt"):
            open_dataset(folder, task="segment")


def blob(height, width, box):
    """A bright rectangle on black."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    left, top, right, bottom = box
    image[top:bottom, left:right] = 255
    return image


class TestMoving:
    VARIED = (
        Augment(horizontal_flip=1.0),
        Augment(vertical_flip=1.0),
        Augment(crop="resized", crop_scale=(0.5, 0.9)),
        Augment(translate=0.2, zoom=(0.7, 1.3)),
        Augment(horizontal_flip=0.5, translate=0.1, brightness=0.3, crop="resized", crop_scale=(0.4, 1.0)),
    )

    @pytest.mark.parametrize("augment", VARIED)
    @pytest.mark.parametrize("resize", ["squash", "pad"])
    def test_boxes_and_masks_move_with_the_pixels(self, augment, resize):
        preprocess = Preprocess(size=(60, 90), resize=resize, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear")
        moving, box = MarkedImages(preprocess, augment), (30, 20, 70, 45)
        image = blob(70, 110, box)
        mask = (image[..., 0] > 0).astype(np.uint8)
        for key in range(12):
            seen = moving(image, np.array([box], dtype=np.float32), mask, key)
            bright = seen.pixels.amax(dim=0) > 0.2
            assert ((seen.mask == 1) != bright).float().mean() < 0.03
            if not len(seen.boxes):
                continue
            rows, columns = (bright.any(dim=axis).nonzero()[:, 0] for axis in (1, 0))
            found = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            assert (seen.boxes[0] - found).abs().max() <= 2.5
            assert seen.kept.tolist() == [0]

    def test_a_key_decides_everything(self):
        moving = MarkedImages(Preprocess(size=(32, 32)), self.VARIED[-1])
        image, boxes = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8), np.zeros((0, 4))
        before = torch.random.get_rng_state()
        one, two, three = (moving(image, boxes, None, key).pixels for key in (5, 5, 6))
        assert torch.equal(one, two)
        assert not torch.equal(one, three)
        assert torch.equal(before, torch.random.get_rng_state())

    def test_what_is_nearly_out_of_sight_is_gone(self):
        preprocess = Preprocess(size=(40, 40), resize="crop")
        boxes = np.array([[0, 0, 30, 10], [20, 5, 40, 30], [38, 0, 100, 10]], dtype=np.float32)
        seen = MarkedImages(preprocess)(np.zeros((40, 80, 3), np.uint8), boxes, None, 0)  # columns 20 to 60
        assert seen.kept.tolist() == [0, 1, 2]
        boxes[0] = [0, 0, 24, 10]
        seen = MarkedImages(preprocess)(np.zeros((40, 80, 3), np.uint8), boxes, None, 0)
        assert seen.kept.tolist() == [1, 2]

    @pytest.mark.parametrize("setting", [{"randaugment": 2}, {"erasing": 0.5}, {"crop": "padded"}])
    def test_variations_that_would_leave_marks_behind_are_refused(self, setting):
        with pytest.raises(UserError, match="augment"):
            MarkedImages(Preprocess(size=(32, 32)), Augment(**setting))

    @examples(40)
    @given(st.integers(3, 90), st.integers(3, 90), st.sampled_from(["squash", "crop", "pad", "native"]))
    def test_a_box_comes_back_where_it_was(self, height, width, resize):
        place = Preprocess(size=(32, 48), resize=resize).placement(height, width)
        boxes = torch.tensor([[0.0, 0.0, width, height], [1.0, 2.0, width - 1.0, height - 0.5]])
        torch.testing.assert_close(original_boxes(placed_boxes(boxes, place), place), boxes, atol=1e-3, rtol=1e-4)

    @pytest.mark.parametrize("resize", ["squash", "crop", "pad", "native"])
    def test_a_mask_lies_where_the_image_does(self, resize):
        preprocess = Preprocess(size=(24, 36), resize=resize, mean=(0, 0, 0), std=(1, 1, 1), interpolation="nearest")
        image = np.random.default_rng(1).integers(1, 9, (17, 31, 1), dtype=np.uint8).repeat(3, axis=2) * 20
        pixels = preprocess.fit(image)
        mask = placed_mask(image[..., 0] // 20, preprocess.placement(17, 31), (pixels.shape[1], pixels.shape[2]))
        seen = mask != IGNORE
        assert (mask[seen] * 20 == pixels[0][seen]).float().mean() > 0.9  # where both take the nearest pixel
        assert resize != "pad" or not seen.all()


class Truth(NamedTuple):
    size: tuple[int, int]
    labels: np.ndarray
    boxes: np.ndarray
    crowd: np.ndarray
    area: np.ndarray


def truth_of(labels, boxes, crowd=None, size=(100, 100)):
    objects = Objects.of(labels, boxes)
    flags = np.zeros(len(labels), dtype=bool) if crowd is None else np.array(crowd)
    return Truth(size, objects.labels, objects.boxes, flags, objects.area)


def random_case(seed):
    random = np.random.default_rng(seed)

    def boxes(count):
        corner = random.uniform(0, 60, (count, 2))
        return np.concatenate([corner, corner + random.uniform(4, 40, (count, 2))], axis=1).astype(np.float32)

    truth, found = {}, {}
    for i in range(7):
        count = int(random.integers(0, 5))
        there = boxes(count)
        truth[i] = truth_of(random.integers(0, 3, count).tolist(), there.tolist(), random.random(count) < 0.15)
        near = there + random.normal(0, 3, there.shape).astype(np.float32)
        every = np.concatenate([near, boxes(3)])
        labels = np.concatenate([truth[i].labels, random.integers(0, 3, 3)])
        found[i] = (labels, random.random(len(every)).astype(np.float32), every)
    return truth, found


class TestMetrics:
    @pytest.mark.parametrize("seed", range(3))
    def test_average_precision_is_that_of_pycocotools(self, seed, capsys):
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        truth, found = random_case(seed)
        ours = average_precision(3, truth, found)
        whole = COCO()
        wide = lambda b: [float(b[0]), float(b[1]), float(b[2] - b[0]), float(b[3] - b[1])]  # noqa: E731
        rows = [
            {"image_id": i, "category_id": int(k) + 1, "bbox": wide(b), "iscrowd": int(c), "area": float(a)}
            for i, t in truth.items()
            for k, b, c, a in zip(t.labels, t.boxes, t.crowd, t.area, strict=True)
        ]
        whole.dataset = {
            "images": [{"id": i, "height": 100, "width": 100} for i in truth],
            "annotations": [{"id": n + 1, **row} for n, row in enumerate(rows)],
            "categories": [{"id": k + 1} for k in range(3)],
        }
        whole.createIndex()
        answers = [
            {"image_id": i, "category_id": int(k) + 1, "bbox": wide(b), "score": float(s)}
            for i, (labels, scores, boxes) in found.items()
            for k, s, b in zip(labels, scores, boxes, strict=True)
        ]
        run = COCOeval(whole, whole.loadRes(answers), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
        names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")
        wanted = {name: v for name, v in zip(names, run.stats[:9], strict=True) if v > -1}
        assert {name: ours[name] for name in names if name in ours} == pytest.approx(wanted, abs=1e-6)

    def test_average_precision_by_hand(self):
        truth = {0: truth_of([0, 0], [[0, 0, 40, 40], [50, 50, 90, 90]])}
        boxes = np.array([[0, 0, 40, 40], [60, 0, 90, 30], [50, 50, 90, 90]], dtype=np.float32)
        found = {0: (np.zeros(3, dtype=np.int64), np.array([0.9, 0.8, 0.7], dtype=np.float32), boxes)}
        # hits at ranks 1 and 3: precision 1 up to a recall of 1/2 (51 of 101 points), then 2/3 (50 of them)
        wanted = (51 + 50 * 2 / 3) / 101
        result = average_precision(1, truth, found)
        assert result["ap50"] == pytest.approx(wanted)
        assert result["class_ap50"] == [pytest.approx(wanted)]

    def test_a_size_without_objects_has_no_figure(self):
        # 31×33 = 1023 pixels, one short of "medium"; a crowd is no object
        truth = {0: truth_of([0, 0], [[0, 0, 31, 33], [0, 40, 60, 90]], crowd=[False, True])}
        missed, hit = {}, {0: (np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.float32), truth[0].boxes[:1])}
        for found in (missed, hit):
            result = average_precision(1, truth, found)
            assert result["ap_small"] == result["ap"] == result["ar_small"] == bool(found)
            assert not {"ap_medium", "ap_large", "ar_medium", "ar_large"} & set(result)

    def test_nothing_found_and_nothing_there(self):
        truth = {0: truth_of([1], [[0, 0, 10, 10]]), 1: truth_of([], [])}
        assert average_precision(2, truth, {})["ap"] == 0
        assert average_precision(2, truth, {})["class_ap"] == [None, 0.0]

    def test_intersection_over_union_is_that_of_a_loop(self):
        random = np.random.default_rng(0)
        truth, called = random.integers(0, 5, (13, 17)).astype(np.uint8), random.integers(0, 4, (13, 17))
        truth[random.random(truth.shape) < 0.1] = IGNORE
        counts = confusion(truth, called, 5)
        ours = intersection_over_union(np.concatenate([counts, np.zeros((5, 1), dtype=np.int64)], axis=1))
        for k in range(5):
            inner = union = 0
            for t, c in zip(truth.ravel().tolist(), called.ravel().tolist(), strict=True):
                if t != IGNORE:
                    inner += t == k and c == k
                    union += t == k or c == k
            assert ours[k] == pytest.approx(inner / union)
        assert np.isnan(intersection_over_union(np.zeros((2, 3), dtype=np.int64))).all()

    def test_pixels_of_images_that_cannot_be_read_are_missed(self):
        truth = np.array([[0, 1, 1], [0, IGNORE, 1]], dtype=np.uint8)

        class Same(Masks):
            def truth(self, image):
                return truth

        counts = PixelCounts(2, Same(), Preprocess(size=(2, 3), resize="squash"))
        logits = torch.zeros(1, 2, 2, 3)
        logits[0, 0], logits[0, 1, :, 1:] = 0.5, 1  # all right
        number = torch.tensor([0])
        counts.take(logits, Batch(torch.zeros(1, 3, 2, 3), None, number, number))
        assert counts.metrics() == {"miou": 1.0, "pixel_accuracy": 1.0}
        other = PixelCounts(2, Same(), counts.preprocess)
        other.refused = [("x.png", "truncated")]
        merged = counts.merge([other])
        assert merged.metrics() == {"miou": 0.5, "pixel_accuracy": 0.5}
        assert merged.evaluated == 1

    def test_objects_in_images_that_cannot_be_read_are_missed(self):
        box = [[10, 20, 50, 60]]
        truth = [truth_of([0], box), truth_of([0], box), truth_of([0], box)]
        counts = Boxes(1, truth, ["a", "b", "c"], Preprocess(size=(50, 200), resize="squash"))
        exact = torch.tensor([[[0.3, 0.4, 0.4, 0.4]]])
        number = torch.tensor([1])
        counts.take(
            Detected(torch.tensor([[[9.0, 0.0]]]), exact), Batch(torch.zeros(1, 3, 50, 200), None, number, number)
        )
        assert counts.metrics()["ap"] == pytest.approx(1)  # c was not looked at
        counts.refused = [("a", "truncated")]
        assert counts.metrics()["ap50"] == pytest.approx(51 / 101)
        assert counts.per_class(["x"])[0]["objects"] == 2
