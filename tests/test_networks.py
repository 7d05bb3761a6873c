"""What every registered architecture, backbone, tokenizer and head has to keep."""

import json

import pytest
import timm
import torch
from torch import nn

import sightline
from sightline.errors import UserError
from sightline.network import Architecture, Network, count_macs, count_parameters, create_model, describe
from sightline.registry import table, variants

CODEBOOK = "dvae_small_4_32", {"image_size": (32, 48), "hidden": 8, "groups": 2, "vocab_size": 12}
KINDS = {**table("backbones", "SMALL"), **table("tokenizers", "SMALL"), "dvae": CODEBOOK}


def small(kind: str, **settings) -> Network:
    """A small network of a kind in which every parameter matters."""
    name, overrides = KINDS[kind]
    network = create_model(name, 5, **({**overrides, "image_size": (33, 47)} | settings))
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, mean=float(parameter.ndim == 1 and name.endswith("weight")), std=0.2)
    return network.eval()


@pytest.mark.parametrize("name", variants())
def test_parameter_count_is_the_published_one(name):
    assert count_parameters(describe(name).lay_out()) == variants()[name].parameters


@pytest.mark.parametrize("name", [n for n in variants() if timm.is_model(n)])
def test_names_mean_what_they_mean_in_timm(name):
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=variants()[name].num_classes)
    ours = describe(name)
    assert count_parameters(ours.lay_out()) == count_parameters(theirs)
    assert ours.backbone.image_size == theirs.default_cfg["input_size"][1:]
    assert variants()[name].preprocess["crop_pct"] == theirs.default_cfg["crop_pct"]
    assert variants()[name].preprocess["mean"] == theirs.default_cfg["mean"]


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_any_image_shape_passes(self, kind):
        network = small(kind)
        for height, width in ((33, 47), (64, 32), (17, 96)):
            assert network(torch.randn(2, 3, height, width)).shape == (2, 5)

    def test_every_parameter_receives_a_gradient(self, kind):
        network = small(kind).train()
        network(torch.randn(2, 3, 33, 47)).square().sum().backward()
        learned = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        assert not [name for name, p in learned if p.grad is None or not p.grad.any()]

    def test_stages_lead_to_the_answer(self, kind):
        network = small(kind)
        pixels = torch.randn(2, 3, 33, 47)
        stages, tokens = network.backbone.stages(pixels), network.backbone(pixels)
        assert stages[-1].grid == tokens.grid
        assert tokens.x.shape == (2, tokens.prefix + tokens.grid[0] * tokens.grid[1], network.backbone.width)

    def test_saved_and_loaded_is_the_same_to_the_bit(self, kind):
        network, other = small(kind), small(kind)
        other.load_state_dict(network.state_dict())
        pixels = torch.randn(1, 3, 33, 47)
        assert torch.equal(network(pixels), other(pixels))

    def test_the_architecture_survives_json(self, kind):
        architecture = small(kind).architecture
        written = json.loads(json.dumps(architecture.to_json()))
        assert Architecture.from_json(written) == architecture
        assert Architecture.from_json(written).to_json() == architecture.to_json()

    def test_layers_are_counted_from_the_input(self, kind):
        backbone = small(kind).backbone
        layers = {backbone.layer_of(name) for name, _ in backbone.named_parameters()}
        assert layers | {backbone.depth + 1} == set(range(backbone.depth + 2))  # some have nothing behind the last

    def test_an_image_gets_in_a_batch_the_answer_it_gets_alone(self, kind):
        network = small(kind)
        images = [torch.randn(3, *size) for size in ((33, 47), (70, 20), (16, 16))]
        canvas = torch.full((3, 3, 70, 47), 7.0)  # what lies outside an image must not matter
        for row, image in zip(canvas, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = image
        together = network(canvas, torch.tensor([image.shape[1:] for image in images]))
        for image, answer in zip(images, together, strict=True):
            torch.testing.assert_close(answer, network(image[None])[0], atol=1e-4, rtol=1e-4)

    def test_recomputing_activations_changes_no_answer(self, kind):
        network = small(kind).train()
        pixels = torch.randn(2, 3, 33, 47)
        plain = network(pixels)
        for part in network.modules():
            part.checkpointing = True
        torch.testing.assert_close(network(pixels), plain)


POSITIONS = ["learned", "sincos2d", "sincos1d", "relative", "none"]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("pool", ["token", "avg", "both"])
def test_every_position_and_pooling_holds_in_unlike_batches(positions, pool):
    network = small("vit", positions=positions, global_pool=pool)
    first, second = torch.randn(3, 40, 21), torch.randn(3, 19, 60)
    canvas = torch.zeros(2, 3, 40, 60)
    canvas[0, :, :40, :21], canvas[1, :, :19, :60] = first, second
    together = network(canvas, torch.tensor([[40, 21], [19, 60]]))
    alone = torch.cat([network(first[None]), network(second[None])])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_images_joined_in_one_sequence_learn_what_they_learn_on_a_canvas(pool, monkeypatch):
    network = small("vit", global_pool=pool).train()
    sizes = torch.tensor([[40, 21], [19, 60], [40, 60]])
    canvas = torch.randn(3, 3, 40, 60)
    found = {}
    for joins in (True, False):
        lengths = []
        with monkeypatch.context() as patch:
            patch.setattr(type(network.backbone), "joins", joins)
            patch.setattr(network.backbone.encoder, "forward", _watched(network.backbone.encoder.forward, lengths))
            network.zero_grad()
            output = network(canvas, sizes)
            output.square().sum().backward()
        found[joins] = output, [parameter.grad for parameter in network.parameters()], lengths
    assert found[True][2][0][0] == 1
    assert found[True][2][0][1] < 3 * found[False][2][0][1]  # what fills up is not computed
    for ours, theirs in zip([found[True][0], *found[True][1]], [found[False][0], *found[False][1]], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def _watched(forward, lengths):
    def watched(x, bias=None):
        lengths.append(x.shape)
        return forward(x, bias)

    return watched


def test_what_goes_by_images_keeps_them_on_a_canvas():
    network = small("vit", drop_path_rate=0.5)
    assert network.backbone.eval().joins
    assert not network.backbone.train().joins
    assert not small("vit", positions="relative").backbone.joins
    backbone = small("vit").backbone
    with backbone.encoder.blocks[1].attention.register_forward_pre_hook(lambda *_: None):
        assert not backbone.joins
    assert backbone.joins


@pytest.mark.parametrize("positions", POSITIONS)
def test_where_a_patch_stands_matters_except_without_positions(positions):
    network = small("vit", positions=positions, patch_size=8, image_size=(16, 24))
    pixels = torch.randn(1, 3, 16, 24)
    mirrored = torch.cat([pixels[..., 16:], pixels[..., 8:16], pixels[..., :8]], dim=-1)
    same = torch.allclose(network(pixels), network(mirrored), atol=1e-5)
    assert same == (positions == "none")


def test_patches_that_do_not_divide_the_image():
    padded, dropped = small("vit", patch_size=(7, 5)), small("vit", patch_size=(7, 5), partial_patches="drop")
    pixels = torch.randn(1, 3, 33, 47)
    assert padded.backbone(pixels).grid == (5, 10)
    assert dropped.backbone(pixels).grid == (4, 9)
    whole = nn.functional.pad(pixels, (0, 3, 0, 2))
    torch.testing.assert_close(padded(pixels), padded(whole))
    torch.testing.assert_close(dropped(pixels), dropped(pixels[..., :28, :45]))


def test_a_new_head_is_undecided():
    network = create_model("vit_tiny_patch16_224", 7, image_size=32, depth=1)
    assert not network(torch.randn(2, 3, 32, 32)).any()


def test_no_classes_gives_features():
    network = create_model("vit_tiny_patch16_224", 0, image_size=32, depth=1)
    pixels = torch.randn(2, 3, 32, 32)
    assert network(pixels).shape == (2, 192)
    assert torch.equal(network.eval()(pixels), network.embed(pixels))


def test_pre_logits_layer_has_a_tanh():
    network = small("vit", pre_logits=19)
    features = network.embed(5 * torch.randn(2, 3, 33, 47))
    assert features.shape == (2, 19)
    assert features.abs().max() <= 1


def test_averaging_moves_the_norm_behind_the_pooling_as_in_timm():
    names = set(small("vit", global_pool="avg").state_dict())
    assert "head.norm.weight" in names
    assert "backbone.norm.weight" not in names
    kept = set(small("vit", global_pool="avg", fc_norm=False).state_dict())
    assert "backbone.norm.weight" in kept


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"embed_dim": 25}, "multiple of num_heads"),
        ({"depht": 3}, "Did you mean depth"),
        ({"activation": "gulu"}, "activation"),
        ({"patch_size": 0}, "patch_size must be positive"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"depth": "many"}, "expected int"),
        ({"image_size": 4, "patch_size": 8, "partial_patches": "drop"}, "do not fit"),
        ({"positions": "sincos2d", "embed_dim": 18}, "4 divides"),
    ],
)
def test_nonsense_is_refused_by_name(settings, words):
    with pytest.raises(UserError, match=words):
        small("vit", **settings)


