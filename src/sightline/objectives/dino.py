"""Self-distillation without labels: DINO (arXiv 2104.14294), with the additions of DINOv2 (arXiv 2304.07193)."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from sightline.images.augment import Augment
from sightline.images.crops import Crops
from sightline.images.masks import blockwise, noise
from sightline.images.preprocess import Preprocess
from sightline.network import Network
from sightline.objectives.masking import mask_token, replaced, require_one_token_each
from sightline.objectives.objective import Objective
from sightline.objectives.prototypes import PrototypeHead, cross_entropy, crossed, koleo, sharpened, sinkhorn
from sightline.schema import require
from sightline.types import Batch, Step, Tokens


@dataclass(frozen=True)
class DINOConfig:
    """The settings of `DINO`; the defaults are those of the paper's ViT-S/16, DINOv2's additions being off.

    The head has `prototypes`, `hidden_dim` and `bottleneck_dim`; `fixed_length` holds the rows of its last layer at
    length one, and `frozen_last` is the share of the run in which that layer does not learn. The teacher's temperature
    rises from `warm_teacher_temperature` over the first `teacher_warmup` of the run; its momentum from `momentum` to 1
    along a cosine. `centring` keeps prototypes from taking all by a moving mean of `centre_momentum`, by Sinkhorn and
    Knopp's scaling within each part of a batch that is computed at a time, or, for trying what happens, not at all.

    Views are those of `Crops`; `local_size` is in pixels, None for 3/7 of the image's side in whole patches. `ibot` is
    the weight of the loss of hidden patches, half of the global views having `ibot_ratio` of them hidden (arXiv
    2111.07832), and `koleo` that of the spread of features. Raises UserError for values out of range.
    """

    prototypes: int = 65536
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    fixed_length: bool = True
    frozen_last: float = 0.01
    student_temperature: float = 0.1
    warm_teacher_temperature: float = 0.04
    teacher_temperature: float = 0.04
    teacher_warmup: float = 0.3
    momentum: float = 0.996
    centring: Literal["centre", "sinkhorn", "none"] = "centre"
    centre_momentum: float = 0.9
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)
    local_crops: int = 8
    local_size: int | None = None
    colour: float = 1.0
    ibot: float = 0.0
    ibot_ratio: tuple[float, float] = (0.1, 0.5)
    koleo: float = 0.0

    def __post_init__(self) -> None:
        for name in ("prototypes", "hidden_dim", "bottleneck_dim"):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        for name in ("student_temperature", "warm_teacher_temperature", "teacher_temperature"):
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        for name in ("frozen_last", "teacher_warmup", "momentum", "centre_momentum", "colour"):
            require(0 <= getattr(self, name) <= 1, f"{name} must lie in [0, 1], not {getattr(self, name)}")
        for name in ("global_scale", "local_scale", "ibot_ratio"):
            low, high = getattr(self, name)
            require(0 < low <= high <= 1, f"{name} must be two rising shares above 0, not {low}, {high}")
        require(self.local_crops >= 0, f"local_crops must not be negative, and is {self.local_crops}")
        require(self.local_size is None or self.local_size > 0, f"local_size must be positive, not {self.local_size}")
        require(min(self.ibot, self.koleo) >= 0, "the weights ibot and koleo must not be negative")


class DINO(Objective):
    """Cross-entropy between a teacher's and a student's assignment of views to prototypes (arXiv 2104.14294).

    The student s reads all views V, the teacher t the two global ones; g_s, g_t are backbone and head:

        L = mean over views u of the teacher and v ≠ u of V of -P_t(u) · log P_s(v)
        P_t = softmax((g_t(u) - c) / τ_t),  P_s = softmax(g_s(v) / τ_s)

    After each update: θ_t ← m θ_t + (1 - m) θ_s (section 3.1), c ← m_c c + (1 - m_c) mean(g_t) (equation 4), the mean
    over the whole batch, whatever the parts it was computed in. With `ibot`, hidden patches of the student's global
    views are assigned as the teacher assigns them unhidden (arXiv 2111.07832, equation 2), by the same head, with a
    centre of their own. The teacher is what is kept.
    """

    Config = DINOConfig
    compares = True

    def __init__(self, network: Network, config: DINOConfig = DINOConfig()):
        super().__init__()
        self.network, self.config = network, config
        self.grid = require_one_token_each(network, "dino with ibot") if config.ibot else (0, 0)
        width = network.backbone.width
        sizes = {"hidden": config.hidden_dim, "bottleneck": config.bottleneck_dim}
        self.head = PrototypeHead(width, config.prototypes, **sizes, fixed_length=config.fixed_length)
        self.mask_token = mask_token(network.architecture.backbone.embed_dim) if config.ibot else None
        self.teacher = copy.deepcopy(network).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)
        self.centre: Tensor
        self.register_buffer("centre", torch.zeros(2, config.prototypes))
        self.sums = torch.zeros(2, config.prototypes + 1)  # no buffer: processes must not share it before its time
        self.progress = 0.0

    @property
    def kept(self) -> Network:
        return self.teacher

    def train(self, mode: bool = True) -> "DINO":
        """Training leaves the teacher as it evaluates."""
        super().train(mode)
        self.teacher.eval()
        return self

    def views(self, augment: Augment, preprocess: Preprocess) -> Callable[..., Any]:
        config, shape = self.config, self.network.architecture.backbone
        patch = getattr(shape, "patch_size", (1, 1))
        sides = [
            config.local_size or max(round(side * 3 / 7 / part), 1) * part
            for side, part in zip(shape.image_size, patch, strict=True)
        ]
        crops = Crops(config.global_scale, config.local_scale, config.local_crops, (sides[0], sides[1]), config.colour)
        return crops.bind(augment, preprocess)

    def before_update(self, progress: float) -> None:
        self.progress = progress
        self.sums = self.centre.new_zeros(self.sums.shape)

    def forward(self, batch: Batch) -> Step:
        config, size = self.config, len(batch.index)
        global_views = torch.cat([batch.pixels, batch.views[0]])
        masks = self._masks(batch)
        with torch.no_grad():
            seen = self.teacher.backbone(global_views)
            from_teacher = self.teacher_head(self.teacher.head.features(seen))
            self._sum(0, from_teacher)
            targets = self._assigned(from_teacher, 0)
        student, tokens = self._student(global_views, masks)
        features = [student]
        if len(batch.views) > 1:
            features.append(self._student(rearrange(batch.views[1], "b v ... -> (v b) ..."), None)[0])
        logits = rearrange(self.head(torch.cat(features)), "(v b) k -> v b k", b=size)
        loss = crossed(rearrange(targets, "(v b) k -> v b k", b=size), logits.float(), config.student_temperature)
        figures = _assignment(targets)
        if masks is not None:
            patches = self._patch_loss(seen.patches, tokens.patches, masks)
            loss, figures["ibot_loss"] = loss + config.ibot * patches, patches.detach()
        if config.koleo:
            apart = torch.stack([koleo(view) for view in student.chunk(2)]).sum()
            loss, figures["koleo_loss"] = loss + config.koleo * apart, apart.detach()
        return Step(loss, figures)

    def _student(self, views: Float[Tensor, "n c h w"], masks: Bool[Tensor, "n p"] | None) -> tuple[Tensor, Tokens]:
        backbone, token = self.network.backbone, self.mask_token
        if masks is None or token is None:
            tokens = backbone(views)
        else:
            with replaced(backbone, lambda x: torch.where(masks[..., None], token.to(x.dtype), x)):
                tokens = backbone(views)
        return self.network.head.features(tokens), tokens

    def _masks(self, batch: Batch) -> Bool[Tensor, "n p"] | None:
        if not self.config.ibot:
            return None
        (low, high), cells = self.config.ibot_ratio, self.grid[0] * self.grid[1]
        masks = []
        for view in range(2):
            drawn = noise(batch.key, 2, salt=10 + view)
            counts = torch.where(drawn[:, 0] < 0.5, (low + (high - low) * drawn[:, 1]) * cells, 0.0).long()
            masks.append(blockwise(batch.key, self.grid, counts.tolist(), salt=20 + view))
        return torch.cat(masks).to(batch.pixels.device)

    def _patch_loss(
        self, seen: Float[Tensor, "n p d"], learned: Float[Tensor, "n p d"], masks: Bool[Tensor, "n p"]
    ) -> Float[Tensor, ""]:
        """The mean over views with hidden patches of the mean over these patches."""
        with torch.no_grad():
            from_teacher = self.teacher_head(seen[masks])
            self._sum(1, from_teacher)
            targets = self._assigned(from_teacher, 1) if len(from_teacher) else from_teacher
        losses = cross_entropy(targets, self.head(learned[masks]).float(), self.config.student_temperature)
        each = 1 / masks.sum(dim=1, keepdim=True).clamp(min=1).expand_as(masks)[masks]
        return (losses * each).sum() / len(masks)

    def _assigned(self, logits: Float[Tensor, "n k"], kind: int) -> Float[Tensor, "n k"]:
        temperature = self.temperature(self.progress)
        if self.config.centring == "sinkhorn":
            return sinkhorn(logits, temperature)
        return sharpened(logits, self.centre[kind], temperature)

    def _sum(self, kind: int, logits: Float[Tensor, "n k"]) -> None:
        self.sums[kind, :-1] += logits.float().sum(dim=0)
        self.sums[kind, -1] += len(logits)

    def temperature(self, progress: float) -> float:
        """The teacher's at a share of the run: a straight rise, then even."""
        config = self.config
        start, end = config.warm_teacher_temperature, config.teacher_temperature
        return start + (end - start) * min(progress / config.teacher_warmup, 1.0) if config.teacher_warmup else end

    def after_backward(self) -> None:
        if self.progress < self.config.frozen_last:
            self.head.last.weight.grad = None

    @torch.no_grad()
    def after_update(self, progress: float) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.sums)
        if self.config.centring == "centre":
            keep = self.config.centre_momentum
            seen = self.sums[:, -1:] > 0
            means = self.sums[:, :-1] / self.sums[:, -1:].clamp(min=1)
            self.centre.copy_(torch.where(seen, self.centre * keep + means * (1 - keep), self.centre))
        momentum = momentum_at(self.config.momentum, progress)
        for ours, theirs in ((self.teacher, self.network), (self.teacher_head, self.head)):
            for kept, new in zip(ours.parameters(), theirs.parameters(), strict=True):
                kept.mul_(momentum).add_(new, alpha=1 - momentum)
            for kept, new in zip(ours.buffers(), theirs.buffers(), strict=True):
                kept.copy_(new)


def momentum_at(start: float, progress: float) -> float:
    """The teacher's momentum at a share of the run: from `start` to 1 along half a cosine (section 3.1)."""
    return 1 + (start - 1) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def _assignment(targets: Float[Tensor, "n k"]) -> dict[str, Tensor]:
    """How unsure the teacher is, as a share of the largest entropy, and how many prototypes it uses."""
    most = math.log(max(targets.shape[1], 2))
    used = torch.special.entr(targets.mean(dim=0)).sum()
    return {
        "teacher_entropy": torch.special.entr(targets).sum(dim=1).mean() / most,
        "prototype_perplexity": used.exp(),
    }


OBJECTIVES = {"dino": DINO}
