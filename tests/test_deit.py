"""DeiT: the second token and its classifier."""

import pytest
import torch
from torch import nn

from sightline.errors import UserError
from sightline.network import Network, create_model
from sightline.types import Tokens

LITTLE = {"image_size": 16, "patch_size": 8, "embed_dim": 6, "depth": 2, "num_heads": 2}


def distilled(classes: int = 3, **settings: object) -> Network:
    network = create_model("deit_tiny_distilled_patch16_224", classes, **{**LITTLE, **settings})
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    return network.eval()


def test_two_classifiers_read_two_tokens_and_answer_with_their_mean():
    network = distilled()
    x = torch.randn(4, 6, 6)
    tokens, head = Tokens(x, (2, 2), 2), network.head
    of_class, of_distillation = head.pair(tokens)
    torch.testing.assert_close(of_class, head.classifier(x[:, 0]))
    torch.testing.assert_close(of_distillation, head.distillation_classifier(x[:, 1]))
    torch.testing.assert_close(head(tokens), (of_class + of_distillation) / 2)


def test_without_classifiers_the_features_are_the_mean_of_both_tokens():
    network = distilled(0)
    pixels = torch.randn(2, 3, 16, 16)
    tokens = network.backbone(pixels)
    assert tokens.prefix == 2
    torch.testing.assert_close(network(pixels), tokens.x[:, :2].mean(dim=1))


def test_the_distillation_token_stands_after_the_class_token_and_has_a_position():
    place = distilled().backbone.place
    patches = torch.randn(1, 4, 6)
    x = place(Tokens(patches, (2, 2))).x
    table = place.positions.table
    torch.testing.assert_close(x[:, 0], place.class_token[:, 0] + table[:, 0])
    torch.testing.assert_close(x[:, 1], place.distillation_token[:, 0] + table[:, 1])
    torch.testing.assert_close(x[:, 2:], patches + table[:, 2:])


def test_deit_iii_keeps_its_class_token_out_of_the_table():
    network = create_model("deit3_small_patch16_224", 3, **LITTLE)
    assert network.backbone.place.positions.table.shape == (1, 4, 6)
    same = create_model("deit_tiny_patch16_224", 3, no_embed_class=True, init_values=1e-6, **LITTLE)
    assert same.architecture.backbone == network.architecture.backbone


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"global_pool": "avg"}, "distilled goes with"), ({"class_token": False}, "needs a class_token")],
)
def test_what_does_not_go_together_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        distilled(**settings)
