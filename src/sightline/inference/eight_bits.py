"""Prediction in 8 bits: calibrated on the user's own images, held against fp32, and refused where answers change."""

import hashlib
import json
import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.device import described_processor
from sightline.errors import UserError, printable
from sightline.evaluation.cache import Cache, folder
from sightline.evaluation.features import weights_digest
from sightline.evaluation.protocol import Interval, wilson
from sightline.inference.predictor import Predictor, Ready
from sightline.inference.quantised import SMALL, Grid, Grids, calibrated, multiplies_int8
from sightline.inference.reading import readers
from sightline.inference.speeds import versions
from sightline.inference.zero_shot import ZeroShotNetwork
from sightline.schema import from_json, require, to_json

AGREEMENT = 0.99
"""Share of images that have to have the same first class as in fp32, where no other is asked for."""
LOOK = 256
"""Of a job's first images, how many are looked at."""
MOST = 2048
"""Images that are looked at where the user names some."""
FEWEST = 32
"""Images below which a share says too little."""
TUNED = 32
"""Images that the grids are chosen on, at most, and at most a quarter; the others judge."""

VERSION = 1
"""Of what is chosen and how it is kept."""
TASKS = ("classify", "clip")
"""What has a first class for every image."""
_CACHE_BYTES = 2**28


@dataclass(frozen=True)
class Measured:
    """What 8 bits make of a model's answers: of `images`, the `same` have the same first class as in fp32.

    `tuned` more images chose the grids of `layers` layers. Where labels are known, `right` counts the right answers in
    fp32 and in 8 bits, `gained` the images that are right only in 8 bits, and `lost` those that no longer are; of
    `labelled` images. `difference` is the largest difference of a logit, in parts of the range of its image's.
    Raises UserError for counts that cannot be.
    """

    images: int
    same: int
    tuned: int
    layers: int
    difference: float
    labelled: int = 0
    right: tuple[int, int] = (0, 0)
    gained: int = 0
    lost: int = 0

    def __post_init__(self) -> None:
        require(0 <= self.same <= self.images and self.images > 0, "no more answers are the same than there are")
        require(self.tuned > 0 and self.layers > 0 and self.difference >= 0, "something was chosen on something")
        changed = self.right[1] - self.right[0] == self.gained - self.lost
        fits = max(self.right) <= self.labelled <= self.images
        require(
            changed and fits and min(*self.right, self.gained, self.lost) >= 0, "right answers are counted in pairs"
        )

    @property
    def agreement(self) -> float:
        """The share of images with the same first class."""
        return self.same / self.images

    @property
    def interval(self) -> Interval:
        """Its 95 % interval."""
        return wilson(self.agreement, self.images)

    @property
    def change(self) -> float:
        """By how much the share of right answers changes."""
        return (self.gained - self.lost) / max(self.labelled, 1)

    @property
    def change_interval(self) -> Interval:
        """Its 95 % interval, of paired answers."""
        return paired(self.gained, self.lost, max(self.labelled, 1))

    def describe(self) -> str:
        """What people are told."""
        low, high = self.interval
        said = (
            f"top-1 as in fp32 {self.agreement:.2%} ({low:.2%} to {high:.2%}, 95 %) on {self.images:,} images, "
            f"{self.tuned} others chose the ranges"
        )
        if self.labelled:
            low, high = self.change_interval
            before, after = (count / self.labelled for count in self.right)
            said += (
                f"; accuracy {before:.2%} in fp32 and {after:.2%} in int8, a change of {100 * self.change:+.2f} points "
                f"({100 * low:+.2f} to {100 * high:+.2f}, 95 %) on {self.labelled:,} labelled ones"
            )
        return said

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        document = {
            "images": self.images,
            "agreement": self.agreement,
            "interval": list(self.interval),
            "calibration_images": self.tuned,
            "layers": self.layers,
            "largest_logit_difference": self.difference,
        }
        if self.labelled:
            before, after = (count / self.labelled for count in self.right)
            document["accuracy"] = {
                "images": self.labelled,
                "fp32": before,
                "int8": after,
                "change": self.change,
                "interval": list(self.change_interval),
            }
        return document


class EightBits(NamedTuple):
    """A predictor that computes in 8 bits, what was measured of it, and whether that was known before."""

    predictor: Predictor
    measured: Measured
    kept: bool


