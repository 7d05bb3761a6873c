"""Which prediction answers for which object: boxes, the Hungarian matching, and the loss that follows (DETR).

arXiv 2005.12872, sections 3.1 and A.2. Boxes are centre x, centre y, width and height in fractions of the image.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sightline.errors import UserError
from sightline.types import Step

CLASS_COST, L1_COST, GIOU_COST = 1.0, 5.0, 2.0
"""Weights of the class, of the distance of boxes and of their overlap, in the matching and in the loss."""


NOBODY = 1e4
"""The logit of "no object" at places of a batch of unlike sizes where there is no query."""


class Targets(NamedTuple):
    """The objects of one image: class indices and boxes."""

    labels: Int[Tensor, " n"]
    boxes: Float[Tensor, "n 4"]


Match = tuple[Int[Tensor, " _"], Int[Tensor, " _"]]
"""Queries in rising order, and the objects that they answer for."""


def corners(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """Boxes as left, top, right and bottom."""
    middle, size = boxes.split(2, dim=-1)
    return torch.cat([middle - size / 2, middle + size / 2], dim=-1)


def centred(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """The reverse of `corners`."""
    first, last = boxes.split(2, dim=-1)
    return torch.cat([(first + last) / 2, last - first], dim=-1)


def generalized_iou(a: Float[Tensor, "*#n 4"], b: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*m"]:
    """Generalised intersection over union of boxes as corners, -1 to 1 (arXiv 1902.09630, algorithm 1)."""

    def area(first: Tensor, last: Tensor) -> Tensor:
        return (last - first).clamp(min=0).prod(dim=-1)

    inner = area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    hull = area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - inner
    tiny = torch.finfo(union.dtype).tiny
    return inner / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


@torch.no_grad()
def match(
    logits: Float[Tensor, "b layers q k1"],
    boxes: Float[Tensor, "b layers q 4"],
    targets: Sequence[Targets],
    copies: Sequence[int],
) -> list[list[Match]]:
    """For each layer and image, the queries that together answer for its objects at least cost; others for nothing.

    With `copies` above one for a layer, each object is answered for by that many queries there, as far as there are
    enough. Raises UserError where scipy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise UserError('teaching detection needs scipy: pip install "sightline[dense]"') from error
    found: list[list[Match]] = [[] for _ in copies]
    for image, target in enumerate(targets):
        own, count = boxes[image], len(target.labels)
        fit = logits[image].softmax(dim=-1)[..., target.labels.long()]
        far = (own[:, :, None] - target.boxes).abs().sum(dim=-1)
        overlap = generalized_iou(corners(own)[:, :, None], corners(target.boxes))
        cost = L1_COST * far - CLASS_COST * fit - GIOU_COST * overlap + 1e4 * (logits[image, ..., -1:] >= NOBODY)
        # Numbers that are none would end the run here; so the update finds that its gradient is not finite.
        table = cost.float().nan_to_num(nan=0.0, posinf=1e6, neginf=-1e6).cpu().numpy()
        for layer, most in enumerate(copies):
            times = max(min(most, logits.shape[2] // max(count, 1)), 1)
            queries, objects = linear_sum_assignment(np.tile(table[layer], (1, times)))
            pair = np.stack([queries, objects % max(count, 1)]).astype(np.int64)
            rows, columns = torch.from_numpy(pair).to(logits.device)
            found[layer].append((rows, columns))
    return found


class Parts(NamedTuple):
    """The three losses of one decoder layer."""

    classes: Float[Tensor, ""]
    distance: Float[Tensor, ""]
    overlap: Float[Tensor, ""]

    @property
    def total(self) -> Float[Tensor, ""]:
        """Their weighted sum."""
        return CLASS_COST * self.classes + L1_COST * self.distance + GIOU_COST * self.overlap


def layer_loss(
    logits: Float[Tensor, "b q k1"],
    boxes: Float[Tensor, "b q 4"],
    targets: Sequence[Targets],
    matches: Sequence[Match],
    no_object_weight: float,
) -> Parts:
    """Class, L1 and GIoU losses of predictions that are matched; the last class is that of no object.

    The latter two are summed over pairs and divided by the number of pairs of the batch, at least 1.
    """
    batch = torch.cat([torch.full_like(queries, i) for i, (queries, _) in enumerate(matches)])
    queries = torch.cat([queries for queries, _ in matches])
    labels = torch.cat([t.labels[objects] for t, (_, objects) in zip(targets, matches, strict=True)]).long()
    wanted = torch.cat([t.boxes[objects] for t, (_, objects) in zip(targets, matches, strict=True)])
    nothing = logits.shape[-1] - 1
    classes = torch.full(logits.shape[:2], nothing, dtype=torch.int64, device=logits.device)
    classes[batch, queries] = labels
    weights = logits.new_ones(nothing + 1)
    weights[nothing] = no_object_weight
    found = boxes[batch, queries]
    count = max(len(queries), 1)
    return Parts(
        F.cross_entropy(logits.flatten(0, 1), classes.flatten(), weights),
        (found - wanted).abs().sum() / count,
        (1 - generalized_iou(corners(found), corners(wanted))).sum() / count,
    )


def detection_loss(
    logits: Float[Tensor, "b layers q k1"],
    boxes: Float[Tensor, "b layers q 4"],
    targets: Sequence[Targets],
    *,
    no_object_weight: float = 0.1,
    copies: int = 1,
) -> Step:
    """The summed losses of all decoder layers, each matched anew, and figures of the last.

    In all layers but the last an object is answered for by `copies` queries.
    """
    logits, boxes = logits.float(), boxes.float()
    layers = logits.shape[1]
    chosen = match(logits, boxes, targets, [copies] * (layers - 1) + [1])
    parts = [
        layer_loss(logits[:, layer], boxes[:, layer], targets, chosen[layer], no_object_weight)
        for layer in range(layers)
    ]
    last = parts[-1]
    figures = {"loss_class": last.classes, "loss_box": last.distance, "loss_giou": last.overlap}
    return Step(
        torch.stack([part.total for part in parts]).sum(), {name: value.detach() for name, value in figures.items()}
    )
