"""Tokens to objects with boxes: DETR's encoder-decoder (arXiv 2005.12872)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sightline.heads.matching import NOBODY, Targets, corners, detection_loss
from sightline.layers.attention import Attention
from sightline.layers.dense import Dense
from sightline.layers.encoder import Mlp
from sightline.layers.positions import sine_positions
from sightline.schema import require
from sightline.types import Area, Gaze, Placement, Reply, Score, Step, Tokens

THRESHOLD = 0.5
"""Score from which a detection is shown."""


GAZES = 12
"""Objects whose queries are shown, at most."""


@dataclass(frozen=True)
class DetectConfig:
    """The settings of a `DetectHead`; the defaults are DETR's.

    `queries_from="learned"` has `queries` vectors that are learned and boxes that are predicted at once. "patches"
    makes a query of every token that leaves the encoder, which says where in the image it stands, and each decoder
    layer moves the boxes of the one before (arXiv 2010.04159, section 4.1): it learns many times as fast from little.
    `copies` queries answer for an object in all layers but the last (arXiv 2207.13080). `no_object_weight` weighs
    queries that answer for nothing. Raises UserError for values out of range.
    """

    num_classes: int = 91
    queries: int = 100
    queries_from: Literal["learned", "patches"] = "learned"
    hidden_dim: int = 256
    encoder_layers: int = 6
    decoder_layers: int = 6
    decoder_heads: int = 8
    decoder_mlp: int = 2048
    drop_rate: float = 0.1
    attn_drop: float = 0.1
    no_object_weight: float = 0.1
    copies: int = 1

    def __post_init__(self) -> None:
        for name in (
            "num_classes",
            "queries",
            "hidden_dim",
            "decoder_layers",
            "decoder_heads",
            "decoder_mlp",
            "copies",
        ):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        require(self.encoder_layers >= 0, f"encoder_layers must not be negative, and is {self.encoder_layers}")
        for name, most in (("encoder_layers", 64), ("decoder_layers", 64), ("queries", 10_000), ("copies", 100)):
            require(getattr(self, name) <= most, f"{name} {getattr(self, name)} is more than {most}")
        fits = self.hidden_dim % self.decoder_heads == 0 and self.hidden_dim % 4 == 0
        require(fits, f"hidden_dim {self.hidden_dim} is not a multiple of decoder_heads {self.decoder_heads} and of 4")
        for name in ("drop_rate", "attn_drop"):
            require(0 <= getattr(self, name) < 1, f"{name} must lie in [0, 1), not {getattr(self, name)}")
        require(0 < self.no_object_weight <= 1, f"no_object_weight must lie in (0, 1], not {self.no_object_weight}")


class Detected(NamedTuple):
    """What the head answers: logits, the last of them for no object, and boxes (cx, cy, w, h in fractions)."""

    logits: Float[Tensor, "b q k1"]
    boxes: Float[Tensor, "b q 4"]


class DetectedLayers(NamedTuple):
    """The same of every decoder layer: what training learns from."""

    logits: Float[Tensor, "b layers q k1"]
    boxes: Float[Tensor, "b layers q 4"]


@dataclass(frozen=True)
class Detection:
    """One object: its class, how sure it is (0 to 1), and its box in pixels of the upright original image."""

    label: str
    index: int
    score: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Detections(Reply):
    """The answer for one image: the objects in it, the surest first."""

    boxes: Sequence[Detection]

    def rows(self) -> Sequence[Score]:
        return [Score(found.label, found.index, found.score) for found in self.boxes]

    def to_json(self) -> dict[str, Any]:
        found = [{"label": d.label, "index": d.index, "score": d.score, "box": list(d.box)} for d in self.boxes]
        return {"detections": found}


def _attention(config: DetectConfig) -> Attention:
    return Attention(config.hidden_dim, config.decoder_heads, drop=config.attn_drop, out_drop=config.drop_rate)


class EncoderLayer(nn.Module):
    """Attention with positions in queries and keys, and an MLP; norms after each (figure 10, left)."""

    def __init__(self, config: DetectConfig):
        super().__init__()
        width = config.hidden_dim
        self.attention = _attention(config)
        self.norm1 = nn.LayerNorm(width)
        self.mlp = Mlp(width, config.decoder_mlp, activation="relu", drop=config.drop_rate)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, places: Tensor, bias: Tensor | None) -> Float[Tensor, "b n d"]:
        placed = x + places
        x = self.norm1(x + self.attention(placed, placed, x, bias=bias))
        return self.norm2(x + self.mlp(x))


class DecoderLayer(nn.Module):
    """Attention among queries, attention from queries to tokens, and an MLP; norms after each (figure 10, right)."""

    def __init__(self, config: DetectConfig):
        super().__init__()
        width = config.hidden_dim
        self.attention = _attention(config)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attention = _attention(config)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, config.decoder_mlp, activation="relu", drop=config.drop_rate)
        self.norm3 = nn.LayerNorm(width)

    def forward(
        self,
        x: Float[Tensor, "b q d"],
        asked: Float[Tensor, "#b q d"],
        memory: Float[Tensor, "b n d"],
        placed: Float[Tensor, "b n d"],
        among: Tensor | None,
        bias: Tensor | None,
    ) -> Float[Tensor, "b q d"]:
        """`asked` are places of queries, `placed` the tokens with theirs; `among` and `bias` hide what is no token."""
        own = x + asked
        x = self.norm1(x + self.attention(own, own, x, bias=among))
        x = self.norm2(x + self.cross_attention(x + asked, placed, memory, bias=bias))
        return self.norm3(x + self.mlp(x))


class BoxMlp(nn.Module):
    """Three dense layers from a query to four numbers."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = Dense(width, width), Dense(width, width), Dense(width, 4)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... 4"]:
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class DetectHead(nn.Module):
    """Tokens of any backbone to a class and a box for every query (section 3.2).

    Where tokens are hidden by a mask, positions are measured on each image's own part of the grid, and nothing reads
    the rest.
    """

    Config = DetectConfig
    task = "detect"
    per_class = ("classifier.",)
    before_classes: tuple[str, ...] = ()

    def __init__(self, config: DetectConfig, width: int):
        super().__init__()
        self.config = config
        own = config.hidden_dim
        self.projection = Dense(width, own)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(own)
        learned = config.queries_from == "learned"
        self.queries = nn.Parameter(torch.randn(config.queries, own)) if learned else None
        self.anchor = None if learned else Dense(own, 4)
        self.classifier = Dense(own, config.num_classes + 1)
        self.box = BoxMlp(own)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 and name != "queries" and not parameter.is_meta:
                # Query, key and value share one matrix, and DETR's rule takes it for one, too.
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("bias") and not parameter.is_meta:
                nn.init.zeros_(parameter)
        for last in (self.box.fc3, self.anchor):
            if last is not None and self.anchor is not None:
                nn.init.zeros_(last.weight)  # boxes begin where their tokens stand

    def renew(self) -> None:
        """Forgets the classes."""
        nn.init.xavier_uniform_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def features(self, tokens: Tokens) -> Float[Tensor, "b d"]:
        """The mean of the patches."""
        return tokens.mean()

    def forward(self, tokens: Tokens, area: Area | None = None) -> Detected | DetectedLayers:
        """The answers of the last decoder layer; in training those of all."""
        batch, rows = tokens.x.shape[0], tokens.grid[0]
        mask = tokens.mask
        real = tokens.patches.new_ones(batch, rows * tokens.grid[1], dtype=torch.bool)
        real = real if mask is None else mask[:, tokens.prefix :]
        hidden = None if mask is None else _hiding(real, tokens.x.dtype)
        places = sine_positions(rearrange(real, "b (r c) -> b r c", r=rows), self.config.hidden_dim)
        places = places.to(tokens.x.dtype)
        x = self.projection(tokens.patches)
        for layer in self.encoder:
            x = layer(x, places, hidden)
        return self._decoded(x, places, real, rows, hidden)

    def _decoded(
        self,
        memory: Float[Tensor, "b n d"],
        places: Float[Tensor, "b n d"],
        real: Bool[Tensor, "b n"],
        rows: int,
        hidden: Tensor | None,
    ) -> Detected | DetectedLayers:
        """Queries through the decoder; of patches, each box is moved on from the one of the layer before."""
        placed = memory + places
        reference = None
        if self.queries is not None:
            x = memory.new_zeros(memory.shape[0], *self.queries.shape)
            asked, among = x + self.queries, None
        else:
            assert self.anchor is not None
            x, asked, among = memory, places, hidden
            centre = _centres(rearrange(real, "b (r c) -> b r c", r=rows))
            reference = _inverse_sigmoid(centre.to(memory.dtype)) + self.anchor(memory)
        logits, boxes = [], []
        for number, layer in enumerate(self.decoder):
            x = layer(x, asked, memory, placed, among, hidden)
            if not self.training and number < len(self.decoder) - 1 and reference is None:
                continue
            out = self.norm(x)
            moved = self.box(out) if reference is None else self.box(out) + reference
            logits.append(self.classifier(out))
            boxes.append(moved.sigmoid())
            reference = None if reference is None else moved.detach()
        if self.anchor is not None and hidden is not None:
            nothing = F.one_hot(torch.tensor(self.config.num_classes), self.config.num_classes + 1).to(memory)
            logits = [torch.where(real[..., None], one, NOBODY * nothing) for one in logits]
        if self.training:
            return DetectedLayers(torch.stack(logits, dim=1), torch.stack(boxes, dim=1))
        return Detected(logits[-1], boxes[-1])

    def gaze(self, output: Detected, labels: Sequence[str]) -> Gaze:
        """What the queries of the objects found, or the surest one, ask of the tokens, in the last decoder layer."""
        scores, indices, _ = found(output)
        order = scores[0].argsort(descending=True, stable=True).tolist()
        rows = [i for i in order if scores[0, i] >= THRESHOLD][:GAZES] or order[:1]
        words = [f"{labels[int(indices[0, i])]} {float(scores[0, i]):.0%}" for i in rows]
        return Gaze(f"decoder.{self.config.decoder_layers - 1}.cross_attention", rows, 0, words)

    def loss(self, output: Detected | DetectedLayers, target: Sequence[Targets]) -> Step:
        """The matched losses of every layer that there is."""
        config = self.config
        logits, boxes = output if isinstance(output, DetectedLayers) else (part[:, None] for part in output)
        return detection_loss(logits, boxes, target, no_object_weight=config.no_object_weight, copies=config.copies)

    def read(
        self,
        output: Detected,
        labels: Sequence[str],
        top: int = 5,
        places: Sequence[Placement] | None = None,
    ) -> list[Detections]:
        """The objects of each image whose score is `THRESHOLD` or more, the surest first.

        Boxes are in pixels of the originals, or in fractions of the input where nobody says how large these are.
        """
        scores, indices, boxes = found(output)
        replies = []
        for i in range(len(scores)):
            own = boxes[i] if places is None else original(boxes[i], places[i])
            order = scores[i].argsort(descending=True, stable=True)
            kept = [j for j in order.tolist() if scores[i, j] >= THRESHOLD]
            replies.append(
                Detections(
                    [
                        Detection(labels[int(indices[i, j])], int(indices[i, j]), float(scores[i, j]), _four(own[j]))
                        for j in kept
                    ]
                )
            )
        return replies


