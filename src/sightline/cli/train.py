"""`sightline train`: from a folder of images to a model directory."""

import argparse
import json
import os
import shlex
import sys
from typing import Any

from sightline.cli.options import add_device, add_fields, given, image_size, setting
from sightline.training.settings import Settings

SUMMARY = "Train or fine-tune a model on a folder of images; what is not said is chosen, and the choice explained."
EXAMPLE = "sightline train photos --minutes 10 --out runs/photos"

_OWN = ("seed", "epochs", "minutes", "precision")


def arguments(parser: Any) -> None:
    """The verb's own arguments."""
    parser.add_argument(
        "data", metavar="DATA", help="folder of class folders, archive of one, CSV with path,label, or builtin:digits"
    )
    parser.add_argument("--task", default="classify", choices=("classify",), help="what to learn")
    parser.add_argument("--model", help="architecture, as `sightline models` lists them")
    parser.add_argument(
        "--weights", metavar="SOURCE", help="weights to start from: a file, a folder, builtin:tiny, hf:…; or none"
    )
    parser.add_argument("--recipe", help="fine-tune (default with weights), fine-tune-small or fine-tune-as-published")
    parser.add_argument("--out", metavar="DIR", help="model directory to make (default: runs/NAME)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out where it stopped")
    parser.add_argument("--epochs", type=float, metavar="X", help="passes over the training images")
    parser.add_argument("--minutes", type=float, metavar="X", help="train for so long instead")
    parser.add_argument("--seed", type=int, default=0, help="every random choice follows from it")
    parser.add_argument("--image-size", type=image_size, metavar="N|HxW", help="pixels that the network reads")
    modes = ("squash", "crop", "pad", "native")
    parser.add_argument("--resize", choices=modes, help="how images of other shapes get there; native keeps aspect")
    add_device(parser)
    network = parser.add_argument_group(
        "network, in place of the recipe's choice",
        "every setting of the model's family is an option; several numbers are written 1,2,6",
    )
    for name in ("patch-size", "embed-dim", "depth", "num-heads"):
        network.add_argument(f"--{name}", type=setting, metavar="N")
    network.add_argument("--tokenizer", metavar="NAME", help="patch, convolution, …: how pixels become tokens")
    network.add_argument("--drop-path-rate", type=float, metavar="X", help="stochastic depth")
    add_fields(parser.add_argument_group("teaching, in place of the recipe's choice"), Settings, leave_out=_OWN)
    augment = parser.add_argument_group("variation of the training images")
    augment.add_argument("--horizontal-flip", "--hflip", type=float, metavar="P", help="probability of mirroring")
    augment.add_argument("--vertical-flip", "--vflip", type=float, metavar="P", help="probability of turning over")
    augment.add_argument("--degrees", type=float, metavar="X", help="largest rotation")
    augment.add_argument("--crop", choices=("resized", "padded", "none"), help="how training crops are taken")
    augment.add_argument("--randaugment", type=int, metavar="N", help="RandAugment operations")
    augment.add_argument("--erasing", "--reprob", type=float, metavar="P", help="probability of random erasing")


_NETWORK = ("tokenizer", "patch_size", "embed_dim", "depth", "num_heads", "drop_path_rate")
_TOLD = {"num_classes", "image_size", "in_chans"}
"""What the images say, or another option."""
_AUGMENT = ("horizontal_flip", "vertical_flip", "degrees", "crop", "randaugment", "erasing")


def further(request: argparse.Namespace, word: str) -> bool:
    """Takes `--NAME=VALUE` where a network or its head has a setting of this name; says whether it did."""
    from sightline.backbones.backbone import FAMILIAR
    from sightline.registry import table

    name, _, value = word.removeprefix("--").replace("-", "_").partition("=")
    parts = [*table("backbones", "FAMILIES").values(), *table("heads", "HEADS").values()]
    known = {*FAMILIAR, *(field for part in parts for field in part.Config.__dataclass_fields__)} - _TOLD
    if not word.startswith("--") or name not in known:
        return False
    request.network = {**getattr(request, "network", {}), name: setting(word.partition("=")[2]) if value else True}
    return True


def run(request: argparse.Namespace) -> int:
    """Trains, and prints the result."""
    from sightline.recipes.classify import train
    from sightline.training.signals import Interrupted

    def named(names: tuple[str, ...]) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(request, name)) is not None}

    settings = given(request, Settings)
    if request.precision == "auto":
        settings.pop("precision")
    try:
        trained = train(
            request.data,
            model=request.model,
            weights=request.weights,
            out=request.out,
            image_size=request.image_size,
            resize=request.resize,
            recipe=request.recipe,
            resume=request.resume,
            device=request.device,
            quiet=request.quiet,
            network={**named(_NETWORK), **getattr(request, "network", {})},
            augment=named(_AUGMENT),
            **settings,
        )
    except Interrupted as stop:
        if _speaks():
            words = ["sightline", "train", request.data, *(["--out", request.out] if request.out else []), "--resume"]
            print(f"sightline: {stop}. Go on with: {shlex.join(words)}", file=sys.stderr)
        return stop.status
    if _speaks():
        report(trained, request.json)
    return 0


def _speaks() -> bool:
    """Whether this is the process that speaks, where torchrun starts several."""
    return os.environ.get("RANK", "0") == "0"


def report(trained: Any, as_json: bool) -> None:
    """The result of a run, for a person or a program."""
    if as_json:
        print(json.dumps(trained.to_json()))
        return
    metrics, counts = trained.metrics, trained.counts
    print(f"top-1 {metrics['top1']:.2%}  top-5 {metrics['top5']:.2%}  of {counts['evaluated']:,} held-out images")
    if counts["refused"]:
        print(f"{counts['refused']:,} held-out images could not be read and count as wrong")
    print(f"model  {trained.directory}\nreport {trained.report}")
