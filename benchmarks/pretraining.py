"""What learning without labels gives: tables of features, of labels saved, of speed, and of teachers.

    python benchmarks/pretraining.py features [--sets digits photographs] [--only mae dino] [--seeds 3] [--minutes 1]
    python benchmarks/pretraining.py labels | teachers | speed …

Every figure is of held-out images. `features`: nearest neighbours (k = 20) and ten labels a class (least squares), of
raw pixels, of the same network with random weights, and of the network that an objective taught. `labels`: training
with ten labels a class from random weights, from those that ship, and from each. `teachers`: a student with a
distillation token, with and without its teacher. `speed`: ratios, both sides in turn in one process.

What lies in `--home` is judged as it is: a run of `features` that was stopped goes on, and `labels` begins with its
models.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import small_sets
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import one_hot

import sightline
from sightline.datasets.image_set import ImageSet
from sightline.datasets.loader import OrderedLoader
from sightline.datasets.open import open_dataset
from sightline.datasets.split import Splits
from sightline.evaluation.few_shot import SEEDS, SWEEP, choose, solve
from sightline.evaluation.knn import knn_accuracy
from sightline.images.decode import decode
from sightline.layers.dense import fast_products
from sightline.recipes.pretrain import pretrain
from sightline.types import Batch

SHOTS = 10
SHIPPED = "builtin:tiny"
OBJECTIVES = ["mae", "beit", "masked-patch", "simmim", "dino"]


def opened(name: str, home: Path, seed: int) -> tuple[str, Splits]:
    """A set as a path, and its splits."""
    if name == "digits":
        return "builtin:digits", open_dataset("builtin:digits", seed=seed)
    folder = home / f"{name}-{seed}"
    if not folder.exists():
        small_sets.write(name, folder, seed)
    return str(folder), open_dataset(folder, seed=seed)


def features(images: ImageSet, model: sightline.Model, read: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """What `read` makes of the pixels of each image, and its class."""
    vectors, labels = [], []
    with torch.inference_mode():
        for _, batch, _ in OrderedLoader(images, model.preprocess, batch_size=128):
            assert batch is not None
            vectors.append(read(batch.pixels).float())
            labels.append(batch.targets)
    return torch.cat(vectors), torch.cat(labels)


def ten_shot(known: Tensor, labels: Tensor, asked: Tensor, wanted: Tensor, seed: int) -> float:
    """Least squares to ±1 targets on ten labelled images a class, the mean of five choices of these.

    Of the penalties of the package's sweep that one counts whose predictions for each of these images, had it been left
    out, are nearest to its targets: what is a little for thousands of pixels is much for a few features.
    """
    scores, classes = [], int(labels.max()) + 1
    for choice in range(seed, seed + SEEDS):
        rows = choose(labels, classes, SHOTS, choice)
        standard, weights = solve(known[rows], labels[rows], classes, SWEEP)
        x, y = standard(known[rows]), 2 * one_hot(labels[rows], classes).double() - 1
        values, vectors = torch.linalg.eigh(x @ x.T)
        amiss = []
        for penalty in SWEEP:
            kept = (vectors * (penalty / (values.clamp(min=0) + penalty))) @ vectors.T  # what a fit leaves of y
            amiss.append(float(((kept @ y) / kept.diagonal()[:, None]).square().mean()))
        best = weights[int(np.argmin(amiss))]
        scores.append(float(((standard(asked) @ best).argmax(dim=1) == wanted).float().mean()))
    return statistics.fmean(scores)


def judged(splits: Splits, model: sightline.Model, read: Callable[[Tensor], Tensor], seed: int) -> tuple[float, float]:
    """Accuracy of nearest neighbours and of ten labels a class."""
    known, asked = (features(images, model, read) for images in (splits.train, splits.val))
    return knn_accuracy(*known, *asked), ten_shot(*known, *asked, seed)


def taught(data: str, objective: str, out: Path, seed: int, minutes: float) -> Path:
    """The model directory of a run, which is only begun where it is not there yet."""
    if not out.exists():
        pretrain(data, objective=objective, out=out, seed=seed, minutes=minutes, workers=0)
    return out


def compare(request: argparse.Namespace, home: Path) -> None:
    """The table of features."""
    rows: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for name in request.sets:
        for seed in range(request.seeds):
            data, splits = opened(name, home, seed)
            for objective in request.only:
                out = home / f"{name}-{objective}-{seed}"
                model = sightline.load(taught(data, objective, out, seed, request.minutes))
                rows.setdefault((name, objective), []).append(judged(splits, model, model.network.eval().embed, seed))
                torch.manual_seed(seed)
                random = model.network.architecture.build().eval()
                as_random = judged(splits, model, random.embed, seed)
                rows.setdefault((name, f"{objective}, random"), []).append(as_random)
                if objective == request.only[0]:
                    flat = judged(splits, model, lambda pixels: pixels.flatten(1), seed)
                    rows.setdefault((name, "raw pixels"), []).append(flat)
                print(f"{name} {objective} seed {seed}: {rows[name, objective][-1]}", flush=True)
    print(f"\n{'set':12} {'features':20} {'kNN':>16} {'10 labels':>16}   {request.seeds} seeds, {request.minutes} min")
    for (name, what), scores in sorted(rows.items()):
        print(f"{name:12} {what:20} {told([s[0] for s in scores]):>16} {told([s[1] for s in scores]):>16}")


def told(scores: list[float]) -> str:
    """Mean and standard deviation in percent."""
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    return f"{100 * statistics.fmean(scores):.1f} ± {100 * spread:.1f}"


def write(images: ImageSet, folder: Path) -> None:
    """Writes a set as a folder of classes."""
    for number, (image, target, _) in enumerate(images.samples):
        file = folder / images.classes[target] / f"{number:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(decode(image)).save(file)


def labels(request: argparse.Namespace, home: Path) -> None:
    """The table of training with ten labels a class."""
    rows: dict[tuple[str, str], list[float]] = {}
    for name in request.sets:
        for seed in range(request.seeds):
            data, splits = opened(name, home, seed)
            chosen = choose(torch.from_numpy(splits.train.targets), len(splits.train.classes), SHOTS, seed)
            few = home / f"{name}-few-{seed}"
            write(splits.train.select(np.sort(chosen.numpy())), few / "train")
            write(splits.val, few / "val")
            for start in ["scratch", SHIPPED, *request.only]:
                given: dict[str, Any] = {"weights": SHIPPED} if start == SHIPPED else {}
                if start in OBJECTIVES:
                    out = home / f"{name}-{start}-{seed}"
                    given["weights"] = taught(data, start, out, seed, request.minutes)
                out = home / f"{name}-{start.rpartition(':')[2]}-{seed}-tuned"
                done = sightline.train(few, out=out, seed=seed, minutes=request.minutes, workers=0, **given)
                rows.setdefault((name, start), []).append(done.metrics["top1"])
                print(f"{name} from {start} seed {seed}: {done.metrics['top1']:.4f}", flush=True)
    print(f"\n{'set':12} {'start':16} {'top-1':>16}   ten labels a class, {request.seeds} seeds, {request.minutes} min")
    for (name, what), scores in sorted(rows.items()):
        print(f"{name:12} {what:16} {told(scores):>16}")


def teachers(request: argparse.Namespace, home: Path) -> None:
    """The table of students that learn as long from labels alone, from a teacher's answers, and as the recipe does."""
    ways: dict[str, dict[str, Any]] = {
        "labels alone": {"alpha": 0.0},
        "teacher, hard": {"kind": "hard"},
        "teacher, soft": {},
    }
    rows: dict[tuple[str, str], list[float]] = {}
    for name in request.sets:
        for seed in range(request.seeds):
            data, splits = opened(name, home, seed)
            teacher = home / f"{name}-teacher-{seed}"
            sightline.train(data, out=teacher, seed=seed, minutes=request.minutes, workers=0)
            for what, how in ways.items():
                done = pretrain(
                    data,
                    objective="distill",
                    out=home / f"{name}-{what.replace(' ', '-')}-{seed}",
                    seed=seed,
                    epochs=request.epochs,
                    workers=0,
                    options={"teacher": str(teacher), **how},
                )
                model = sightline.load(done.directory)
                right, count = 0, 0
                with torch.inference_mode():
                    for _, batch, _ in OrderedLoader(splits.val, model.preprocess, batch_size=128):
                        assert batch is not None
                        tokens = model.network.backbone(batch.pixels)
                        both = model.network.head.pair(tokens)
                        # Without a teacher the second classifier learns nothing, and the first answers alone.
                        logits = both[0] if what == "labels alone" else (both[0] + both[1]) / 2
                        right, count = (
                            right + int((logits.argmax(1) == batch.targets).sum()),
                            count + len(batch.targets),
                        )
                rows.setdefault((name, what), []).append(right / count)
                print(f"{name} {what} seed {seed}: {right / count:.4f}", flush=True)
    print(f"\n{'set':12} {'learned from':16} {'top-1':>16}   {request.seeds} seeds, {request.epochs:g} epochs")
    for (name, what), scores in sorted(rows.items()):
        print(f"{name:12} {what:16} {told(scores):>16}")


