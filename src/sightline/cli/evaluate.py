"""`sightline evaluate`: how good a model is."""

import argparse
import json
import sys
from typing import Any

from sightline.cli.options import add_device, add_merge, add_texts, lines

SUMMARY = "Measure a model on labelled images: its answers, by its task, or what its frozen features are worth."
EXAMPLE = "sightline evaluate runs/photos photos --protocol knn"


def arguments(parser: Any) -> None:
    """The verb's own arguments."""
    parser.add_argument("model", metavar="MODEL", help="model directory, checkpoint, or hf:org/name")
    parser.add_argument("data", metavar="DATA", help="what `sightline train` takes for the model's task")
    words = "accuracy of its answers; or of others learned from its features: knn, linear, few-shot"
    parser.add_argument("--protocol", default="accuracy", metavar="NAME", help=words)
    parser.add_argument("--shots", type=int, metavar="N", help="examples of each class for few-shot (default: several)")
    words = "seed of the held-out part (default: that of the model's training) and of the examples"
    parser.add_argument("--seed", type=int, help=words)
    parser.add_argument("--no-cache", action="store_true", help="neither take features from the cache nor keep them")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that read images")
    parser.add_argument("--architecture", metavar="NAME", help="what a bare checkpoint is, where it cannot tell")
    add_merge(parser)
    add_texts(parser, labels=False)
    add_device(parser)


def run(request: argparse.Namespace) -> int:
    """Evaluates, and prints the figures."""
    from sightline.errors import printable
    from sightline.recipes.evaluate import evaluate

    result = evaluate(
        request.model,
        request.data,
        protocol=request.protocol,
        shots=request.shots,
        cache=not request.no_cache,
        seed=request.seed,
        batch_size=request.batch_size,
        workers=request.workers,
        device=request.device,
        precision=request.precision,
        architecture=request.architecture,
        vocabulary=request.vocabulary,
        merge=request.merge,
        prompts=lines(request.prompts, "|"),
    )
    for name, reason in result.refused:
        print(f"refused {printable(name)}: {printable(reason)}", file=sys.stderr)
    for note in () if request.quiet else result.notes:
        print(printable(note, 4000), file=sys.stderr)
    if request.json:
        print(json.dumps(result.to_json()))
        return 0
    if result.protocol != "accuracy":
        _of_features(result)
        return 0
    print(f"{result.headline}  of {result.counts['evaluated']:,}")
    if result.refused:
        print(f"{len(result.refused)} images could not be read and count as wrong")
    for line in result.lines:
        print(line)
    return 0


def _of_features(result: Any) -> None:
    """The figures of a protocol of frozen features."""
    for row in result.details["details"].get("few_shot", ()):
        low, high = row["interval"]
        print(f"{row['shots']:3} shots  top-1 {row['top1']:.2%}  ({low:.2%} to {high:.2%}, 95 % over seeds)")
    for name, share in result.metrics.items():
        low, high = result.intervals[name]
        print(f"{name:20} {share:.2%}  ({low:.2%} to {high:.2%}, 95 %)")
    total = result.counts["evaluated"] + result.counts["refused"]
    print(f"of {total:,} images, by the features of {result.counts['train']:,}")
    if result.counts["refused"]:
        print(f"{result.counts['refused']} of them could not be read and count as wrong")
