"""`sightline pretrain`: features from images without labels, to train further from."""

import argparse
import json
import shlex
import sys
from typing import Any

from sightline.cli.options import (
    add_augmentation,
    add_device,
    add_fields,
    add_network,
    image_size,
    run_of,
    speaks,
    take,
    take_network,
)
from sightline.training.settings import Settings

SUMMARY = "Learn features from images without labels; the model directory is what `train --weights` goes on from."
EXAMPLE = "sightline pretrain photos --objective mae --out runs/features"

_OWN = ("seed", "epochs", "minutes", "precision", "smoothing", "mixup", "cutmix", "switch_prob")


def arguments(parser: Any) -> None:
    """The verb's own arguments."""
    parser.add_argument(
        "data",
        metavar="DATA",
        help="folder of images, with or without classes; archive, shards, CSV; or builtin:NAME",
    )
    parser.add_argument(
        "--objective",
        default="mae",
        metavar="NAME",
        help="mae, beit, codebook, masked-patch, simmim, dino, supervised, distill, noisy-student, or clip (captions); "
        "each setting of it is an option, such as --mask-ratio 0.6",
    )
    parser.add_argument("--model", help="architecture, as `sightline models` lists them")
    parser.add_argument("--recipe", default="small", help="small, or published: as the objective's paper has it")
    parser.add_argument("--out", metavar="DIR", help="model directory to make (default: runs/NAME-OBJECTIVE)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out where it stopped")
    parser.add_argument("--epochs", type=float, metavar="X", help="passes over the training images")
    parser.add_argument("--minutes", type=float, metavar="X", help="train for so long instead")
    parser.add_argument("--seed", type=int, default=0, help="every random choice follows from it")
    parser.add_argument("--image-size", type=image_size, metavar="N|HxW", help="pixels that the network reads")
    add_device(parser)
    add_network(parser)
    add_fields(parser.add_argument_group("teaching, in place of the recipe's choice"), Settings, leave_out=_OWN)
    add_augmentation(parser)


def further(request: argparse.Namespace, word: str) -> bool:
    """Takes `--NAME=VALUE` where the objective, or else a network or its head, has a setting of this name."""
    from sightline.registry import table

    kind = table("objectives", "OBJECTIVES").get(request.objective)
    known = kind.Config.__dataclass_fields__ if kind is not None else ()
    return take(request, "options", known, word) or take_network(request, word)


def run(request: argparse.Namespace) -> int:
    """Learns, and prints the result."""
    from sightline.recipes.pretrain import pretrain
    from sightline.training.signals import Interrupted

    own: dict[str, Any] = {"objective": request.objective, "options": getattr(request, "options", {})}
    try:
        done = pretrain(request.data, **own, **run_of(request, Settings))
    except Interrupted as stop:
        if speaks():
            words = ["sightline", "pretrain", request.data, "--objective", request.objective]
            words += [*(["--out", request.out] if request.out else []), "--resume"]
            how = shlex.join(words) if begun(request) else "the same command, which finds what it had learned first"
            print(f"sightline: {stop}. Go on with: {how}", file=sys.stderr)
        return stop.status
    if speaks():
        _report(done, request.json)
    return 0


def begun(request: argparse.Namespace) -> bool:
    """Whether the run itself had begun, or still what it needs, a codebook or an earlier teacher, beside it."""
    from sightline.recipes.pretrain import home

    return home(request.data, request.objective, request.out).record_file.is_file()


def _report(done: Any, as_json: bool) -> None:
    """The result of a run, for a person or a program."""
    if as_json:
        print(json.dumps(done.to_json()))
        return
    if "knn_top1" in done.metrics:
        print(f"kNN top-1 {done.metrics['knn_top1']:.2%} of {done.counts['evaluated']:,} held-out images")
    if "effective_rank" in done.metrics:
        print(f"effective rank of the features {done.metrics['effective_rank']:.1f}")
    if done.headline:
        print(f"{done.headline}  of {done.counts['evaluated']:,} held-out images")
    print(f"model  {done.directory}\nreport {done.report}")
    print(f"go on  sightline train IMAGES --weights {shlex.quote(str(done.directory))}")
