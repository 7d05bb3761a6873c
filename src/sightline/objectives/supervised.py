"""Learning from labels: cross-entropy, with smoothing and mixed images where wanted."""

from sightline.images.mix import mix
from sightline.network import Network
from sightline.objectives.objective import Objective
from sightline.types import Batch, Step


class Supervised(Objective):
    """Cross-entropy of the head's logits against the labels (arXiv 2010.11929, section 3.1).

    `smoothing` spreads that share of each label over all classes; `mixup` (arXiv 1710.09412) and `cutmix` (arXiv
    1905.04899) are the alphas of their beta distributions, 0 for none; `switch_prob` is the share of CutMix with both.
    """

    def __init__(
        self,
        network: Network,
        *,
        smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        switch_prob: float = 0.5,
    ):
        super().__init__()
        self.network = network
        self.smoothing, self.mixup, self.cutmix, self.switch_prob = smoothing, mixup, cutmix, switch_prob

    def forward(self, batch: Batch) -> Step:
        if not (self.training and (self.smoothing or self.mixup or self.cutmix)):
            return self.network.head.loss(self.network(batch.pixels, batch.sizes), batch.targets)
        assert batch.sizes is None or not (self.mixup or self.cutmix), "images of unlike sizes cannot be mixed"
        pixels, targets = mix(
            batch.pixels,
            batch.targets,
            batch.key,
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            switch_prob=self.switch_prob,
            num_classes=self.network.architecture.head.num_classes,
            smoothing=self.smoothing,
        )
        return self.network.head.loss(self.network(pixels, batch.sizes), targets)


OBJECTIVES = {"supervised": Supervised}
