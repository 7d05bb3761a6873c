"""Learning from labels: cross-entropy, with smoothing and mixed images where wanted."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sightline.errors import UserError
from sightline.images.mix import mix
from sightline.network import Network
from sightline.objectives.objective import Objective
from sightline.schema import require
from sightline.types import Batch, Step


@dataclass(frozen=True)
class SupervisedConfig:
    """The settings of `Supervised`.

    `smoothing` spreads that share of each label over all classes; `mixup` (arXiv 1710.09412) and `cutmix` (arXiv
    1905.04899) are the alphas of their beta distributions, 0 for none; `switch_prob` is the share of CutMix with both.
    `loss="sigmoid"` asks of every class alone whether the image shows it. Raises UserError for values out of range.
    """

    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    switch_prob: float = 0.5
    loss: Literal["softmax", "sigmoid"] = "softmax"

    def __post_init__(self) -> None:
        for name in ("smoothing", "switch_prob"):
            require(0 <= getattr(self, name) <= 1, f"{name} must lie in [0, 1], not {getattr(self, name)}")
        for name in ("mixup", "cutmix"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, and is {getattr(self, name)}")


class Supervised(Objective):
    """Cross-entropy of the head's logits z against the labels y, K classes (arXiv 2010.11929, section 3.1).

    softmax: L = -Σ_k y_k log softmax(z)_k. sigmoid: L = -Σ_k [y_k log σ(z_k) + (1 - y_k) log(1 - σ(z_k))], the
    classifier's bias starting at -ln K, at which every class is as improbable as it is (arXiv 2106.10270, section 3).
    """

    Config = SupervisedConfig
    labelled = True

    def __init__(self, network: Network, config: SupervisedConfig = SupervisedConfig()):
        super().__init__()
        self.network, self.config = network, config
        classifier = getattr(network.head, "classifier", None)
        if classifier is None and not getattr(network.head.config, "num_classes", True):
            raise UserError("learning from labels needs a classifier, and the network has none (num_classes=0)")
        if config.loss == "sigmoid" and classifier is not None and not bool(classifier.weight.any()):
            torch.nn.init.constant_(classifier.bias, -math.log(classifier.out_features))

    @property
    def by_labels(self) -> bool:
        return self.config.loss == "softmax"

    def forward(self, batch: Batch) -> Step:
        config = self.config
        if not (self.training and (config.smoothing or config.mixup or config.cutmix)):
            return self.loss(self.network(batch.pixels, batch.sizes), batch.targets)
        assert batch.sizes is None or not (config.mixup or config.cutmix), "images of unlike sizes cannot be mixed"
        pixels, targets = self.mixed(batch, batch.targets, config.smoothing)
        return self.loss(self.network(pixels, batch.sizes), targets)

    def mixed(
        self, batch: Batch, targets: Int[Tensor, " b"] | Float[Tensor, "b k"], smoothing: float
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k"]]:
        """The images of a batch and targets of theirs, mixed in pairs: equally, whatever the targets are."""
        return mix(
            batch.pixels,
            targets,
            batch.key,
            mixup_alpha=self.config.mixup,
            cutmix_alpha=self.config.cutmix,
            switch_prob=self.config.switch_prob,
            num_classes=self.network.architecture.head.num_classes,
            smoothing=smoothing,
        )

    def loss(self, output: Any, targets: Any) -> Step:
        """The loss that the head has for its task; for classes, against their indices or shares."""
        step = self.network.head.loss(output, targets)
        if self.config.loss == "softmax":
            return step
        logits = output
        shares = F.one_hot(targets, logits.shape[1]) if targets.ndim == 1 else targets
        wrong = F.binary_cross_entropy_with_logits(logits.float(), shares.float(), reduction="none")
        return step._replace(loss=wrong.sum(dim=1).mean())


OBJECTIVES = {"supervised": Supervised}
