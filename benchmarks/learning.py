"""Learning from little in a few minutes: `sightline train DATA --minutes M` beside what people start with elsewhere.

    python benchmarks/learning.py [--minutes 1] [--sets digits photographs shapes spirals] [--seeds 0 1 2]

Contenders, each in a process of its own with the same wall-clock, all included but the drawing of the set:
`sightline` is told the folder and the minutes, nothing else. `trainer` is transformers' Trainer at its defaults (AdamW
at 5e-5, linear fall, batches of 8) on a ViT of tiny size. `timm` is a usual loop around timm's ViT of the same size:
AdamW at 5e-4 with weight decay and cosine, batches of 64, timm's own training transforms. Both networks are made for
the size of the images (64 pixels, patches of 8), without which they would be slower still. `neighbours` is k-nearest
neighbours on pixels, with the k of 1, 3 and 5 that is best on the training images themselves. With `--cores` contenders
run side by side, each on one core. Prints a table of accuracies, and every run as a line of JSON before it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import small_sets

SIDE, PATCH = 64, 8


def _arrays(folder: Path, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, side, side, 3] of a part and their classes."""
    from PIL import Image

    labels = sorted(path.name for path in folder.iterdir())
    images, targets = [], []
    for target, label in enumerate(labels):
        for file in sorted((folder / label).iterdir()):
            with Image.open(file) as image:
                images.append(np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)))
            targets.append(target)
    return np.stack(images), np.array(targets)


def sightline(data: Path, minutes: float, seed: int, out: Path) -> float:
    """The command, told nothing but the folder and the time."""
    words = [sys.executable, "-m", "sightline", "train", data, "--minutes", minutes, "--seed", seed, "--out", out]
    done = subprocess.run([*map(str, words), "--json", "--quiet"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["metrics"]["top1"]


def trainer(data: Path, minutes: float, seed: int, out: Path) -> float:
    """Trainer's defaults, with as many steps as the time allows at the pace of the first."""
    import torch
    import transformers
    from torch.utils.data import TensorDataset

    transformers.logging.set_verbosity_error()
    transformers.set_seed(seed)
    (train, train_targets), (val, val_targets) = (_arrays(data / part, SIDE) for part in ("train", "val"))
    pixels, judged = (torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1 for x in (train, val))
    config = transformers.ViTConfig(
        hidden_size=192,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=SIDE,
        patch_size=PATCH,
        num_labels=int(train_targets.max()) + 1,
    )
    model = transformers.ViTForImageClassification(config)

    def arguments(steps: int) -> Any:
        return transformers.TrainingArguments(
            str(out), max_steps=steps, seed=seed, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True
        )

    def teach(model: Any, steps: int) -> float:
        began = time.monotonic()
        dataset = TensorDataset(pixels, torch.from_numpy(train_targets))
        transformers.Trainer(model, arguments(steps), train_dataset=dataset, data_collator=_collate).train()
        return (time.monotonic() - began) / steps

    pace = teach(transformers.ViTForImageClassification(config), 8)
    teach(model, max(int((60 * minutes - _spent()) / pace), 1))
    with torch.no_grad():
        answers = torch.cat([model.eval()(part).logits.argmax(dim=1) for part in judged.split(64)])
    return float((answers.numpy() == val_targets).mean())


def _collate(samples: list) -> dict:
    import torch

    pixels, labels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(pixels), "labels": torch.stack(labels)}


def timm(data: Path, minutes: float, seed: int, out: Path) -> float:
    """A loop as in timm's examples."""
    import torch
    from PIL import Image
    from timm import create_model
    from timm.data import create_transform
    from timm.optim import create_optimizer_v2

    torch.manual_seed(seed)
    train, train_targets = _arrays(data / "train", SIDE)
    val, val_targets = _arrays(data / "val", SIDE)
    model = create_model(
        "vit_tiny_patch16_224", img_size=SIDE, patch_size=PATCH, num_classes=int(train_targets.max()) + 1
    )
    vary, plain = (create_transform(SIDE, is_training=varied, crop_pct=1.0) for varied in (True, False))
    optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-4, weight_decay=0.05)
    images, targets = [Image.fromarray(image) for image in train], torch.from_numpy(train_targets)
    step, share, batch = 0, 0.0, min(64, len(images))
    order = torch.randperm(len(images))
    while share < 1:
        place = step * batch % (len(images) - batch + 1)
        order = torch.randperm(len(images)) if place < batch else order
        chosen = order[place : place + batch]
        share = _spent() / (60 * minutes)
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * min(share / 0.05, 0.5 * (1 + np.cos(np.pi * min(share, 1))))
        pixels = torch.stack([vary(images[i]) for i in chosen.tolist()])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(pixels), targets[chosen], label_smoothing=0.1).backward()
        optimizer.step()
        step += 1
    judged = torch.stack([plain(Image.fromarray(image)) for image in val])
    with torch.no_grad():
        answers = torch.cat([model.eval()(part).argmax(dim=1) for part in judged.split(64)])
    return float((answers.numpy() == val_targets).mean())


