"""Draws a dataset, plants faults and leaks of every kind, and counts what `sightline check` finds and invents.

    python proofs/check.py [--count N] [--seed N] [--keep FOLDER] [--html FILE]

Of the drawn images many are alike without being the same: moved objects on one ground, twins of other colours, pages
of text, gradients, flat pictures with a little noise. Exits with status 1 where a fault is missed or one is invented.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

CLASSES = ("bird", "boat", "cup", "dial", "house", "leaf", "page", "star")
Picture = Image.Image


def colour(random: np.random.Generator) -> tuple[int, int, int]:
    """Any colour."""
    red, green, blue = random.integers(0, 256, 3).tolist()
    return red, green, blue


def draw(seed: int, index: int) -> Picture:
    """One picture, unlike all others; every twentieth differs from the one before by little."""
    sibling = index % 20 == 1
    random = np.random.default_rng([seed, index - sibling])
    width, height = random.integers(72, 200, 2).tolist()
    kind = index // 20 % 6 if index % 20 < 2 else index % 6
    if kind == 0:  # objects in a landscape of noise
        small = random.normal(128, 60, (height // 12 + 2, width // 12 + 2, 3)).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    elif kind == 1:  # a ground of one colour
        image = Image.new("RGB", (width, height), colour(random))
    elif kind == 2:  # a gradient
        ends = random.integers(0, 256, (2, 3))
        share = np.linspace(0, 1, width)[None, :, None] * np.ones((height, 1, 1))
        image = Image.fromarray((ends[0] * (1 - share) + ends[1] * share).astype(np.uint8))
    elif kind == 3:  # a page
        image = Image.new("RGB", (width, height), "white")
        for y in range(6, height - 12, 12):
            words = "".join(random.choice(list("abcdefghi klmnop rstu "), width // 7))
            ImageDraw.Draw(image).text((6, y), words, fill="black")
    elif kind == 4:  # noise
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
    else:  # grain on one colour
        grain = random.normal(random.integers(40, 215, 3), 12, (height, width, 3))
        image = Image.fromarray(grain.clip(0, 255).astype(np.uint8))
    if kind in (0, 1, 2, 5):
        for _ in range(int(random.integers(2, 5))):
            _shape(ImageDraw.Draw(image), random, width, height, sibling)
    elif sibling:
        ImageDraw.Draw(image).ellipse((width // 3, height // 3, width // 3 + 24, height // 3 + 24), fill=colour(random))
    return image


def _shape(drawing: ImageDraw.ImageDraw, random: np.random.Generator, width: int, height: int, moved: bool) -> None:
    side = int(random.integers(14, 48))
    x, y = int(random.integers(0, width - 20)), int(random.integers(0, height - 20))
    paint = colour(random)
    if moved:
        x, y, paint = x + 10, y - 6, (255 - paint[0], paint[2], paint[1])
    box = (x, y, x + side, y + side * 2 // 3)
    (drawing.rectangle, drawing.ellipse)[int(random.integers(2))](box, fill=paint)


def saved(image: Picture, kind: str, **settings: Any) -> bytes:
    """The bytes of a file."""
    buffer = BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def again(image: Picture, way: int) -> bytes:
    """The same picture saved anew, in one of eight ways."""
    width, height = image.size
    ways: list[Callable[[], bytes]] = [
        lambda: saved(image, "JPEG", quality=70),
        lambda: saved(image, "JPEG", quality=88, subsampling=0, optimize=True),
        lambda: saved(image, "WEBP", quality=80),
        lambda: saved(image.resize((width * 9 // 10, height * 9 // 10), Image.Resampling.BICUBIC), "PNG"),
        lambda: saved(image.resize((width * 2, height * 2), Image.Resampling.LANCZOS), "JPEG", quality=90),
        lambda: saved(ImageEnhance.Brightness(image).enhance(0.92), "PNG"),
        lambda: saved(ImageEnhance.Contrast(image).enhance(0.93), "JPEG", quality=90),
        lambda: saved(ImageEnhance.Brightness(image.resize((width * 3 // 4, height * 3 // 4))).enhance(0.95), "PNG"),
    ]
    return ways[way % len(ways)]()


class Set:
    """A folder of drawn images in parts and classes, and what was planted: groups of files by kind of finding."""

    def __init__(self, root: Path, count: int, seed: int):
        self.root, self.seed, self.next = root, seed, 0
        self.planted: dict[str, list[frozenset[str]]] = defaultdict(list)
        for part, share in (("train", 0.7), ("val", 0.2), ("test", 0.1)):
            for _ in range(round(count * share)):
                self.add(part)

    def add(self, part: str = "train", label: str | None = None, *, scene: bool = False) -> tuple[str, Picture]:
        """One more sound image: its name and picture; `scene` asks for one that small changes do not spoil."""
        number = self.next
        while scene and (number % 20 < 2 or number % 6 > 1):
            number += 1
        self.next = number + 1
        image, lossless = draw(self.seed, number), number % 3 == 0
        name = f"{part}/{label or CLASSES[number % len(CLASSES)]}/{number:06}.{'png' if lossless else 'jpg'}"
        data = saved(image, "PNG", compress_level=1) if lossless else saved(image, "JPEG", quality=92)
        self.put(name, data)
        return name, image

    def put(self, name: str, data: bytes) -> str:
        """Writes a file."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return name

    def plant(self, kind: str, *names: str) -> None:
        """Notes that these files together are one finding."""
        self.planted[kind].append(frozenset(names))

    def spoil(self, kind: str, name: str, data: bytes) -> None:
        """A file that is a finding by itself."""
        self.plant(kind, self.put(name, data))

    def fresh(self) -> tuple[Picture, str]:
        """A picture, and a name without its ending."""
        number, self.next = self.next, self.next + 1
        return draw(self.seed, number), f"train/{CLASSES[number % len(CLASSES)]}/{number:06}"