class Pictures(NamedTuple):
    """Images that were read, and the class of each where that is known, else -1."""

    images: Sequence[Ready]
    targets: Sequence[int]


def read(
    predictor: Predictor, sources: Iterable[Any], targets: Sequence[int] | None = None, names: Iterable[str] = ()
) -> Pictures:
    """Reads images that are named for calibration, of `targets` classes; those that cannot be read are left out."""
    sources = list(sources)
    called: list[str | None] = [*names] or [None] * len(sources)
    known = [-1] * len(sources) if targets is None else list(targets)
    require(len(known) == len(sources), f"there are {len(sources)} images to calibrate on, and {len(known)} classes")
    with readers(predictor.threads) as pool:
        items = list(pool.map(predictor.prepare, sources, called))
    pairs = [(item, int(target)) for item, target in zip(items, known, strict=True) if isinstance(item, Ready)]
    return Pictures([item for item, _ in pairs], [target for _, target in pairs])


def in_eight_bits(
    predictor: Predictor, pictures: Pictures, *, agreement: float = AGREEMENT, cache: Cache | None = None
) -> EightBits:
    """The same predictor in 8 bits, if at least the share `agreement` of the pictures keeps its first class.

    A quarter of the pictures, at most 32, chooses the ranges (`quantised.calibrated`), and the others judge. What was
    chosen and measured is kept in `cache` under the weights, the labels, the pictures and this machine. Raises
    UserError where agreement is lower, where the processor, the device, the task or the network does not allow it, and
    for too few pictures.
    """
    require(0 < agreement <= 1, f"the least agreement is a share above 0 and at most 1, not {agreement:g}")
    _refuse_misfits(predictor)
    usable = len(pictures.images)
    if usable < FEWEST:
        raise UserError(
            f"{usable} images are too few to calibrate 8 bits on: at least {FEWEST} are needed; name more with "
            "--calibrate, or compute in bf16"
        )
    cache = Cache(folder("int8"), min(_CACHE_BYTES, Cache().limit)) if cache is None else cache
    key = _key(predictor, pictures)
    known = _kept(cache, key)
    if known is None:
        grids, measured = _measured(predictor, pictures)
        cache.put(key, _tensors(grids), json.dumps(to_json(measured)))
    else:
        grids, measured = known
    if measured.agreement < agreement:
        raise UserError(refusal(measured, agreement))
    return EightBits(predictor.altered(precision=torch.int8, grids=grids, pack=False), measured, known is not None)


def paired(gained: int, lost: int, count: int) -> Interval:
    """The 95 % interval of the change of a share between two answers to each of `count` questions.

    `gained` answers became right and `lost` became wrong. It is the normal interval for pairs with half a question more
    in each of the four cells, so that it has a width where nothing changed (Agresti and Min, doi:10.1002/sim.1781).
    """
    total, better, worse = count + 2, gained + 0.5, lost + 0.5
    middle = (better - worse) / total
    spread = 1.959964 * math.sqrt(better + worse - (better - worse) ** 2 / total) / total
    return max(middle - spread, -1.0), min(middle + spread, 1.0)


def refusal(measured: Measured, agreement: float) -> str:
    """Why 8 bits are refused, and what else there is; more changes are offered where most answers stay."""
    said = f"8 bits change too many answers: {measured.describe()}; at least {agreement:.2%} is asked for. "
    said += "Compute in bf16 (--precision bf16), or calibrate on more images like those of the job (--calibrate)"
    if measured.agreement >= 0.9:
        said += f", or allow more changes (--agreement {math.floor(measured.agreement * 1000) / 1000:g})"
    return said


def _refuse_misfits(predictor: Predictor) -> None:
    """Raises UserError where 8 bits cannot be, or cannot be judged."""
    task = predictor.network.architecture.task
    if not predictor.labels or task not in TASKS:
        raise UserError(f"8 bits are judged by an image's first class, and this model ('{printable(task)}') gives none")
    if predictor.device.type != "cpu":
        raise UserError(f"8 bits are for the processor, and the device is {predictor.device}: say --device cpu")
    if not multiplies_int8():
        raise UserError(
            "this processor, or this torch, does not multiply 8-bit numbers (AVX512-VNNI or AVX-VNNI, and oneDNN): "
            "compute in bf16 or fp32"
        )


