"""DETR: the original's matching, loss and positions, transformers' outputs, padded batches, and patches as queries."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from parity.t2t import GOLDENS
from sightline.checkpoints.convert import convert
from sightline.checkpoints.load import load_bundle
from sightline.checkpoints.resnet import TorchvisionResNet, TransformersResNet
from sightline.heads.detect import Detected, found, original
from sightline.heads.matching import Targets, corners, detection_loss, generalized_iou, match
from sightline.images.preprocess import Preprocess
from sightline.layers.positions import sine_positions
from sightline.model import Model, load
from sightline.network import count_parameters, create_model, describe
from sightline.types import Placement, Tokens


def apart(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_positions_are_the_originals():
    values = load_file(GOLDENS / "detr-positions" / "io.safetensors")
    wanted = values["output.positions"]
    ours = sine_positions(values["input.mask"] == 0, wanted.shape[1])
    assert (ours.mT.reshape(wanted.shape) - wanted).abs().max() <= 1e-5


VALUES = load_file(GOLDENS / "detr-criterion" / "io.safetensors")


class TestCriterion:
    case = json.loads((GOLDENS / "detr-criterion" / "case.json").read_text())
    values = VALUES
    targets = tuple(Targets(VALUES[f"input.labels_{i}"], VALUES[f"input.boxes_{i}"]) for i in range(3))

    def test_matches_are_the_originals(self):
        logits, boxes = (self.values[f"input.{name}"].transpose(0, 1) for name in ("logits", "boxes"))
        found = match(logits, boxes, self.targets, [1, 1, 1])
        for layer in range(3):
            for image in range(3):
                wanted = self.values[f"output.match_{layer}_{image}"]
                assert torch.equal(torch.stack(found[layer][image]), wanted.long())

    def test_losses_and_gradients_are_the_originals(self):
        logits = self.values["input.logits"].transpose(0, 1).clone().requires_grad_()
        boxes = self.values["input.boxes"].transpose(0, 1).clone().requires_grad_()
        step = detection_loss(logits, boxes, self.targets)
        assert apart(step.loss.detach()[None], self.values["output.total"]) <= 1e-5
        names = {"loss_class": "loss_ce", "loss_box": "loss_bbox", "loss_giou": "loss_giou"}
        for ours, theirs in names.items():
            assert float(step.metrics[ours]) == pytest.approx(self.case["losses"][theirs], rel=1e-5)
        step.loss.backward()
        assert apart(logits.grad.transpose(0, 1), self.values["output.gradient.logits"]) <= 1e-5
        assert apart(boxes.grad.transpose(0, 1), self.values["output.gradient.boxes"]) <= 1e-5

    def test_boxes_are_read_as_the_original_does(self):
        output = Detected(self.values["input.logits"][-1], self.values["input.boxes"][-1])
        scores, labels, boxes = found(output)
        for i, (height, width) in enumerate(self.case["configuration"]["sizes"]):
            assert torch.equal(labels[i], self.values[f"output.found_labels_{i}"].long())
            assert apart(scores[i], self.values[f"output.scores_{i}"]) <= 1e-5
            # The original does not cut boxes off at the edges of the image, and ours are.
            limits = torch.tensor([width, height, width, height])
            wanted = torch.minimum(self.values[f"output.found_boxes_{i}"].clamp(min=0), limits)
            place = Placement((height, width), (1.0, 1.0), (0.0, 0.0), (height, width))
            assert (original(boxes[i], place) - wanted).abs().max() <= 1e-5 * max(height, width)


def test_overlap_by_hand():
    a, b = torch.tensor([0.0, 0, 2, 3]), torch.tensor([1.0, 1, 4, 6])
    # inner 1×2, union 6 + 15 - 2 = 19, hull 4×6 = 24
    assert float(generalized_iou(a, b)) == pytest.approx(2 / 19 - 5 / 24)
    assert float(generalized_iou(a, a)) == pytest.approx(1)


def test_copies_answer_for_an_object_together():
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.52, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1], [0.9, 0.9, 0.1, 0.1]])
    target = Targets(torch.tensor([1]), boxes[:1])
    layers = torch.zeros(1, 2, 4, 3), boxes.expand(1, 2, 4, 4)
    several, single = match(*layers, [target], [2, 1])
    assert [part.tolist() for part in several[0]] == [[0, 1], [0, 0]]
    assert [part.tolist() for part in single[0]] == [[0], [0]]
    many = Targets(torch.tensor([0, 1, 1]), boxes[:3])
    assert len(match(*layers, [many], [4, 1])[0][0][0]) == 3  # there are not enough queries


SMALL = {
    "layers": (1, 2, 1, 2),
    "channels": (8, 12, 16, 24),
    "stem_chs": 16,
    "image_size": (64, 96),
    "hidden_dim": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "decoder_heads": 4,
    "decoder_mlp": 48,
    "queries": 7,
}


def small(name: str = "detr_resnet50", **settings):
    network = create_model(name, 5, **{**SMALL, **settings})
    spread(network)
    return network.eval()


def spread(network: nn.Module) -> None:
    for name, parameter in [*network.named_parameters(), *network.named_buffers()]:
        center = float(parameter.ndim == 1 and name.endswith(("weight", "running_var")))
        nn.init.normal_(parameter.data, mean=center, std=0.15)
        if name.endswith("running_var"):
            parameter.data.abs_().add_(0.2)


def theirs(network, folder, **config):
    """The network as transformers computes it, from a folder that we wrote."""
    import transformers

    from sightline.checkpoints.directory import write_model
    from sightline.images.preprocess import Preprocess

    write_model(folder / "ours", network, Preprocess(size=(64, 96)), list("abcde"))
    convert(str(folder / "ours"), "transformers", folder / "theirs")
    return transformers.DetrForObjectDetection.from_pretrained(folder / "theirs").eval()


@torch.no_grad()
def test_outputs_are_those_of_transformers(tmp_path):
    network = small()
    other = theirs(network, tmp_path)
    for height, width in ((64, 96), (97, 70), (33, 130)):
        pixels = torch.randn(2, 3, height, width)
        answer, ours = other(pixels), network(pixels)
        assert apart(ours.logits, answer.logits) <= 1e-5
        assert apart(ours.boxes, answer.pred_boxes) <= 1e-5
    back = load_bundle(tmp_path / "theirs")
    assert replace(back.network.architecture.backbone, image_size=(64, 96)) == network.architecture.backbone
    state, again = network.state_dict(), back.network.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[name], again[name]) for name in state)


@torch.no_grad()
def test_padded_batches_are_those_of_transformers(tmp_path):
    network = small(padding="together")
    alone = create_model("detr_resnet50", 5, **SMALL).eval()
    alone.load_state_dict(network.state_dict())
    other = theirs(alone, tmp_path)
    sizes = torch.tensor([[64, 70], [50, 96], [64, 96]])
    pixels, mask = torch.zeros(3, 3, 64, 96), torch.zeros(3, 64, 96, dtype=torch.int64)
    for i, (height, width) in enumerate(sizes.tolist()):
        pixels[i, :, :height, :width] = torch.randn(3, height, width)
        mask[i, :height, :width] = 1
    answer, ours = other(pixels, pixel_mask=mask), network(pixels, sizes)
    assert apart(ours.logits, answer.logits) <= 1e-5
    assert apart(ours.boxes, answer.pred_boxes) <= 1e-5


@torch.no_grad()
def test_names_of_the_original_are_read(tmp_path):
    network = small("detr_resnet50")
    rules = convert_to_original(network, tmp_path)
    again = load_bundle(rules, decoder_heads=4, dilated=False).network
    pixels = torch.randn(2, 3, 64, 96)
    assert torch.equal(network(pixels).logits, again(pixels).logits)


@torch.no_grad()
def test_names_of_timm_are_read_where_older_files_have_them(tmp_path):
    network = small()
    theirs(network, tmp_path)
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    kinds = TransformersResNet(), TorchvisionResNet()
    tables = [
        {rule.ours: rule.theirs for rule in kind.rules(network.architecture.backbone, network.head.config)}
        for kind in kinds
    ]
    before = "model.backbone.conv_encoder.model."
    for ours, names in tables[0].items():
        for name, other in zip(names, tables[1][ours], strict=True):
            if before + name in tensors:
                tensors[before + other] = tensors.pop(before + name)
                tensors[before + other.rsplit(".", 1)[0] + ".num_batches_tracked"] = torch.tensor(3)
    assert before + "layer4.1.conv3.weight" in tensors
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    again = load_bundle(tmp_path / "theirs").network
    pixels = torch.randn(2, 3, 64, 96)
    assert torch.equal(network(pixels).boxes, again(pixels).boxes)


def convert_to_original(network, folder):
    from sightline.checkpoints.directory import write_model
    from sightline.images.preprocess import Preprocess

    write_model(folder / "ours", network, Preprocess(size=(64, 96)), list("abcde"))
    convert(str(folder / "ours"), "original", folder / "detr.safetensors")
    tensors = load_file(folder / "detr.safetensors")
    assert tensors["backbone.0.body.layer1.0.downsample.1.running_mean"].shape == (32,)
    assert tensors["transformer.decoder.layers.2.multihead_attn.in_proj_weight"].shape == (96, 32)
    torch.save({"model": tensors, "epoch": 3}, folder / "detr.pth")
    return folder / "detr.pth"


def test_dilation_keeps_rows_and_columns_as_torchvision_does():
    from torchvision.models import resnet50

    kept = describe("detr_resnet50_dc5", image_size=(64, 96)).build().backbone.eval()
    other = resnet50(replace_stride_with_dilation=[False, False, True]).eval()
    modules = [m for m in other.modules() if isinstance(m, nn.Conv2d)]
    ours = [m for m in kept.modules() if isinstance(m, nn.Conv2d)]

    def key(m: nn.Conv2d) -> tuple:
        return m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.dilation

    assert sorted(map(key, modules)) == sorted(map(key, ours))
    with torch.no_grad():
        assert kept(torch.randn(1, 3, 64, 96)).grid == (4, 6)


@pytest.mark.parametrize("name", ["detr_resnet50", "detr_resnet101_dc5"])
def test_counts_are_those_of_transformers(name):
    import transformers

    depths = list(describe(name).backbone.layers)
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        backbone_config=transformers.ResNetConfig(out_features=["stage4"], depths=depths),
        num_labels=91,
    )
    with torch.device("meta"):
        other = transformers.DetrForObjectDetection(config)
    assert count_parameters(describe(name).lay_out()) == sum(p.numel() for p in other.parameters())


def patches(**settings):
    given = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": (8, 6), "image_size": (33, 47)}
    given |= {"hidden_dim": 16, "encoder_layers": 1, "decoder_layers": 2, "decoder_heads": 2, "decoder_mlp": 20}
    network = create_model("vit_tiny_patch16_224", 5, task="detect", **{**given, **settings})
    for name, parameter in network.named_parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1 and name.endswith("weight")), std=0.2)
    return network.eval()


@pytest.mark.parametrize("make", [small, patches, lambda: patches(queries_from="patches")])
@torch.no_grad()
def test_unlike_sizes_in_a_batch(make):
    network = make()
    images = [torch.randn(3, *size) for size in ((33, 47), (70, 20), (48, 36))]
    canvas = torch.full((3, 3, 70, 47), 7.0)
    for row, image in zip(canvas, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    together = network(canvas, torch.tensor([image.shape[1:] for image in images]))
    real = together.logits[..., -1] < 1e3  # where there is no token, there is no query
    for i, image in enumerate(images):
        alone = network(image[None])
        torch.testing.assert_close(together.logits[i][real[i]], alone.logits[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together.boxes[i][real[i]], alone.boxes[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [small, lambda: patches(queries_from="patches")])
def test_every_parameter_learns_from_objects(make):
    network = make().train()
    target = (
        Targets(torch.tensor([3]), torch.tensor([[0.4, 0.5, 0.2, 0.3]])),
        Targets(torch.empty(0).long(), torch.empty(0, 4)),
    )
    step = network.head.loss(network(torch.randn(2, 3, 64, 96)), target)
    step.loss.backward()
    assert not [n for n, p in network.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert {"loss_class", "loss_box", "loss_giou"} == set(step.metrics)


def test_boxes_begin_where_their_patches_stand():
    head = create_model("vit_tiny_patch16_224", 5, task="detect", image_size=32, depth=1, queries_from="patches").head
    output = head.eval()(Tokens(torch.randn(1, 6, 192), (2, 3)))
    wanted = torch.tensor([[x, y] for y in (1 / 4, 3 / 4) for x in (1 / 6, 1 / 2, 5 / 6)])
    torch.testing.assert_close(output.boxes[0, :, :2], wanted)
    assert corners(output.boxes).shape == (1, 6, 4)


def test_a_network_that_has_hardly_learned_is_saved_and_read(tmp_path):
    settings = {"image_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2, "queries_from": "patches"}
    network = create_model("vit_tiny_patch16_224", 5, task="detect", **settings).eval()
    assert not network.head.box.fc3.weight.any()
    Model(network, Preprocess(size=(32, 32)), list("abcde"), "detect").save(tmp_path / "model")
    pixels = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(load(tmp_path / "model").network(pixels).boxes, network(pixels).boxes)
