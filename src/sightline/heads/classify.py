"""Tokens to class probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline.layers.dense import Dense
from sightline.schema import require
from sightline.types import Area, Placement, Prediction, Score, Step, Tokens


@dataclass(frozen=True)
class ClassifyConfig:
    """The settings of a `ClassifyHead`, under the names that timm's users know.

    `global_pool` reads the class token, the mean of the patch tokens, or both side by side. `fc_norm` normalises what
    was pooled. `pre_logits` is the width of a dense layer with tanh before the classifier, as in the paper's
    pre-training. `distilled` adds a second classifier, which reads the distillation token after the class token (arXiv
    2012.12877, section 4). `num_classes=0` leaves the classifiers out: the pooled features come back. `drop_rate` lies
    in [0, 1). Raises UserError for values out of range or that do not go together.
    """

    num_classes: int = 1000
    global_pool: Literal["token", "avg", "both"] = "token"
    fc_norm: bool = False
    norm_eps: float = 1e-6
    pre_logits: int | None = None
    distilled: bool = False
    drop_rate: float = 0.0

    def __post_init__(self) -> None:
        require(self.num_classes >= 0, f"num_classes must not be negative, and is {self.num_classes}")
        require(self.pre_logits is None or self.pre_logits > 0, f"pre_logits must be positive, not {self.pre_logits}")
        require(0 <= self.norm_eps < 1, f"norm_eps must lie in [0, 1), not {self.norm_eps}")
        require(0 <= self.drop_rate < 1, f"drop_rate must lie in [0, 1), not {self.drop_rate}")
        plain = self.global_pool == "token" and not self.fc_norm and self.pre_logits is None
        require(plain or not self.distilled, "distilled goes with global_pool='token', without fc_norm and pre_logits")


class ClassifyHead(nn.Module):
    """Pools the tokens and reads one logit for each class (arXiv 2010.11929, equation 4 and section 3.2).

    The classifier starts at zero, as for fine-tuning: every class is equally probable at first.
    """

    Config = ClassifyConfig
    task = "classify"
    per_class = ("classifier.", "distillation_classifier.")
    before_classes = ("pre_logits.",)

    def __init__(self, config: ClassifyConfig, width: int):
        super().__init__()
        self.config = config
        pooled = 2 * width if config.global_pool == "both" else width
        features = self.width = config.pre_logits or pooled
        self.norm = nn.LayerNorm(pooled, eps=config.norm_eps) if config.fc_norm else nn.Identity()
        self.pre_logits = Dense(pooled, features) if config.pre_logits else None
        self.drop = nn.Dropout(config.drop_rate)
        self.classifier = Dense(features, config.num_classes) if config.num_classes else None
        second = config.distilled and config.num_classes > 0
        self.distillation_classifier = Dense(features, config.num_classes) if second else None
        self.renew()

    def features(self, tokens: Tokens) -> Float[Tensor, "b d"]:
        """What the classifier reads of each image: its embedding; of two classifiers, the mean of what they read."""
        if self.config.distilled:
            of_class, of_distillation = self._two(tokens)
            return (of_class + of_distillation) / 2
        pool = self.config.global_pool
        assert pool == "avg" or tokens.prefix > 0, "pooling by the class token needs a backbone with one"
        parts = [tokens.x[:, 0]] * (pool != "avg") + [tokens.mean()] * (pool != "token")
        pooled = self.norm(torch.cat(parts, dim=1))
        return pooled if self.pre_logits is None else torch.tanh(self.pre_logits(pooled))

    def _two(self, tokens: Tokens) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        assert tokens.prefix > 1, "a distilled head needs a backbone with a distillation token"
        return tokens.x[:, 0], tokens.x[:, 1]

    def pair(self, tokens: Tokens) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b k"]]:
        """The logits of the class token and those of the distillation token, which learn from labels and a teacher.

        Raises AssertionError where the head has not two classifiers.
        """
        assert self.classifier is not None, "the head has no classifiers"
        assert self.distillation_classifier is not None, "the head is not distilled"
        of_class, of_distillation = (self.drop(token) for token in self._two(tokens))
        return self.classifier(of_class), self.distillation_classifier(of_distillation)

    def renew(self) -> None:
        """Forgets the classes: each classifier starts at zero."""
        for classifier in (self.classifier, self.distillation_classifier):
            if classifier is not None:
                nn.init.zeros_(classifier.weight)
                nn.init.zeros_(classifier.bias)

    def forward(self, tokens: Tokens, area: Area | None = None) -> Float[Tensor, "b k"]:
        """Logits [batch, classes]; of two classifiers, their mean. Features [batch, width] where there is none."""
        if self.distillation_classifier is not None:
            of_class, of_distillation = self.pair(tokens)
            return (of_class + of_distillation) / 2
        features = self.drop(self.features(tokens))
        return features if self.classifier is None else self.classifier(features)

    def loss(self, output: Float[Tensor, "b k"], target: Int[Tensor, " b"] | Float[Tensor, "b k"]) -> Step:
        """Cross-entropy against class indices or soft targets, and the accuracy in the batch."""
        hard = target if target.ndim == 1 else target.argmax(dim=1)
        accuracy = (output.detach().argmax(dim=1) == hard).float().mean()
        return Step(F.cross_entropy(output.float(), target), {"accuracy": accuracy})

    def read(
        self,
        output: Float[Tensor, "b k"],
        labels: Sequence[str],
        top: int = 5,
        places: Sequence[Placement] | None = None,
    ) -> list[Prediction]:
        """The answer for each image: the `top` most probable classes in falling order."""
        return most_probable(output, labels, top)


def most_probable(logits: Float[Tensor, "b k"], labels: Sequence[str], top: int) -> list[Prediction]:
    """For each image the `top` most probable of `labels`, in falling order."""
    scores, indices = logits.float().softmax(dim=1).topk(min(top, logits.shape[1]), dim=1)
    return [
        Prediction([Score(labels[i], i, s) for s, i in zip(row_s, row_i, strict=True)])
        for row_s, row_i in zip(scores.tolist(), indices.tolist(), strict=True)
    ]


HEADS = {"classify": ClassifyHead}