def neighbours(data: Path, minutes: float, seed: int, out: Path) -> float:
    """The nearest images by their pixels."""
    from sklearn.model_selection import GridSearchCV
    from sklearn.neighbors import KNeighborsClassifier

    (train, targets), (val, wanted) = (_arrays(data / part, 32) for part in ("train", "val"))
    search = GridSearchCV(KNeighborsClassifier(), {"n_neighbors": [1, 3, 5]})
    search.fit(train.reshape(len(train), -1) / 255, targets)
    return float((search.predict(val.reshape(len(val), -1) / 255) == wanted).mean())


CONTENDERS = {f.__name__: f for f in (sightline, trainer, timm, neighbours)}


def _spent() -> float:
    """Seconds since this process began."""
    ticks = float(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def contend(name: str, data: Path, minutes: float, seed: int, core: int | None) -> dict[str, Any]:
    """One contender on one set, in a fresh process on a core of its own where one is named."""
    pinned = ["taskset", "-c", str(core)] if core is not None else []
    with tempfile.TemporaryDirectory() as out:
        words = [*pinned, sys.executable, __file__, "--one", name, data, "--minutes", minutes, "--seeds", seed]
        began = time.monotonic()
        environment = os.environ | ({"OMP_NUM_THREADS": "1"} if pinned else {})
        done = subprocess.run(
            [*map(str, words), "--out", f"{out}/run"], capture_output=True, text=True, env=environment, check=False
        )
    if done.returncode:
        sys.exit(f"{name} on {data}: {done.stderr[-2000:]}")
    spent = round(time.monotonic() - began, 1)
    found = {"contender": name, "set": data.name, "seed": seed, "top1": float(done.stdout.split()[-1]), "s": spent}
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    """Runs everything, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--sets", nargs="+", default=["digits", "photographs", "shapes", "spirals"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cores", type=int, default=0, help="run so many side by side, each on a core")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    request = parser.parse_args()
    if request.one:
        print(CONTENDERS[request.one[0]](Path(request.one[1]), request.minutes, request.seeds[0], request.out))
        return
    cores = Queue[int | None]()
    for core in range(request.cores) if request.cores else [None]:
        cores.put(core)

    def run(name: str, data: Path, seed: int) -> dict[str, Any]:
        core = cores.get()
        try:
            return contend(name, data, request.minutes, seed, core)
        finally:
            cores.put(core)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max(request.cores, 1)) as pool:
        data = {(n, s): small_sets.write(n, Path(folder) / f"{s}" / n, s) for n in request.sets for s in request.seeds}
        runs = [(name, data[place], place[1]) for place in data for name in CONTENDERS]
        found = list(pool.map(lambda arguments: run(*arguments), runs))
    print(f"| set | {' | '.join(CONTENDERS)} |\n|---|{'---|' * len(CONTENDERS)}")
    for name in request.sets:
        cells = []
        for contender in CONTENDERS:
            values = [100 * f["top1"] for f in found if (f["set"], f["contender"]) == (name, contender)]
            cells.append(f"{statistics.mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
