"""Class activation maps: how much each place speaks for a class (arXiv 1512.04150, section 2)."""

from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from sightline.explanation.relevance import chosen_class
from sightline.explanation.rollout import on_grid
from sightline.types import Tokens


class Activation(NamedTuple):
    """One class and what each place adds to its logit: the mean of `cells` is the logit less the class's bias."""

    index: int
    cells: Float[Tensor, "rows columns"]


def class_activation(head: nn.Module, tokens: Tokens, target: int | None = None) -> Activation | None:
    """The map of class `target`, the most probable where None, of one image: its classifier's weights times the tokens.

    None unless the logits are a linear function of the mean of the patches, which alone makes the map exact: a head
    that pools otherwise, that has a norm or a dense layer behind the pooling, or that has no classifier.
    """
    config: Any = getattr(head, "config", None)
    classifier = getattr(head, "classifier", None)
    if not isinstance(classifier, nn.Linear) or getattr(config, "global_pool", None) != "avg":
        return None
    if config.fc_norm or config.pre_logits is not None or config.distilled:
        return None
    index = chosen_class(head(tokens)[0], target)
    cells = tokens.x[0].float() @ classifier.weight[index].float()
    return Activation(index, on_grid(cells, tokens.grid, tokens.prefix))
