"""Runs hostile and awkward inputs through every entry point, and holds what happens against the promises.

    python proofs/hostile.py [DIR] [--families image,fs,archive,dataset,ckpt,config] [--keep]

DIR holds inputs with their `manifest.json` as `tests/badinputs.py` makes them; without it the public ones are made.
Each run is a forked process in an empty folder, with at most 4 GB of address space (or half a gigabyte more than the
libraries map by themselves) and, for the superuser, without the right to read what is closed. Images and odd files go
through `predict` one by one, and together through `check`, `train` (0 and 2 worker processes) and `evaluate`, where
every file's seconds and memory are measured inside the reader. An item is met if its `expect` and `check` hold, within
`max_s` and `max_mb`. No socket is opened, no module of an input imported, nothing written elsewhere, no canary left.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import stat
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["SIGHTLINE_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import torch
from confined import Said, run  # the program beside this one
from PIL import Image

import badinputs
import sightline
import sightline.images.decode as reader
from sightline.checkpoints import convert as _convert  # noqa: F401  (whatever a child needs is there before it forks)
from sightline.cli.main import main
from sightline.recipes import check as _check  # noqa: F401
from sightline.recipes import evaluate as _evaluate  # noqa: F401
from sightline.recipes import train as _train  # noqa: F401

FAMILIES = ("image", "fs", "archive", "dataset", "ckpt", "config")
CANARY = "BADINPUT_CANARY_"
TINY = {"image_size": 32, "patch_size": 16, "embed_dim": 8, "depth": 1, "num_heads": 2}
NETWORK = ("--patch-size", "8", "--image-size", "16", "--embed-dim", "8", "--depth", "1", "--num-heads", "2")
NEVER = ("Traceback", "This was not foreseen", "weights_only=False", "AttributeError", "KeyError")
"""What no message may say."""

torch.set_num_threads(1)


# The bench


@dataclass
class Bench:
    """The inputs, a place to work in, and what was met by family and entry point."""

    kit: Path
    place: Path
    items: list[dict[str, Any]]
    met: Counter[tuple[str, str]] = field(default_factory=Counter)
    total: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: dict[tuple[str, str], tuple[float, float]] = field(default_factory=lambda: defaultdict(lambda: (0.0, 0.0)))
    runs: int = 0

    def of(self, family: str) -> list[dict[str, Any]]:
        return [item for item in self.items if item["family"] == family]

    def go(self, work: Callable[[], object], *, measure: bool = False, fresh: bool = True) -> Said:
        self.runs += fresh
        return run(self.place / f"run{self.runs}", self.kit, work, measure=measure)

    def command(self, *words: object, measure: bool = False) -> Said:
        return self.go(lambda: main([str(word) for word in words]), measure=measure)

    def judge(self, item: dict[str, Any], entry: str, problems: list[str]) -> None:
        key = item["family"], entry
        self.total[key] += 1
        self.met[key] += not problems
        self.failures += [f"{item['path']} through {entry} ({item['expect']}): {problem}" for problem in problems]

    def cost(self, item: dict[str, Any], entry: str, seconds: float, megabytes: float) -> list[str]:
        """Complaints about what an item cost."""
        key = item["family"], entry
        worst = self.slowest[key]
        self.slowest[key] = max(worst[0], seconds), max(worst[1], megabytes)
        slow = [f"took {seconds:.2f} s of {item['max_s']}"] if seconds > item["max_s"] else []
        return slow + ([f"took {megabytes:.0f} MB of {item['max_mb']}"] if megabytes > item["max_mb"] else [])


def manners(said: Said) -> list[str]:
    """Complaints about what no run may do."""
    words = [f"says '{word}': {said.err.strip()[-200:]}" for word in NEVER if word in said.text]
    if said.status not in (0, 1, 2):
        words.append(f"ended with {said.status}: {said.err.strip()[-200:]}")
    return words + said.odd


def shown(name: str) -> str:
    return sightline.errors.printable(name, 10_000)


# Images and odd files


def pixels(item: dict[str, Any], path: Path) -> list[str]:
    """Complaints about the decoded image, by the item's `check`."""
    image = reader.decode(path)
    height, width = image.shape[:2]
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
    corners = {"tl": (height // 5, width // 5), "tr": (height // 5, -width // 5), "bl": (-height // 5, width // 5)}
    wrong = []
    for condition in filter(None, (item.get("check") or "").split(";")):
        key, _, value = condition.partition("=")
        if key == "size":
            good = f"{width}x{height}" == value
        elif key == "not_constant":
            good = bool(image.min() < image.max())
        elif key.startswith("mean<"):
            good = image.mean() < float(key[5:])
        else:
            good = np.abs(image[corners[key]].astype(int) - colours[value]).max() < 60
        if not good:
            wrong.append(f"check {condition} does not hold")
    return wrong


def predict(bench: Bench, model: Path) -> None:
    """Every image and odd file alone."""
    for item in [*bench.of("image"), *bench.of("fs")]:
        path = bench.kit / item["path"]
        if path.is_dir() and item["expect"] == "either":
            continue  # a folder to be listed: see the others
        said = bench.command("predict", model, path, "--json")
        problems = manners(said) + bench.cost(item, "predict", said.seconds, said.megabytes)
        results = json.loads(said.out)["results"] if said.out else []
        answered = len(results) == 1 and "predictions" in results[0]
        if item["expect"] == "accept":
            problems += [] if answered and not said.status else [f"not answered: {said.text[-200:]}"]
            problems += pixels(item, path) if answered else []
        elif item["expect"] == "reject" and (answered or said.status != 1):
            problems.append(f"answered with status {said.status}")
        refused = not answered and results
        if refused and not (results[0].get("error") and results[0]["path"] == os.fsdecode(path)):
            problems.append(f"refused without name or reason: {results}")
        bench.judge(item, "predict", problems)


def copy(source: Path, target: Path) -> None:
    """A file, folder, link or pipe as it is, closed or not."""
    mode = source.lstat().st_mode
    if stat.S_ISLNK(mode):
        target.symlink_to(source.readlink())
    elif stat.S_ISFIFO(mode):
        os.mkfifo(target)
    elif stat.S_ISDIR(mode):
        target.mkdir(exist_ok=True)
        for entry in sorted(source.iterdir()):
            copy(entry, target / entry.name)
    else:
        target.write_bytes(source.read_bytes())
        target.chmod(stat.S_IMODE(mode))


def together(bench: Bench, model: Path) -> None:
    """All images and odd files in one dataset, once per entry point."""
    data = bench.place / "mixed"
    for part in ("train", "val"):
        for label in "ab":
            (data / part / label).mkdir(parents=True)
            for i in range(8):
                (data / part / label / f"{i}.jpg").write_bytes(badinputs.jpg(badinputs.noise(ord(label) + i)))
        for family in ("image", "fs"):
            if bench.of(family):
                copy(bench.kit / family, data / part / "a" / family)
    train = ("train", data, "--model", "vit_tiny_patch16_224", *NETWORK, "--epochs", 1, "--refused-limit", 1)
    entries = {
        "check": (("check", data, "--json", "--workers", 1), (0, 2), "train"),
        "train, 0 workers": ((*train, "--workers", 0, "--out", "run", "--json"), (0,), "train"),
        "train, 2 workers": ((*train, "--workers", 2, "--out", "run", "--json"), (0,), "train"),
        "evaluate": (("evaluate", model, data, "--json", "--workers", 1), (0,), "val"),
    }
    for entry, (words, statuses, part) in entries.items():
        said = bench.command(*words, measure=True)
        general = manners(said) + ([] if said.status in statuses else [f"{entry} ended with {said.status}"])
        named = refusals(bench, entry, said)
        for item in [*bench.of("image"), *bench.of("fs")]:
            name = f"{part}/a/{item['path']}"
            if item["expect"] == "either" and (bench.kit / item["path"]).is_dir():
                problems = [p for p in general if "no end" in p]
            else:
                listed = name in named or any(shown(Path(name).name) in line for line in leftovers(said, entry))
                problems = general[:1] if said.status is None else []
                if item["expect"] == "accept" and name in named:
                    problems.append(f"refused: {named[name]}")
                hidden = Path(name).name.startswith(".") or Path(name).name.lower() == "thumbs.db"
                if item["expect"] == "reject" and not listed and not (hidden and "hidden files" in said.text):
                    problems.append("not named")
                costs = [cost for path, cost in said.read.items() if path.endswith(name)]
                for seconds, megabytes in costs:
                    problems += bench.cost(item, entry, seconds, megabytes)
            bench.judge(item, entry, problems)
        total_item = {"path": "all of them", "family": "together", "expect": "exact", "max_s": 0, "max_mb": 0}
        bench.judge(total_item, entry, general + counts(bench, data, entry, said, named))


def refusals(bench: Bench, entry: str, said: Said) -> dict[str, str]:
    """The images that a run refused, by name."""
    with contextlib.suppress(ValueError, KeyError, IndexError, OSError):
        if entry == "check":
            kinds = ("empty-file", "truncated", "over-limit", "no-image", "unreadable", "crash", "no-regular-file")
            found = json.loads(said.out)["findings"]
            return {name: f["kind"] for f in found if f["kind"] in kinds for name in f["files"]}
        if entry == "evaluate":
            return {row["path"]: row["error"] for row in json.loads(said.out)["refused"]}
        record = json.loads((bench.place / f"run{bench.runs}" / "run" / "run.json").read_text())
        return {name: why for part in ("train", "val") for name, why in record["refused"][part]}
    return {}


def leftovers(said: Said, entry: str) -> list[str]:
    """Where a run says what it did not take for images at all."""
    if entry == "check":
        found = json.loads(said.out)["findings"] if said.out else []
        return [name for f in found for name in f["files"]]
    return [line for line in said.err.splitlines() if "left out" in line or "named like images" in line]


def counts(bench: Bench, data: Path, entry: str, said: Said, named: dict[str, str]) -> list[str]:
    """Complaints about the numbers that a run ends with."""
    if entry == "check" or said.status != 0:
        return []
    document = json.loads(said.out)
    images = sum(1 for name in listed(data / "val"))
    part = [name for name in named if name.startswith("val/")]
    if sum(document["counts"].values()) != images or document["counts"]["refused"] != len(part):
        return [f"counts {document['counts']} of {images} held-out images, {len(part)} of them refused"]
    if entry == "evaluate":
        answered = sum(map(sum, document["confusion"]))
        right = sum(row[i] for i, row in enumerate(document["confusion"]))
        if abs(document["metrics"]["top1"] - right / images) > 1e-9 or answered != images - len(part):
            return [f"top-1 {document['metrics']['top1']} is not {right} of {images}"]
        if "count as wrong" not in said.text and "refused" not in said.err:
            return ["the refused are not told aloud"]
    return []


def listed(folder: Path) -> Iterator[str]:
    """Regular files that are images by name, each once, counted in another way than the program does."""
    from sightline.datasets.scan import EXTENSIONS

    for here, _, names in os.walk(folder):  # links to folders are not entered
        for name in names:
            path = Path(here) / name
            if not name.startswith(".") and name.lower().endswith(EXTENSIONS) and path.is_file():
                yield str(path)


# Archives and datasets


def datasets(bench: Bench) -> None:
    """Every archive, and every dataset as a whole."""
    lenient = ("--model", "vit_tiny_patch16_224", *NETWORK, "--epochs", 1, "--workers", 0, "--refused-limit", 1)
    for item in bench.of("archive"):
        path = bench.kit / item["path"]
        for entry, words in {
            "check": ("check", path, "--json", "--workers", 0),
            "train, 0 workers": ("train", path, *lenient, "--out", "run", "--json"),
            "train, 2 workers": ("train", path, *lenient[:-4], "--workers", 2, "--out", "run", "--json"),
        }.items():
            said = bench.command(*words, measure=True)
            problems = manners(said)
            if item["expect"] == "reject":
                problems += bench.cost(item, entry, said.seconds, said.megabytes)
                problems += [] if said.status == 2 else [f"not refused: status {said.status}"]
                problems += [] if shown(str(path)) in said.text else ["the refusal does not name it"]
            elif item["expect"] == "accept":
                problems += [] if said.status == 0 else [f"status {said.status}: {said.err[-300:]}"]
                wanted = int((item.get("check") or "files=0").removeprefix("files="))
                opened = sightline.datasets.open.open_dataset(path).together() if said.status == 0 else ()
                problems += [] if not wanted or len(opened) == wanted else [f"{len(opened)} files of {wanted}"]
            bench.judge(item, entry, problems)
    whole: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for item in bench.of("dataset"):
        root = item["path"].split("/")[1]
        whole[root].append(item)
    for root, items in whole.items():
        tables = sorted((bench.kit / "dataset" / root).glob("*.csv"))
        path = tables[0] if tables else bench.kit / "dataset" / root
        for entry, words in {
            "check": ("check", path, "--json", "--workers", 0),
            "train, 0 workers": ("train", path, *lenient, "--out", "run", "--json"),
            "train, 1 % limit": ("train", path, *lenient[:-2], "--out", "run", "--json"),
        }.items():
            said = bench.command(*words, measure=True)
            for item in items:
                name = item["path"].split("/", 2)[-1]
                problems = manners(said)
                if item["expect"] == "reject" and entry != "train, 1 % limit":
                    problems += [] if shown(name) in said.text or shown(str(path)) in said.text else ["not named"]
                if item["expect"] == "reject" and not said.status and entry != "train, 0 workers":
                    problems.append("went on as if nothing were the matter")
                if tables and item["expect"] == "reject":
                    problems += [f"line {n} is not named" for n in rows_at_fault(path) if f"line {n}" not in said.text]
                bench.judge(item, entry, problems)


def rows_at_fault(table: Path) -> list[int]:
    """The lines of a table whose image lies elsewhere, is not there, or has had another label."""
    seen: dict[str, str] = {}
    wrong = []
    for number, line in enumerate(table.read_text("utf-8-sig").splitlines()[1:], 2):
        path, label = line.split(",", 1)
        missing = ".." in path or not (table.parent / path).is_file()
        if missing or seen.setdefault(path, label) != label:
            wrong.append(number)
    return wrong


# Weights and configurations


def models(bench: Bench, trained: Path, photos: Path) -> None:
    """Every checkpoint and configuration wherever one is read."""
    image = next(photos.rglob("*.jpg"))
    name = "vit_tiny_patch16_224"
    for item in [*bench.of("ckpt"), *bench.of("config")]:
        path = bench.kit / item["path"]
        weights = item["family"] == "ckpt" and not item["path"].endswith(".json")
        if item["family"] == "config" and path.suffix == ".py":
            continue  # it lies beside the configuration that names it
        folder = bench.place / "models" / item["path"].replace("/", "_")
        folder.mkdir(parents=True)
        if weights:
            arguments = {"img_size": 32, "patch_size": 16, "embed_dim": 8, "depth": 1, "num_heads": 2}
            config = {"architecture": name, "num_classes": 4, "num_features": 8, "model_args": arguments}
            config["pretrained_cfg"] = {"input_size": [3, 32, 32], "num_classes": 4}
            (folder / "config.json").write_text(json.dumps(config))
            endings = {".safetensors": "model.safetensors", ".npz": path.name}
            shutil.copy(path, folder / endings.get(path.suffix, "pytorch_model.bin"))
        else:
            copy(path.parent, folder)
            if not (folder / "model.safetensors").exists() and item["family"] == "config":
                (folder / "model.safetensors").write_bytes(badinputs.st(hf_state()))
        source = folder / path.name if path.suffix == ".npz" else folder
        entries: dict[str, Callable[[], Said]] = {
            "load": lambda p=path, s=source, w=weights: bench.go(
                lambda: sightline.load(p, architecture=name, num_classes=4, **TINY) if w else sightline.load(s)
            ),
            "predict": lambda s=source: bench.command("predict", s, image, "--json"),
            "evaluate": lambda s=source: bench.command("evaluate", s, photos, "--workers", 0, "--json"),
            "convert": lambda s=source: bench.command("convert", s, "--to", "sightline", "--out", "out", "--json"),
            "train --weights": lambda s=source: bench.command(
                "train", photos, "--weights", s, "--epochs", 1, "--workers", 0, "--out", "run", "--json"
            ),
            "--resume": lambda p=path, w=weights: resumed(bench, trained, p, photos, weights=w),
        }
        for entry, go in entries.items():
            said = go()
            problems = manners(said)
            heavy = entry in ("train --weights", "--resume", "evaluate")  # these do more than read it
            if item["expect"] == "reject" and not heavy:
                problems += bench.cost(item, entry, said.seconds, said.megabytes)
            resuming = entry == "--resume"
            if item["expect"] == "reject" and not resuming and said.status != 2:
                problems.append(f"not refused: status {said.status}")
            if item["expect"] == "accept" and entry in ("load", "predict", "convert") and said.status != 0:
                problems.append(f"status {said.status}: {said.err.strip()[-300:]}")
            wanted = (item.get("check") or "").removeprefix("names=")
            if wanted and not resuming and entry != "train --weights" and said.status != 0 and wanted not in said.text:
                problems.append(f"does not name {wanted}: {said.err.strip()[-200:]}")
            bench.judge(item, entry, problems)


def hf_state() -> dict[str, np.ndarray]:
    """Weights that fit the configurations of the kit, under the names of transformers."""
    from sightline.checkpoints import transformers as _  # noqa: F401

    random = np.random.default_rng(0)
    inside = "vit.encoder.layer.0."
    shapes = {
        "vit.embeddings.cls_token": (1, 1, 8),
        "vit.embeddings.position_embeddings": (1, 5, 8),
        "vit.embeddings.patch_embeddings.projection.weight": (8, 3, 16, 16),
        "vit.embeddings.patch_embeddings.projection.bias": (8,),
        **{f"{inside}attention.attention.{n}.weight": (8, 8) for n in ("query", "key", "value")},
        **{f"{inside}attention.attention.{n}.bias": (8,) for n in ("query", "key", "value")},
        f"{inside}attention.output.dense.weight": (8, 8),
        f"{inside}attention.output.dense.bias": (8,),
        f"{inside}intermediate.dense.weight": (32, 8),
        f"{inside}intermediate.dense.bias": (32,),
        f"{inside}output.dense.weight": (8, 32),
        f"{inside}output.dense.bias": (8,),
        **{f"{inside}{n}.{p}": (8,) for n in ("layernorm_before", "layernorm_after") for p in ("weight", "bias")},
        "vit.layernorm.weight": (8,),
        "vit.layernorm.bias": (8,),
        "classifier.weight": (4, 8),
        "classifier.bias": (4,),
    }
    return {name: (random.standard_normal(shape) * 0.02).astype(np.float32) for name, shape in shapes.items()}


def resumed(bench: Bench, trained: Path, path: Path, photos: Path, *, weights: bool) -> Said:
    """A run that goes on, with the file in place of its newest checkpoint, or of its record and configuration."""
    bench.runs += 1
    home = bench.place / f"run{bench.runs}"
    shutil.copytree(trained, home / "run")
    places = sorted((home / "run" / "checkpoints").glob("step-*.safetensors"))[-1:] if weights else []
    for place in places or [home / "run" / "run.json", home / "run" / "config.json"]:
        shutil.copy(path, place)
    words = ["train", str(photos), "--out", "run", "--resume", "--json"]
    return bench.go(lambda: main(words), fresh=False)


# All of it


def tree(root: Path) -> dict[str, str]:
    """What lies below a folder, with the digests of what can be read."""
    found = {}
    for here, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = Path(here) / name
            mode = path.lstat().st_mode
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(mode) else ""
            found[str(path)] = f"{mode:o} {digest}"
    return found


def roots() -> set[str]:
    """Names in the root and the temporary folder, where whatever escapes would turn up."""
    return {str(path) for root in ("/", tempfile.gettempdir()) for path in Path(root).iterdir()}


def main_proof() -> int:
    """Runs the proof; 1 where anything was not met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "kit", nargs="?", help="inputs with a manifest.json; left out (or none), the public ones are made"
    )
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--keep", action="store_true", help="leave the folder of the runs")
    request = parser.parse_args()
    began = time.monotonic()
    place = Path(tempfile.mkdtemp(prefix="hostile-")).resolve()
    kit = Path(request.kit).resolve() if request.kit not in (None, "none") else place / "kit"
    if not (kit / "manifest.json").exists():
        badinputs.public(str(kit))
    families = request.families.split(",")
    items = [item for item in json.loads((kit / "manifest.json").read_text())["items"] if item["family"] in families]
    bench = Bench(kit, place, items)
    warnings.simplefilter("ignore")
    platform.platform()  # asks a program once, and remembers
    photos = bench.place / "photos"
    for part in ("train", "val"):
        for label in "abcd":
            (photos / part / label).mkdir(parents=True)
            for i in range(3):
                Image.fromarray(np.full((24, 32, 3), 40 * i + ord(label), np.uint8)).save(
                    photos / part / label / f"{i}.jpg"
                )
    two = bench.place / "two"
    for part in ("train", "val"):
        for label in "ab":
            shutil.copytree(photos / part / label, two / part / label)
    base = ("--model", "vit_tiny_patch16_224", *NETWORK, "--epochs", 2, "--workers", 0, "--batch-size", 4, "--json")
    before = {name: tree(folder) for name, folder in (("kit", kit), ("photos", photos))}
    outside = roots()
    said = bench.command("train", two, *base, "--out", "run")
    assert said.status == 0, said.text
    model = bench.place / "run1" / "run"
    if {"image", "fs"} & set(families):
        predict(bench, model)
        together(bench, model)
    if {"archive", "dataset"} & set(families):
        datasets(bench)
    if {"ckpt", "config"} & set(families):
        said = bench.command("train", photos, *base, "--out", "run", "--save-seconds", 0.000001)
        assert said.status == 0, said.text
        models(bench, bench.place / f"run{bench.runs}" / "run", photos)
    after = {name: tree(folder) for name, folder in (("kit", kit), ("photos", photos))}
    changed = [name for name in before if before[name] != after[name]]
    canaries = [name for name in (*tree(place), *roots()) if CANARY in name]
    strangers = roots() - outside
    report(bench)
    print(
        f"canaries: {len(canaries)} {canaries[:3]}; inputs changed: {changed or 'none'}; runs: {bench.runs}; "
        f"new names in / and the temporary folder (of others, perhaps): {len(strangers)}; "
        f"{time.monotonic() - began:.0f} s"
    )
    if not request.keep:
        shutil.rmtree(place, ignore_errors=True)
    return 1 if bench.failures or canaries or changed else 0


def report(bench: Bench) -> None:
    """The table, and every failure."""
    print(f"{'family':10} {'entry point':18} {'met':>9}   {'slowest':>8} {'largest':>8}")
    for (family, entry), total in bench.total.items():
        seconds, megabytes = bench.slowest[family, entry]
        cost = f"{seconds:7.2f}s {megabytes:6.0f}MB" if seconds else ""
        print(f"{family:10} {entry:18} {bench.met[family, entry]:4}/{total:<4}   {cost}")
    for failure in bench.failures:
        print(f"  {shown(failure)[:400]}")


if __name__ == "__main__":
    sys.exit(main_proof())
