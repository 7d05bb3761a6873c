"""Distillation (arXiv 1503.02531, and 2012.12877 with a token of its own): learning from labels and a teacher."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline.errors import UserError
from sightline.images.preprocess import Preprocess
from sightline.network import Network
from sightline.objectives.supervised import Supervised, SupervisedConfig
from sightline.schema import require
from sightline.types import Batch, Step


@dataclass(frozen=True)
class DistillConfig(SupervisedConfig):
    """The settings of `Distill`, and those of `Supervised`.

    `teacher` names a model of these classes, as `load` takes it, or `timm:NAME@FILE`. It sees what the student sees, in
    every update ("views"), or each image once, as evaluation prepares it ("images"), which costs less and teaches less.
    `kind` is what is learned of it: its answer ("hard") or its probabilities at `temperature` ("soft"); `alpha` is the
    weight of that against the labels. Raises UserError for values out of range.
    """

    teacher: str = ""
    teacher_sees: Literal["views", "images"] = "views"
    kind: Literal["hard", "soft"] = "hard"
    alpha: float = 0.5
    temperature: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.alpha <= 1, f"alpha must lie in [0, 1], not {self.alpha}")
        require(self.temperature > 0, f"temperature must be positive, not {self.temperature}")


class Teacher(nn.Module):
    """A frozen network's logits for pixels that a student reads by another contract; `order` are places of classes."""

    def __init__(self, network: nn.Module, own: Preprocess, students: Preprocess, order: list[int]):
        super().__init__()
        self.network, self.size = network.requires_grad_(False).eval(), own.size
        self.order: Tensor
        self.scale: Tensor
        self.shift: Tensor
        # (students' x * std + mean - own mean) / own std, of pixels from 0 to 1
        (mean, std), (m, s) = ((torch.tensor(part.mean), torch.tensor(part.std)) for part in (students, own))
        self.register_buffer("order", torch.tensor(order))
        self.register_buffer("scale", (std / s)[:, None, None])
        self.register_buffer("shift", ((mean - m) / s)[:, None, None])

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)  # whatever the student does

    @torch.no_grad()
    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k"]:
        pixels = pixels * self.scale + self.shift
        if pixels.shape[2:] != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bilinear", align_corners=False, antialias=True)
        return self.network(pixels).float()[:, self.order]


class Distill(Supervised):
    """A weighted sum of what labels y say and what a teacher says (arXiv 2012.12877, equations 2 and 3).

    With logits z of the class token and z' of the distillation token (z' = z in a network without one), z_t the
    teacher's and H cross-entropy:

        hard: L = (1 - α) H(z, y) + α H(z', argmax z_t)
        soft: L = (1 - α) H(z, y) + α τ² KL(softmax(z_t / τ) ‖ softmax(z' / τ))

    A `teacher` is asked about the student's own pixels, varied and mixed (arXiv 2106.05237, section 3). `answers` are
    logits of one that saw each training image once, by index, in its place; where images are mixed, so are they.
    """

    Config = DistillConfig
    config: DistillConfig

    def __init__(
        self,
        network: Network,
        config: DistillConfig = DistillConfig(),
        *,
        teacher: Teacher | None = None,
        answers: Float[Tensor, "n k"] | None = None,
    ):
        super().__init__(network, config)
        assert (teacher is None) != (answers is None), "one of both is asked"
        classes = network.architecture.head.num_classes
        if answers is not None and answers.shape[1] != classes:
            raise UserError(f"the teacher knows {answers.shape[1]} classes, and there are {classes} to learn")
        self.teacher = teacher
        self.answers: Tensor | None
        self.register_buffer("answers", answers, persistent=False)

    @property
    def by_labels(self) -> bool:
        return super().by_labels and self.config.kind == "hard"

    def forward(self, batch: Batch) -> Step:
        config, pixels = self.config, batch.pixels
        targets: Int[Tensor, " b"] | Float[Tensor, "b k"] = batch.targets
        mixing = self.training and (config.smoothing or config.mixup or config.cutmix)
        if mixing:
            pixels, targets = self.mixed(batch, batch.targets, config.smoothing)
        if self.teacher is not None:
            told = self._told(self.teacher(pixels))
        else:
            assert self.answers is not None
            told = self._told(self.answers[batch.index].float())
            if mixing:
                _, told = self.mixed(batch, told, 0.0)
        tokens = self.network.backbone(pixels, batch.sizes)
        head = self.network.head
        two = getattr(head, "distillation_classifier", None) is not None
        of_labels, of_teacher = head.pair(tokens) if two else (head(tokens),) * 2
        step = self.loss(of_labels, targets)
        taught = self._taught(of_teacher.float(), told)
        alike = (of_teacher.detach().argmax(dim=1) == told.argmax(dim=1)).float().mean()
        loss = (1 - config.alpha) * step.loss + config.alpha * taught
        return Step(loss, {**step.metrics, "agreement": alike})

    def _told(self, said: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
        """The targets that a teacher's logits are."""
        if self.config.kind == "hard":
            return F.one_hot(said.argmax(dim=1), said.shape[1]).float()
        return (said / self.config.temperature).softmax(dim=1)

    def _taught(self, logits: Float[Tensor, "b k"], told: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
        if self.config.kind == "hard":
            return F.cross_entropy(logits, told)
        heat = self.config.temperature
        own = torch.special.entr(told).sum(dim=1).mean()  # what no student can get below
        return heat**2 * (F.cross_entropy(logits / heat, told) - own)


OBJECTIVES = {"distill": Distill}