def _measured(predictor: Predictor, pictures: Pictures) -> tuple[Grids, Measured]:
    """The grids, chosen on some of the pictures, and what the others say of them."""
    number = len(pictures.images)
    every = max(4, -(-number // TUNED))
    tuning = set(range(0, number, every))
    batches = _batches([pictures.images[i] for i in sorted(tuning)])
    grids = calibrated(predictor.network, (torch.stack([image.pixels for image in batch]) for batch in batches))
    if not grids:
        raise UserError(
            f"this network has no dense layer of at least {SMALL:,} weights that 8 bits would make faster: compute in "
            "bf16 or fp32"
        )
    rest = [i for i in range(number) if i not in tuning]
    images, targets = [pictures.images[i] for i in rest], torch.tensor([pictures.targets[i] for i in rest])
    exact, found = (
        torch.cat([other.compute(batch, features=False) for batch in _batches(images)])
        for other in (
            predictor.altered(precision=torch.float32, pack=True),
            predictor.altered(precision=torch.int8, grids=grids, pack=False),
        )
    )
    return grids, _compared(exact, found, targets, len(tuning), len(grids))


def _compared(
    exact: Float[Tensor, "n k"], found: Float[Tensor, "n k"], targets: Tensor, tuned: int, layers: int
) -> Measured:
    """Counts of two answers to each image, the classes of which are known or -1."""
    before, after, known = exact.argmax(dim=1), found.argmax(dim=1), targets >= 0
    right, still = (before == targets) & known, (after == targets) & known
    ranges = (exact.amax(dim=1) - exact.amin(dim=1)).clamp(min=1e-9)
    difference = float(((found - exact).abs().amax(dim=1) / ranges).max())
    return Measured(
        images=len(exact),
        same=int(((before == after) & found.isfinite().all(dim=1)).sum()),
        tuned=tuned,
        layers=layers,
        difference=difference if math.isfinite(difference) else 1e9,
        labelled=int(known.sum()),
        right=(int(right.sum()), int(still.sum())),
        gained=int((still & ~right).sum()),
        lost=int((right & ~still).sum()),
    )


def _batches(images: Sequence[Ready]) -> list[list[Ready]]:
    """Neighbours of equal size, at most eight."""
    batches: list[list[Ready]] = []
    for image in images:
        fits = bool(batches) and len(batches[-1]) < 8 and batches[-1][0].pixels.shape == image.pixels.shape
        if fits:
            batches[-1].append(image)
        else:
            batches.append([image])
    return batches


def _key(predictor: Predictor, pictures: Pictures) -> str:
    """What grids and agreement follow from."""
    digest = hashlib.sha256(json.dumps([predictor.labels, list(pictures.targets)]).encode())
    for name, tensor in predictor.network.named_buffers():  # the texts that classes were named by are no weights
        digest.update(f"\0{name}".encode() + tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    for image in pictures.images:
        digest.update(f"\0{tuple(image.pixels.shape)}".encode() + image.pixels.contiguous().numpy().tobytes())
    network = predictor.network
    weights = weights_digest(network.network if isinstance(network, ZeroShotNetwork) else network)
    where = [platform.machine(), described_processor(), versions()]
    return json.dumps([VERSION, weights, network.backbone.merges, digest.hexdigest(), where])


def _tensors(grids: Grids) -> dict[str, Tensor]:
    ends = {f"{name} ends": torch.tensor([grid.low, grid.high], dtype=torch.float64) for name, grid in grids.items()}
    shares = {f"{name} channels": grid.channels for name, grid in grids.items() if grid.channels is not None}
    return {**ends, **shares}


def _kept(cache: Cache, key: str) -> tuple[Grids, Measured] | None:
    """What the cache has, if it is what is written here."""
    found = cache.get(key)
    if found is None:
        return None
    tensors, text = found
    try:
        measured = from_json(Measured, json.loads(text), "int8")
    except (UserError, ValueError, RecursionError):
        return None
    grids = {}
    for name, ends in tensors.items():
        layer, _, kind = name.rpartition(" ")
        if kind == "ends":
            low, high = ends.tolist()
            grids[layer] = Grid(low, high, tensors.get(f"{layer} channels"))
    return (grids, measured) if len(grids) == measured.layers else None