def plant_files(made: Set, times: int) -> None:
    """Files that cannot be read, or are not what they seem."""
    for i in range(times):
        whole = saved(made.fresh()[0].resize((160, 120)), "JPEG", quality=90)
        made.spoil("empty-file", f"{made.fresh()[1]}.jpg", b"")
        made.spoil("truncated", f"{made.fresh()[1]}.jpg", whole[: len(whole) * (30 + 13 * i % 65) // 100])
        image, name = made.fresh()
        half = saved(image, "PNG")
        made.spoil("truncated", f"{name}.png", half[: len(half) * 2 // 3])
        made.spoil("no-image", f"{made.fresh()[1]}.png", b"<html><script>alert(1)</script></html>" * (i + 1))
        image, name = made.fresh()
        data = bytearray(saved(image, "PNG"))
        data[data.index(b"IDAT") + 20] ^= 255
        made.spoil("unreadable", f"{name}.png", bytes(data))
        made.spoil("over-limit", f"{made.fresh()[1]}.png", _bomb())
        image, name = made.fresh()
        made.spoil("mislabelled", f"{name}.jpg", saved(image, "PNG"))
        image, name = made.fresh()
        made.spoil("unnamed-image", f"{name}.dat", saved(image, "PNG"))
        made.spoil("other-file", f"{made.fresh()[1]}.txt", b"a remark")
        made.spoil("hidden", f"{os.path.dirname(made.fresh()[1])}/.cache{i}.jpg", b"x")  # noqa: PTH120
        image, name = made.fresh()
        made.spoil("loose", f"train/loose{i}.jpg", saved(image, "JPEG"))
        name = f"{made.fresh()[1]}.jpg"
        (made.root / name).symlink_to("/nowhere/x.jpg" if i % 2 else (made.root / name).name)
        made.plant("no-regular-file", name)
        name = f"{made.fresh()[1]}.jpg"
        os.mkfifo(made.root / name)
        made.plant("no-regular-file", name)
        name = f"{made.fresh()[1]}.jpg"
        (made.root / name).mkdir()
        made.plant("folder-like-image", name)


def _bomb() -> bytes:
    """A PNG that says it has 900 million pixels."""
    header = (30_000).to_bytes(4, "big") * 2 + bytes((1, 0, 0, 0, 0))
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(4000))), (b"IEND", b""))
    chunks = (len(d).to_bytes(4, "big") + k + d + zlib.crc32(k + d).to_bytes(4, "big") for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def plant_looks(made: Set, times: int) -> None:
    """Sound images of odd size, mode or orientation."""
    turned = Image.Exif()
    turned[0x0112] = 6
    for _ in range(times):
        image, name = made.fresh()
        made.spoil("orientation", f"{name}.jpg", saved(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=turned))
        image, name = made.fresh()
        made.spoil("tiny-image", f"{name}.png", saved(image.resize((9, 8)), "PNG"))
        image, name = made.fresh()
        made.spoil("extreme-aspect", f"{name}.png", saved(image.resize((700, 40)), "PNG"))
        image, name = made.fresh()
        made.spoil("several-frames", f"{name}.gif", _animation(image, made.fresh()[0]))
        made.plant("mode", f"{name}.gif")
        for mode in ("L", "LA", "RGBA", "P", "1", "CMYK"):
            image, name = made.fresh()
            kind = "JPEG" if mode == "CMYK" else "PNG"
            made.spoil("mode", f"{name}.{'jpg' if mode == 'CMYK' else 'png'}", saved(image.convert(mode), kind))
        image, name = made.fresh()
        deep = np.asarray(image.convert("L")).astype(np.uint16) * 257
        made.spoil("mode", f"{name}.png", saved(Image.fromarray(deep), "PNG"))
    for i in range(min(times, 5)):
        _, name = made.fresh()
        made.spoil("blank", f"{name}.png", saved(Image.new("RGB", (90 + i, 80), (20 * i, 30, 200)), "PNG"))
    image, name = made.fresh()
    made.spoil("large-image", f"{name}.jpg", saved(image.resize((1500, 1200), Image.Resampling.BICUBIC), "JPEG"))


def _animation(first: Picture, second: Picture) -> bytes:
    return saved(first, "GIF", save_all=True, append_images=[second.resize(first.size)], duration=50)


def plant_copies(made: Set, times: int) -> None:
    """The same and nearly the same images: within a part, across parts, and with another label."""
    for i in range(times):
        for kind, part, label in (
            ("duplicate", "train", None),
            ("leak", "val", None),
            ("leak", "test", None),
            ("contradiction", "train", "other"),
        ):
            name, _ = made.add("train", "cup")
            copy = f"{part}/{'cup' if label is None else 'dial'}/copy-{made.next:06}{Path(name).suffix}"
            made.plant(kind, name, made.put(copy, _same(made.root / name, i)))
            name, image = made.add("train", "cup", scene=True)
            data = again(image, i)
            suffix = {b"\x89P": "png", b"\xff\xd8": "jpg", b"RI": "webp"}[data[:2]]
            copy = f"{part}/{'cup' if label is None else 'dial'}/near-{made.next:06}.{suffix}"
            made.plant(f"near-{kind}", name, made.put(copy, data))


def _same(file: Path, way: int) -> bytes:
    """The same pixels, in the same bytes or in others."""
    data = file.read_bytes()
    if way % 2 == 0:
        return data
    if file.suffix == ".png":
        return saved(Image.open(file), "PNG", compress_level=7)
    return data[:2] + b"\xff\xfe\x00\x0cmade again" + data[2:]  # a JPEG comment


def plant_names(made: Set, times: int) -> None:
    """Names of classes and files that are wrong, and classes of odd size."""
    for i in range(times):
        for pair in ((f"Name{i}.png", f"name{i}.PNG"), (f"é{i}.png", unicodedata.normalize("NFD", f"é{i}.png"))):
            names = [made.put(f"train/leaf/{name}", saved(made.fresh()[0], "PNG")) for name in pair]
            made.plant("file-names", *names)
    for part in ("train", "val", "test"):
        (made.root / part / "empty").mkdir()
    for _ in range(4):
        made.add("train", "rare")
    made.add("val", "rare")
    made.add("test", "rare")
    made.add("val", "unheard")
    made.add("train", "Bird")
    made.planted |= {kind: [frozenset()] for kind in ("imbalance", "unused-folder")}
    made.planted |= {
        "empty-class": [frozenset()] * 3,
        "classes-differ": [frozenset()] * 2,
        "class-names": [frozenset()],
    }
    made.planted["tiny-class"] = [frozenset()]
    refused = sum(len(made.planted[kind]) for kind in REFUSED)
    if refused > 0.01 * len(list(made.root.glob("train/*/*"))):
        made.planted["refused-share"] = [frozenset()]
    made.put("notes/readme.txt", b"")
    made.plant("other-file", "notes/readme.txt")


REFUSED = ("empty-file", "truncated", "no-image", "unreadable", "over-limit")
SUMMED = (
    "mode",
    "orientation",
    "several-frames",
    "hidden",
    "other-file",
    "unnamed-image",
    "loose",
    "folder-like-image",
)


def compared(
    planted: dict[str, list[frozenset[str]]], findings: list[dict[str, Any]]
) -> dict[str, tuple[int, int, int]]:
    """Of each kind: how many faults were planted, how many of these were found, and how many findings are invented."""
    found: dict[str, list[frozenset[str]]] = defaultdict(list)
    for finding in findings:
        kind, files = finding["kind"], finding["files"]
        if kind in SUMMED:  # one finding tells of many files
            found[kind] += [frozenset([name]) for name in files]
        else:
            found[kind].append(frozenset(files if any(planted.get(kind, ())) else ()))
    rows = {}
    for kind in sorted({*planted, *found}):
        left, hits = list(found[kind]), 0
        for fault in planted.get(kind, []):
            if fault in left:
                left.remove(fault)
                hits += 1
        rows[kind] = len(planted.get(kind, [])), hits, len(left)
    return rows


def memory(process: int) -> int:
    """Bytes that a process and its children hold together; shared pages count once."""
    total = 0
    for pid in [process, *_children(process)]:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:")), 0)
    return total


def _children(process: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def run(folder: Path, *options: str) -> tuple[int, dict[str, Any], float, int]:
    """Runs the command: its status, its document, seconds and peak memory in bytes."""
    began, peak = time.monotonic(), 0
    command = [sys.executable, "-m", "sightline", "check", str(folder), "--json", "--quiet", *options]
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out)
        over = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not over.wait(0.2):
                peak = max(peak, memory(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        status = process.wait()
        over.set()
        watcher.join()
        seconds = time.monotonic() - began
        out.seek(0)
        return status, json.loads(out.read()), seconds, peak


def main() -> int:
    """Makes the set, checks it, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="sound images to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where to leave the dataset")
    parser.add_argument("--html", help="write the page of the findings")
    request = parser.parse_args()
    folder = request.keep or Path(tempfile.mkdtemp(prefix="sightline-check-"))
    try:
        made = Set(folder, request.count, request.seed)
        times = max(min(request.count // 500, 8), 2)
        for plant in (plant_files, plant_looks, plant_copies, plant_names):
            plant(made, times)
        status, document, seconds, peak = run(folder, *(["--html", request.html] if request.html else []))
    finally:
        if request.keep is None:
            shutil.rmtree(folder)
    rows = compared(made.planted, document["findings"])
    print(f"{'kind':20} {'planted':>8} {'found':>6} {'invented':>9}")
    for kind, (planted, found, invented) in rows.items():
        print(f"{kind:20} {planted:8} {found:6} {invented:9}{'' if planted == found and not invented else '  <--'}")
    planted, found, invented = (sum(row[i] for row in rows.values()) for i in range(3))
    print(f"{'together':20} {planted:8} {found:6} {invented:9}")
    counts = document["counts"]
    rate = counts["images"] / seconds
    print(f"{counts['images']:,} images in {seconds:.1f} s ({rate:.0f}/s), {peak / 2**20:.0f} MiB, status {status}")
    return 0 if planted == found and not invented and status == 2 else 1


if __name__ == "__main__":
    raise SystemExit(main())
