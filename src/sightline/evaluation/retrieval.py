"""How well images find their captions, and captions their images."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from sightline.evaluation.measure import Measure
from sightline.types import Batch

RANKS = (1, 5, 10)
"""Numbers of candidates among which the right one is looked for."""

_AT_ONCE = 1024  # rows of the table of similarities that are in memory


def recall(
    queries: Float[Tensor, "q d"], candidates: Float[Tensor, "c d"], fits: Bool[Tensor, "q c"], k: int
) -> Float[Tensor, " q"]:
    """Of each query, 1 where one of the `k` candidates of highest cosine fits it, else 0.

    Of candidates of equal cosine the first counts as nearer. There may be fewer than `k` of them.
    """
    queries, candidates = F.normalize(queries, dim=-1), F.normalize(candidates, dim=-1)
    found = []
    for start in range(0, len(queries), _AT_ONCE):
        cosines = queries[start : start + _AT_ONCE] @ candidates.T
        best = cosines.sort(dim=1, descending=True, stable=True).indices[:, :k]
        found.append(fits[start : start + _AT_ONCE].gather(1, best).any(dim=1).float())
    return torch.cat(found) if found else torch.zeros(0)


@dataclass
class Retrieval(Measure):
    """Vectors of images and of the different captions among theirs; equal captions are one.

    `images` are (index in the set, vector), `texts` the vector of each caption by its ids, `pairs` which captions are
    whose. An image that could not be read is one whose captions are never found.
    """

    images: dict[int, Float[Tensor, " d"]] = field(default_factory=dict)
    texts: dict[tuple[int, ...], Float[Tensor, " d"]] = field(default_factory=dict)
    pairs: dict[int, list[tuple[int, ...]]] = field(default_factory=dict)
    refused: list[tuple[str, str]] = field(default_factory=list)
    network: Any = None

    def begin(self, network: Any) -> None:
        self.network = network

    def take(self, output: Float[Tensor, "b d"], batch: Batch) -> None:
        assert self.network is not None, "texts are encoded by the network that is measured"
        rows = [tuple(row) for ids in batch.targets for row in ids.tolist()]
        new = list(dict.fromkeys(row for row in rows if row not in self.texts))
        if new:
            device = output.device
            vectors = self.network.encode_text(torch.tensor(new, device=device)).float().cpu()
            self.texts.update(zip(new, vectors, strict=True))
        for index, vector, ids in zip(batch.index.tolist(), output.float().cpu(), batch.targets, strict=True):
            self.images[index] = vector
            self.pairs[index] = [tuple(row) for row in ids.tolist()]

    def merge(self, others: Iterable["Retrieval"]) -> "Retrieval":
        for other in others:
            self.images.update(other.images)
            self.texts.update(other.texts)
            self.pairs.update(other.pairs)
            self.refused.extend(other.refused)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "network": None}  # what travels between processes are vectors

    @property
    def evaluated(self) -> int:
        return len(self.images)

    def metrics(self) -> dict[str, float]:
        """`image_to_text_r1`, `_r5`, `_r10` of all images, and `text_to_image_r1` and so on of all captions."""
        names = [f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in RANKS]
        if not self.images:
            return dict.fromkeys(names, 0.0)
        order, place = sorted(self.images), {row: j for j, row in enumerate(self.texts)}
        fits = torch.zeros(len(order), len(place), dtype=torch.bool)
        for i, index in enumerate(order):
            fits[i, [place[row] for row in self.pairs[index]]] = True
        images = torch.stack([self.images[index] for index in order])
        texts = torch.stack(list(self.texts.values()))
        share = len(order) / (len(order) + len(self.refused))
        found = [share * float(recall(images, texts, fits, k).mean()) for k in RANKS]
        found += [float(recall(texts, images, fits.T, k).mean()) for k in RANKS]
        return dict(zip(names, found, strict=True))

    def headline(self) -> str:
        metrics = self.metrics()
        first, second = metrics["image_to_text_r1"], metrics["text_to_image_r1"]
        return f"image to text R@1 {first:.2%}  text to image R@1 {second:.2%}  among {len(self.texts):,} captions"

    def lines(self, labels: Sequence[str]) -> list[str]:
        metrics = self.metrics()
        head = f"{'':14} " + " ".join(f"{f'R@{k}':>8}" for k in RANKS)
        rows = [
            f"{way.replace('_', ' '):14} " + " ".join(f"{metrics[f'{way}_r{k}']:8.1%}" for k in RANKS)
            for way in ("image_to_text", "text_to_image")
        ]
        return [head, *rows]

    def details(self, labels: Sequence[str]) -> Mapping[str, Any]:
        return {"captions": len(self.texts)}
