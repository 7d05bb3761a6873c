"""Shards as users have them, and as they should not be."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sightline.datasets.check import check
from sightline.datasets.image_set import ImageSet
from sightline.datasets.open import open_dataset
from sightline.datasets.shards import split_key
from sightline.errors import UserError
from sightline.images.decode import decode

Files = dict[str, bytes]


def picture(seed: int, height: int = 9, width: int = 13) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    with io.BytesIO() as stream:
        Image.fromarray(pixels).save(stream, "PNG")
        return stream.getvalue()


def mask(value: int = 1, height: int = 9, width: int = 13) -> bytes:
    with io.BytesIO() as stream:
        Image.fromarray(np.full((height, width), value, dtype=np.uint8)).save(stream, "PNG")
        return stream.getvalue()


def pack(path: Path, files: Files, *odd: tarfile.TarInfo) -> Path:
    """A shard of files, with odd members at its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in odd:
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    return path


def info(name: str, **settings) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    for key, value in settings.items():
        setattr(made, key, value)
    return made


def packed(folder: Path, samples: list[Files], each: int = 5) -> Path:
    """Samples in shards of so many."""
    for number in range(0, len(samples), each):
        files = {name: data for sample in samples[number : number + each] for name, data in sample.items()}
        pack(folder / f"shard-{number // each:06}.tar", files)
    return folder


def labelled(count: int = 12) -> list[Files]:
    return [{f"{i:05}.png": picture(i), f"{i:05}.cls": b"%d" % (i % 2)} for i in range(count)]


def fault(path: Path, task: str = "classify") -> str:
    with pytest.raises(UserError) as caught:
        open_dataset(path, task=task)
    return str(caught.value)


def found(path: Path) -> list[tuple[str, str]]:
    """Kinds of findings of `check` with the first file of each, but for those about few and small images."""
    aside = {"tiny-class", "tiny-image", "extreme-aspect"}
    told = check(path, workers=0).findings
    return [(finding.kind, next(iter(finding.files), "")) for finding in told if finding.kind not in aside]


def keyed(images: ImageSet) -> dict[str, tuple]:
    """Of each key the pixels and the class, or the marks."""
    found = {}
    for image, target, name in images.samples:
        said = images.classes[target] if isinstance(target, int) and target >= 0 else target
        found[split_key(Path(name).name)[0]] = (decode(image), said)
    return found


def compare(folder: ImageSet, shards: ImageSet, alike) -> None:
    mine, theirs = keyed(folder), keyed(shards)
    assert folder.classes == shards.classes
    assert mine.keys() == theirs.keys()
    for key, (pixels, said) in mine.items():
        assert np.array_equal(pixels, theirs[key][0])
        assert alike(said, theirs[key][1]), key