def speed(request: argparse.Namespace, home: Path) -> None:
    """MAE's step beside transformers', and DINO's crops beside one forward pass for each."""
    mae_speed(request.rounds)
    dino_speed(request.rounds)


def mae_speed(rounds: int) -> None:
    """Ratios of a training step, of equal networks, images and optimisers; and of the memory kept for it."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    from sightline.objectives.mae import MAE, MAEConfig

    side, patch, width, depth, heads, batch = 96, 8, 192, 6, 3, 16
    ours = sightline.create_model(
        "mae_vit_base_patch16_224", 0, side, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads
    )
    objective = MAE(ours, MAEConfig(decoder_dim=96, decoder_depth=2, decoder_heads=3)).train()
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=side,
            patch_size=patch,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            decoder_hidden_size=96,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=3,
            decoder_intermediate_size=384,
            norm_pix_loss=True,
        )
    ).train()
    pixels, index = torch.randn(batch, 3, side, side), torch.arange(batch)
    given = Batch(pixels, torch.zeros_like(index), index, index)
    sides = {
        "ours": (objective, lambda: objective(given).loss),
        "transformers": (theirs, lambda: theirs(pixels).loss),
    }
    in_turn("MAE step", sides, rounds, batch)


def dino_speed(rounds: int) -> None:
    """Crops of one size together, beside one forward pass for each crop."""
    from sightline.objectives.dino import DINO, DINOConfig
    from sightline.objectives.prototypes import crossed

    network = sightline.create_model("vit_tiny_patch16_224", 0, 96, patch_size=8, depth=6)
    config = DINOConfig(1024, 256, 64, local_crops=6)
    objective, size = DINO(network, config).train(), 8
    index = torch.arange(size)
    views = (torch.randn(size, 3, 96, 96), torch.randn(size, 6, 3, 40, 40))
    given = Batch(torch.randn(size, 3, 96, 96), torch.zeros_like(index), index, index, None, views)

    def one_by_one() -> Tensor:
        crops = [given.pixels, views[0], *views[1].unbind(1)]
        student = torch.stack([objective.head(network.embed(crop)) for crop in crops])
        with torch.no_grad():
            seen = torch.stack([objective.teacher_head(objective.teacher.embed(crop)) for crop in crops[:2]])
            targets = objective._assigned(seen.flatten(0, 1), 0).view_as(seen)
        return crossed(targets, student, config.student_temperature)

    in_turn(
        "DINO step",
        {"ours": (objective, lambda: objective(given).loss), "one by one": (objective, one_by_one)},
        rounds,
        size,
    )


def in_turn(what: str, sides: dict[str, tuple[Any, Callable[[], Tensor]]], rounds: int, images: int) -> None:
    """Seconds of forward, backward and update of both sides, alternating; memory kept for the backward pass."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    memory = {}
    for name, (_, loss) in sides.items():
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            whole = loss()
        memory[name] = sum(kept.values())
        del whole
    steppers = {
        name: torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)
        for name, (module, _) in sides.items()
    }
    for turn in range(rounds + 2):
        for name, (_, loss) in sides.items():
            began = time.perf_counter()
            steppers[name].zero_grad()
            with fast_products():  # as every update has them
                loss().backward()
            steppers[name].step()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - began)
    (ours, other), medians = seconds, {name: statistics.median(times) for name, times in seconds.items()}
    ratios = sorted(b / a for a, b in zip(seconds[ours], seconds[other], strict=True))
    for name in sides:
        print(f"{what:10} {name:14} {images / medians[name]:8.1f} images/s   {memory[name] / 2**20:7.1f} MiB kept")
    low, middle, high = (ratios[int(share * (len(ratios) - 1))] for share in (0.25, 0.5, 0.75))
    print(f"{what:10} ours is {middle:.2f} times as fast as {other} (quartiles {low:.2f} to {high:.2f}), ", end="")
    print(f"and keeps {memory[ours] / memory[other]:.2f} of the memory\n", flush=True)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"features": compare, "labels": labels, "speed": speed, "teachers": teachers}
    parser.add_argument("table", choices=tables)
    parser.add_argument("--sets", nargs="+", default=["digits", "photographs"], choices=small_sets.SETS)
    parser.add_argument("--only", nargs="+", default=OBJECTIVES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--epochs", type=float, default=15.0)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--home", type=Path)
    request = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tables[request.table](request, request.home or Path(folder))


if __name__ == "__main__":
    main()
