"""DeiT: the second token and its classifier."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from parity import spread
from sightline.checkpoints.load import load_bundle
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


@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2", "deit_tiny_patch16_224"])
@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_a_bare_file_with_or_without_a_row_for_the_class_token(name, size, tmp_path):
    shape = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}
    model = spread(timm.create_model(name, num_classes=5, img_size=size, **shape))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    told = {} if size[0] == size[1] else {"img_size": list(size)}
    pixels = torch.randn(2, 3, *size)
    with torch.no_grad():
        ours = load_bundle(tmp_path / "model.safetensors", architecture=name, **told, **shape).network(pixels)
        torch.testing.assert_close(ours, model(pixels), atol=1e-5, rtol=1e-5)
    if not told:
        model.set_input_size((24, 56))
        pixels = torch.randn(2, 3, 24, 56)
        options = {"architecture": name, "image_size": (24, 56), **shape}
        with torch.no_grad():
            ours = load_bundle(tmp_path / "model.safetensors", **options).network(pixels)
            torch.testing.assert_close(ours, model(pixels), atol=1e-5, rtol=1e-5)


def test_the_image_size_has_two_names_and_one_value(tmp_path):
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="one setting"):
        load_bundle(tmp_path / "model.safetensors", image_size=32, img_size=48)