def found(output: Detected) -> tuple[Float[Tensor, "b q"], Tensor, Float[Tensor, "b q 4"]]:
    """Of every query the score and the index of its best class, and its box as corners in fractions of the input."""
    scores, indices = output.logits.float().softmax(dim=-1)[..., :-1].max(dim=-1)
    return scores, indices, corners(output.boxes.float())


def original(boxes: Float[Tensor, "q 4"], place: Placement) -> Float[Tensor, "q 4"]:
    """Boxes as corners in fractions of the input, in pixels of the original image and cut off at its edges."""
    (y, x), (top, left), (height, width), (rows, columns) = place.scale, place.offset, place.size, place.input
    pixels = boxes * boxes.new_tensor([columns, rows, columns, rows])
    back = (pixels - boxes.new_tensor([left, top, left, top])) / boxes.new_tensor([x, y, x, y])
    return torch.minimum(back.clamp(min=0), back.new_tensor([width, height, width, height]))


def _four(box: Float[Tensor, " four"]) -> tuple[float, float, float, float]:
    left, top, right, bottom = box.tolist()
    return left, top, right, bottom


def _hiding(real: Bool[Tensor, "b n"], dtype: torch.dtype) -> Float[Tensor, "b 1 1 n"]:
    hidden = torch.zeros_like(real, dtype=dtype).masked_fill(~real, -torch.inf)
    return rearrange(hidden, "b n -> b 1 1 n")


def _centres(real: Bool[Tensor, "b r c"]) -> Float[Tensor, "b n 4"]:
    """For every cell a box in its middle, a quarter of each side in size, in fractions of each image's own grid."""
    height = real.any(dim=2).sum(dim=1)[:, None, None]
    width = real.any(dim=1).sum(dim=1)[:, None, None]
    rows = torch.arange(real.shape[1], device=real.device)[None, :, None]
    columns = torch.arange(real.shape[2], device=real.device)[None, None]
    y, x = (rows + 0.5) / height, (columns + 0.5) / width
    y, x = torch.broadcast_tensors(y, x)
    sides = torch.full_like(x, 0.25)
    return rearrange(torch.stack([x, y, sides, sides], dim=-1), "b r c four -> b (r c) four")


def _inverse_sigmoid(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    x = x.clamp(1e-3, 1 - 1e-3)
    return torch.log(x / (1 - x))


HEADS = {"detect": DetectHead}
