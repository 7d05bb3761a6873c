"""Hostile and awkward inputs through every entry point, by their families, and what is wrong with what happens."""

import contextlib
import json
import os
import shutil
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench import Bench, manners, shown
from confined import Said

import badinputs
import sightline
import sightline.images.decode as reader
from sightline.cli.main import main

TINY = {"image_size": 32, "patch_size": 16, "embed_dim": 8, "depth": 1, "num_heads": 2}
NETWORK = ("--patch-size", "8", "--image-size", "16", "--embed-dim", "8", "--depth", "1", "--num-heads", "2")


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
