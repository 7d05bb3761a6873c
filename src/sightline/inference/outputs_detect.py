"""Exported detectors answer with the logits of every query, and its box in pixels of the picture."""

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.heads.detect import Detected, original
from sightline.heads.matching import corners
from sightline.images.program import Side
from sightline.inference.outputs import Outputs, best, distances
from sightline.types import Placement


def _expected(output: Detected, place: Placement) -> tuple[Float[Tensor, "q k1"], Float[Tensor, "q 4"]]:
    return output.logits[0], original(corners(output.boxes.float())[0], place)


def _compute(output: Detected, sides: tuple[Side, Side]) -> tuple[Float[Tensor, "q k1"], Float[Tensor, "q 4"]]:
    tall, wide = sides
    rows, columns = tall.wanted, wide.wanted
    inside = corners(output.boxes)[0] * torch.tensor([columns, rows, columns, rows], dtype=torch.float32)
    begins = torch.stack([wide.begin, tall.begin, wide.begin, tall.begin]).to(torch.float32)
    scales = torch.stack([side.scaled / side.length for side in (wide, tall, wide, tall)]).to(torch.float32)
    most = torch.stack([wide.length, tall.length, wide.length, tall.length]).to(torch.float32)
    return output.logits[0], torch.minimum(((inside + begins) / scales).clamp(min=0), most)


OUTPUTS = {
    "detect": Outputs(
        ("logits", "boxes"), ("logits", "boxes"), _compute, _expected, best, distances, per_pixel=("boxes",)
    )
}
