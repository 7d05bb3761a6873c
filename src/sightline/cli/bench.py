"""`sightline bench`: how fast it is here, beside whatever else is installed."""

import argparse
import json
from typing import Any

SUMMARY = "Measure speed on this machine, side by side with timm, transformers and torchvision where installed."
EXAMPLE = "sightline bench --against timm,transformers --model vit_small_patch16_224 --batch-size 1,8"


def arguments(parser: Any) -> None:
    """The verb's own arguments."""
    parser.add_argument("--model", default="vit_small_patch16_224", metavar="NAME", help="architecture, random weights")
    words = "packages that take turns with it in every round; or none"
    parser.add_argument("--image-size", type=int, metavar="N", help="pixels along the side, instead of the usual")
    parser.add_argument("--patch-size", type=int, metavar="N", help="pixels of a patch, instead of the usual")
    parser.add_argument("--against", default="timm,transformers,torchvision", metavar="P,P,…", help=words)
    words = "runtimes that compute the same network as a program, beside forward; or none"
    parser.add_argument("--runtimes", default="onnx,openvino", metavar="R,R,…", help=words)
    words = "what is measured: forward, training, mae, predict, resolution"
    parser.add_argument("--cases", default="forward,training,resolution", metavar="C,C,…", help=words)
    parser.add_argument("--precision", default="fp32", metavar="P,P,…", help="fp32, bf16, fp16 or int8, or several")
    parser.add_argument(
        "--batch-size", default="1,8", metavar="N,N,…", help="images at a time; training takes the most"
    )
    words = "pixels along the side of the squares whose cost is measured"
    parser.add_argument("--sides", default="224,320,448,640,896,1024", metavar="N,N,…", help=words)
    words = "images in each folder of predict, instead of 200 small and 50 large ones"
    parser.add_argument("--images", type=int, metavar="N", help=words)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="times that each takes its turn")
    parser.add_argument("--compiled", action="store_true", help="compiled networks too, which takes minutes")
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1, …")
    parser.add_argument("--out", metavar="FILE", help="a page with the figures and curves")


def run(request: argparse.Namespace) -> None:
    """Measures, and prints tables or JSON."""
    from pathlib import Path

    from sightline.benching.bench import bench
    from sightline.benching.tables import Plan
    from sightline.checkpoints.atomic import write_atomic
    from sightline.device import pick_device
    from sightline.errors import UserError

    if not 1 <= request.rounds <= 1000:
        raise UserError(f"--rounds must lie in [1, 1000], and is {request.rounds}")
    if request.images is not None and not 1 <= request.images <= 10**6:
        raise UserError(f"--images must lie in [1, 1000000], and is {request.images}")
    plan = Plan(
        request.model,
        pick_device(request.device),
        _names(request.against),
        _names(request.precision),
        _numbers("--batch-size", request.batch_size, 4096),
        _numbers("--sides", request.sides, 4096),
        request.rounds,
        request.compiled,
        _names(request.runtimes),
        request.image_size,
        request.patch_size,
        request.images,
    )
    plan.architecture()  # which knows what is near
    tell = _nothing if request.json else _printed
    done = bench(plan, _names(request.cases), tell=tell)
    if request.out:
        write_atomic(Path(request.out), done.html().encode())
    if request.json:
        print(json.dumps(done.to_json()))
    elif request.out:
        print(f"\npage {request.out}")


def _printed(lines: Any) -> None:
    print("\n".join(lines), flush=True)


def _nothing(lines: Any) -> None:
    """JSON is one document, at the end."""


def _names(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    return [] if words == ["none"] else words


def _numbers(option: str, text: str, most: int) -> list[int]:
    from sightline.errors import UserError, printable

    words = _names(text)
    if not words or not all(word.isdecimal() and 1 <= int(word) <= most for word in words):
        raise UserError(f"{option} takes whole numbers from 1 to {most:,} with commas between, not '{printable(text)}'")
    return [int(word) for word in words]
