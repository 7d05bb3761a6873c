"""Distillation (arXiv 1503.02531, and 2012.12877 with a token of its own): learning from labels and a teacher."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sightline.errors import UserError
from sightline.network import Network
from sightline.objectives.supervised import Supervised, SupervisedConfig
from sightline.schema import require
from sightline.types import Batch, Step


@dataclass(frozen=True)
class DistillConfig(SupervisedConfig):
    """The settings of `Distill`, and those of `Supervised`.

    `teacher` names a model of these classes, as `load` takes it, or `timm:NAME@FILE`. `kind` is what is learned of it:
    its answer ("hard") or its probabilities at `temperature` ("soft"); `alpha` is the weight of that against the
    labels. Raises UserError for values out of range.
    """

    teacher: str = ""
    kind: Literal["hard", "soft"] = "hard"
    alpha: float = 0.5
    temperature: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.alpha <= 1, f"alpha must lie in [0, 1], not {self.alpha}")
        require(self.temperature > 0, f"temperature must be positive, not {self.temperature}")


class Distill(Supervised):
    """A weighted sum of what labels y say and what a teacher says (arXiv 2012.12877, equations 2 and 3).

    With logits z of the class token and z' of the distillation token (z' = z in a network without one), z_t the
    teacher's and H cross-entropy:

        hard: L = (1 - α) H(z, y) + α H(z', argmax z_t)
        soft: L = (1 - α) H(z, y) + α τ² KL(softmax(z_t / τ) ‖ softmax(z' / τ))

    The teacher saw each image once, as evaluation prepares it: `answers` are its logits for every training image by
    index. Where images are mixed, labels and the teacher's answers are mixed alike.
    """

    Config = DistillConfig
    config: DistillConfig

    def __init__(self, network: Network, config: DistillConfig = DistillConfig(), *, answers: Float[Tensor, "n k"]):
        super().__init__(network, config)
        classes = network.architecture.head.num_classes
        if answers.shape[1] != classes:
            raise UserError(f"the teacher knows {answers.shape[1]} classes, and there are {classes} to learn")
        self.answers: Tensor
        self.register_buffer("answers", answers, persistent=False)

    @property
    def by_labels(self) -> bool:
        return super().by_labels and self.config.kind == "hard"

    def forward(self, batch: Batch) -> Step:
        config, pixels = self.config, batch.pixels
        targets: Int[Tensor, " b"] | Float[Tensor, "b k"] = batch.targets
        said = self.answers[batch.index].float()
        told = F.one_hot(said.argmax(dim=1), said.shape[1]).float() if config.kind == "hard" else said
        if config.kind == "soft":
            told = (told / config.temperature).softmax(dim=1)
        if self.training and (config.smoothing or config.mixup or config.cutmix):
            pixels, targets = self.mixed(batch, batch.targets, config.smoothing)
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

    def _taught(self, logits: Float[Tensor, "b k"], told: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
        if self.config.kind == "hard":
            return F.cross_entropy(logits, told)
        heat = self.config.temperature
        own = torch.special.entr(told).sum(dim=1).mean()  # what no student can get below
        return heat**2 * (F.cross_entropy(logits / heat, told) - own)


OBJECTIVES = {"distill": Distill}
