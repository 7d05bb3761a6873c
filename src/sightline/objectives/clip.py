"""Learning from images and their captions: each image is to find its text among those of the batch, and the reverse."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sightline.heads.zero_shot import ClipHead
from sightline.network import ImageTextNetwork
from sightline.objectives.objective import Objective
from sightline.types import Batch, Step


class Contrastive(Objective):
    """CLIP's symmetric loss (arXiv 2103.00020, figure 3) or, where the head has a bias, SigLIP's (arXiv 2303.15343).

    `Batch.targets` are token ids [b, n]. Rows of equal ids are one text, and each of their images fits it: captions of
    small sets repeat themselves, and an image must not be driven away from its own words. Where no two are equal, the
    losses are those of the papers. The texts of one process and of one micro-batch are compared with each other: of a
    batch that is computed in parts, each part is a smaller batch here. The factor of the cosines is learned, and kept
    at 100 or below.
    """

    task = "clip"
    compares = True

    def __init__(self, network: ImageTextNetwork):
        super().__init__()
        self.network = network

    def forward(self, batch: Batch) -> Step:
        network = self.network
        assert isinstance(network, ImageTextNetwork), "images and texts need a network that reads both"
        logits, _ = network.head.match(
            network.encode_image(batch.pixels, batch.sizes), network.encode_text(batch.targets)
        )
        same = same_text(batch.targets)
        sigmoid = self.network.head.logit_bias is not None
        loss = sigmoid_loss(logits, same) if sigmoid else contrastive_loss(logits, same)
        found = same.gather(1, logits.detach().argmax(dim=1, keepdim=True)).float().mean()
        return Step(loss, {"accuracy": found, "scale": self.network.head.logit_scale.detach().exp()})

    def after_update(self, progress: float) -> None:
        head = self.network.head
        assert isinstance(head, ClipHead)
        head.clamp()


def same_text(ids: Int[Tensor, "b n"]) -> Bool[Tensor, "b b"]:
    """Which rows are equal; every row is equal to itself."""
    return (ids[:, None] == ids[None]).all(dim=2)


def contrastive_loss(logits: Float[Tensor, "b b"], same: Bool[Tensor, "b b"]) -> Float[Tensor, ""]:
    """The mean cross-entropy of images over texts and of texts over images.

    With z the logits and t_ij the share that text j has of the texts that fit image i (1 for its own where no other is
    equal): L = -1/2b Σ_ij t_ij (log exp(z_ij) / Σ_k exp(z_ik) + log exp(z_ji) / Σ_k exp(z_ki)).
    """
    target = same.to(logits.dtype) / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sigmoid_loss(logits: Float[Tensor, "b b"], same: Bool[Tensor, "b b"]) -> Float[Tensor, ""]:
    """The mean over images of the summed losses of their pairs, each a question of its own (arXiv 2303.15343, eq. 1).

    With s_ij = 1 where text j fits image i and -1 elsewhere: L = -1/b Σ_ij log 1 / (1 + exp(-s_ij z_ij)).
    """
    signs = torch.where(same, 1.0, -1.0)
    return -F.logsigmoid(signs * logits).sum(dim=1).mean()


OBJECTIVES = {"clip": Contrastive}
