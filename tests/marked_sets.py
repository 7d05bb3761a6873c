"""Scenes as other tools would write them: COCO's JSON and folders of masks."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as tool

from sightline.datasets.scenes import SHAPES, scene

IDS = {name: 7 * i + 3 for i, name in enumerate(reversed(SHAPES))}
"""Ids of categories with gaps, in another order than that of the names."""


def packed(mask: np.ndarray) -> str:
    """A mask as COCO's text of run lengths, by pycocotools."""
    return tool.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


def runs(mask: np.ndarray) -> list[int]:
    """A mask as plain run lengths, column by column, beginning with those of 0."""
    flat = mask.T.reshape(-1).astype(np.int8)
    ends = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *ends.tolist(), len(flat)]).tolist()
    return lengths if flat[0] == 0 else [0, *lengths]


def write_coco(folder: Path, train: int = 24, val: int = 8, *, size: int = 64) -> Path:
    """`train.json` and `val.json` beside `images`; some boxes are left to run lengths."""
    (folder / "images").mkdir(parents=True)
    for part, numbers in (("train", range(train)), ("val", range(train, train + val))):
        images, annotations = [], []
        for number in numbers:
            pixels, found = scene(0, number, size=size)
            name = f"{number:04}.png"
            Image.fromarray(pixels).save(folder / "images" / name)
            images.append({"id": 1000 + number, "file_name": name, "height": size, "width": size, "license": 1})
            for label, box in zip(found.objects.labels, found.objects.boxes, strict=True):
                left, top, right, bottom = box.tolist()
                inside = np.zeros((size, size), dtype=np.uint8)
                inside[int(top) : int(bottom), int(left) : int(right)] = 1
                row = {
                    "id": len(annotations) + 1,
                    "image_id": 1000 + number,
                    "category_id": IDS[SHAPES[label]],
                    "iscrowd": 0,
                    "area": float(inside.sum()),
                    "bbox": [left, top, right - left, bottom - top],
                }
                if len(annotations) % 3 == 1:
                    del row["bbox"]
                    row["segmentation"] = {"size": [size, size], "counts": packed(inside)}
                if len(annotations) % 3 == 2:
                    del row["bbox"]
                    row["segmentation"] = {"size": [size, size], "counts": runs(inside)}
                annotations.append(row)
        document = {
            "info": {},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": key, "name": name, "supercategory": "shape"} for name, key in IDS.items()],
        }
        (folder / f"{part}.json").write_text(json.dumps(document))
    return folder


def write_masks(folder: Path, count: int = 24, *, kind: str = "L", size: int = 64) -> Path:
    """`images` and `masks` with `classes.txt`; masks grey ("L"), with a palette ("P") or of 16 bits ("I;16")."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    (folder / "classes.txt").write_text("\n".join(("background", *SHAPES)) + "\n")
    for number in range(count):
        pixels, found = scene(0, number, size=size)
        Image.fromarray(pixels).save(folder / "images" / f"{number:04}.png")
        cells = found.pixels.copy()
        cells[0, :3] = 255
        if kind == "I;16":
            mask = Image.fromarray(np.where(cells == 255, 65535, cells).astype(np.uint16))
        else:
            mask = Image.fromarray(cells)
        if kind == "P":
            mask = mask.convert("P")
            mask = Image.fromarray(cells, mode="P") if np.asarray(mask).max() != 255 else mask
            mask.putpalette([value for i in range(256) for value in (i * 37 % 256, i * 91 % 256, i * 53 % 256)])
        mask.save(folder / "masks" / f"{number:04}.png")
    return folder