def test_settings_go_by_the_names_of_other_libraries_too():
    ours = small("vit", image_size=(32, 48), activation="relu", pre_logits=7).architecture
    theirs = small("vit", image_size=None, img_size=(32, 48), act_layer="relu", representation_size=7).architecture
    assert ours == theirs


def test_the_encoder_of_the_original_transformer_is_a_configuration():
    network = small("vit", norm="post", activation="relu", positions="sincos1d", final_norm=False)
    tokens = network.backbone(torch.randn(2, 3, 33, 47))
    norm = network.backbone.encoder.blocks[-1].norm2
    plain = (tokens.x - norm.bias) / norm.weight  # the last thing that happens to a token is its norm
    torch.testing.assert_close(plain.mean(dim=-1), torch.zeros(2, plain.shape[1]), atol=1e-3, rtol=0)
    torch.testing.assert_close(plain.var(dim=-1, unbiased=False), torch.ones(2, plain.shape[1]), atol=1e-2, rtol=0)


def test_an_unknown_name_brings_near_ones():
    with pytest.raises(UserError, match="vit_base_patch16_224"):
        create_model("vit_bse_patch16_224")


def test_multiply_adds_are_counted():
    assert count_macs(describe("vit_tiny_patch16_224")) == pytest.approx(1.2537e9, rel=1e-3)
    assert count_macs(describe("vit_tiny_patch16_224", image_size=(112, 224))) < 0.6e9


def test_listing_takes_shell_patterns():
    assert "vit_base_patch16_224" in sightline.list_models("vit_base_*")
    assert sightline.list_models("nothing*") == []
