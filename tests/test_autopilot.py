"""What is chosen for the user: by the images, the machine and the time."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sightline.datasets.folder import read_splits
from sightline.datasets.image_set import ImageSet, Names, Samples
from sightline.model import load
from sightline.network import describe
from sightline.objectives.supervised import Supervised
from sightline.recipes.autopilot import autopilot
from sightline.recipes.fine_tune import ahead_of_scratch, usual
from sightline.recipes.from_scratch import SIZES, from_scratch, resolution
from sightline.recipes.mirroring import mirroring
from sightline.recipes.pace import measure
from sightline.recipes.recipe import Facts, Recipe, facts
from sightline.recipes.task import task_of
from sightline.tokenizers.convolution import ConvolutionalStem
from sightline.training.distributed import World
from sightline.training.muon import MATRIX_MOMENTUM, RATIO, Muon, orthogonal
from sightline.training.optimizer import build
from sightline.training.settings import Settings

CLASSES = task_of("classify")
ALONE = World(0, 1, torch.device("cpu"))
NOTHING = dict.fromkeys(("model", "weights", "recipe", "resize")) | {"network": {}, "settings": {}, "augment": {}}


def image_set(images: list[np.ndarray], targets: list[int]) -> ImageSet:
    classes = tuple(f"class {i}" for i in range(max(targets) + 1))
    names = Names(str(i) for i in range(len(images)))
    return ImageSet(classes, Samples(names, np.array(targets, dtype=np.int64), Path(), images))


def hooks(count: int) -> ImageSet:
    """A hook that points to the left is one class, to the right the other; both at any place, in noise."""
    random, images, targets = np.random.default_rng(0), [], []
    for i in range(count):
        image = random.integers(0, 60, (32, 32))
        top, left = random.integers(0, 15), random.integers(0, 21)
        hook = np.zeros((18, 12), dtype=np.int64)
        hook[:, :4] = hook[14:, :] = 180
        image[top : top + 18, left : left + 12] += hook if i % 2 else hook[:, ::-1]
        images.append(np.repeat(image[:, :, None], 3, axis=2).astype(np.uint8))
        targets.append(i % 2)
    return image_set(images, targets)


def stripes() -> ImageSet:
    """Stripes that lie and stripes that stand, at any place, in noise; both mean the same when mirrored."""
    random, images = np.random.default_rng(0), []
    for i in range(80):
        wave = 60 * np.sin(np.arange(32) + random.uniform(0, 6))
        plane = 128 + (wave[:, None] if i % 2 else wave[None, :]) + random.normal(0, 10, (32, 32))
        images.append(np.repeat(plane[:, :, None], 3, axis=2).astype(np.uint8))
    return image_set(images, [i % 2 for i in range(80)])


class TestMirroring:
    def test_what_changes_its_meaning_is_not_mirrored(self) -> None:
        found = mirroring(hooks(120), seed=0)
        assert not found.horizontal
        assert "quick classifier" in found.why

    def test_what_keeps_its_meaning_is_mirrored(self) -> None:
        found = mirroring(stripes(), seed=0)
        assert found.horizontal
        assert found.vertical

    def test_the_same_seed_says_the_same(self) -> None:
        assert mirroring(hooks(40), seed=3) == mirroring(hooks(40), seed=3)

    def test_a_handful_of_images_tells_nothing(self) -> None:
        found = mirroring(hooks(6), seed=0)
        assert not found.horizontal
        assert not found.vertical

    def test_nothing_is_measured_where_the_user_said_it(self) -> None:
        assert "not measured" in facts(hooks(20), 0, reflections=False).mirroring.why


@pytest.mark.parametrize(
    ("size", "alike", "expected"),
    [
        ((8, 8), True, (24, 24)),
        ((11, 17), True, (33, 51)),
        ((64, 64), True, (64, 64)),
        ((48, 80), True, (48, 80)),
        ((384, 384), True, (96, 96)),
        ((300, 500), True, (74, 124)),
        ((300, 500), False, (96, 96)),
        ((100, 2000), True, (48, 192)),
    ],
)
def test_resolution(size: tuple[int, int], alike: bool, expected: tuple[int, int]) -> None:
    assert resolution(Facts(1000, 3, size, alike)) == expected


class TestChoice:
    def test_larger_networks_are_taken_where_time_allows(self) -> None:
        known = Facts(1000, 7, (32, 32))
        names = [
            from_scratch(known, minutes=10, pace=lambda recipe, s=seconds: s).architecture.name
            for seconds in (1, 0.1, 0.001)
        ]
        assert names == list(SIZES)

    def test_shape_follows_the_images(self) -> None:
        chosen = from_scratch(Facts(1000, 7, (40, 120)))
        assert chosen.architecture.backbone.image_size == (36, 120)
        assert chosen.preprocess.resize == "squash"
        assert from_scratch(Facts(1000, 7, (40, 120), alike=False)).preprocess.resize == "crop"

    def test_a_run_without_a_clock_does_not_depend_on_the_machine(self) -> None:
        images = hooks(24)
        first, second = (autopilot(CLASSES, images, ALONE, **NOTHING)[0] for _ in range(2))
        assert first == second

    def test_the_user_has_the_last_word(self) -> None:
        said = {"settings": {"lr": 0.5, "batch_size": 6, "micro_batch": 4}, "augment": {"horizontal_flip": 1.0}}
        chosen, network, remarks = autopilot(CLASSES, hooks(24), ALONE, **NOTHING | said | {"network": {"depth": 1}})
        assert (chosen.settings.lr, chosen.settings.batch_size, chosen.settings.micro_batch) == (0.5, 6, 4)
        assert chosen.augment.horizontal_flip == 1.0
        assert network.backbone.depth == 1
        assert "an update takes about" in remarks[0]

    def test_few_images_begin_with_the_weights_that_ship(self) -> None:
        chosen, network, _ = autopilot(CLASSES, hooks(24), ALONE, **NOTHING)
        assert (chosen.name, chosen.architecture.head.num_classes) == ("fine-tune-small", 2)
        assert any("--weights none" in reason for reason in chosen.reasons)
        shipped = load("builtin:tiny").network.backbone.state_dict()
        assert all(torch.equal(tensor, shipped[name]) for name, tensor in network.backbone.state_dict().items())
        assert (
            chosen.settings.lr
            == autopilot(CLASSES, hooks(24), ALONE, **NOTHING | {"weights": "none"})[0].settings.lr / 2
        )

    @pytest.mark.parametrize(
        "said", [{"weights": "none"}, {"network": {"depth": 2}}, {"model": "vit_pico_patch4_32"}, {"resize": "native"}]
    )
    def test_whoever_says_what_to_learn_with_begins_with_random_weights(self, said: dict) -> None:
        assert autopilot(CLASSES, hooks(24), ALONE, **NOTHING | said)[0].name == "from-scratch"

    def test_tiny_and_many_images_begin_with_random_weights(self) -> None:
        assert ahead_of_scratch(Facts(80, 2, (32, 48)))
        assert not ahead_of_scratch(Facts(81, 2, (32, 48)))
        assert not ahead_of_scratch(Facts(80, 2, (48, 31)))
        assert ahead_of_scratch(Facts(4_999, 200, (32, 48)))
        assert not ahead_of_scratch(Facts(5_000, 200, (32, 48)))

    def test_a_length_that_the_user_tells_has_no_other_reason(self) -> None:
        plan = from_scratch(Facts(1000, 7, (40, 120)))
        assert any(reason == "60 epochs show it 60,000 images" for reason in plan.reasons)
        assert plan.told({"lr": 0.5}, {}).reasons == plan.reasons
        for said in ({"epochs": 3.0}, {"minutes": 2.0}):
            assert plan.told(said, {}).reasons == tuple(r for r in plan.reasons if "epochs" not in r)

    def test_small_networks_are_tuned_as_they_are_taught(self) -> None:
        assert usual(describe("vit_nano_patch4_32", 7).lay_out()) == "fine-tune-small"
        assert usual(describe("vit_tiny_patch16_224", 7).lay_out()) == "fine-tune"

    def test_images_of_unlike_sizes_get_plain_patches(self) -> None:
        chosen = autopilot(CLASSES, hooks(24), ALONE, **NOTHING | {"resize": "native"})[0]
        assert chosen.architecture.backbone.tokenizer == "patch"


class TestPace:
    def test_measuring_changes_nothing(self) -> None:
        network = describe("vit_pico_patch4_32", 3).build()
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        state = torch.get_rng_state()
        assert measure(network, Settings(batch_size=6), torch.device("cpu"), torch.float32) > 0
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


class TestMuon:
    def test_orthogonal_keeps_directions_and_levels_lengths(self) -> None:
        matrices = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(0))
        for given in (matrices, matrices.mT):
            u, _, v = torch.linalg.svd(given, full_matrices=False)
            values = (u.mT @ orthogonal(given) @ v.mT).diagonal(dim1=1, dim2=2)
            assert ((values > 0.5) & (values < 1.3)).all()

    def test_a_step(self) -> None:
        parameter = torch.nn.Parameter(torch.zeros(6, 2, 1, 1))
        parameter.grad = torch.randn(6, 2, 1, 1, generator=torch.Generator().manual_seed(0))
        gradient = parameter.grad.flatten(1)
        group = {"params": [parameter], "weight_decay": 0.0, "matrices": True}
        Muon([group], lr=0.01, betas=(0.9, 0.99)).step()
        looked_ahead = gradient + MATRIX_MOMENTUM * ((1 - MATRIX_MOMENTUM) * gradient - gradient)
        expected = -0.01 * RATIO * math.sqrt(3) * orthogonal(looked_ahead[None])[0]
        torch.testing.assert_close(parameter.detach().flatten(1), expected)

    def test_what_is_no_matrix_follows_adamw(self) -> None:
        ours, theirs = (torch.nn.Parameter(torch.ones(7)) for _ in range(2))
        group = {"weight_decay": 0.1}
        mine = Muon([{**group, "params": [ours], "matrices": False}], lr=0.01, betas=(0.9, 0.99))
        reference = torch.optim.AdamW([{**group, "params": [theirs]}], lr=0.01, betas=(0.9, 0.99))
        for _ in range(3):
            ours.grad, theirs.grad = torch.arange(7.0), torch.arange(7.0)
            mine.step()
            reference.step()
        torch.testing.assert_close(ours, theirs)

    def test_kernels_of_the_backbone_are_matrices_and_the_classifier_is_not(self) -> None:
        objective = Supervised(describe("vit_pico_patch4_32", 3, tokenizer="convolution").build())
        names = {id(parameter): name for name, parameter in objective.named_parameters()}
        groups = build(objective, objective.network, Settings(optimizer="muon")).param_groups
        turned = {names[id(p)] for group in groups if group["matrices"] for p in group["params"]}
        assert "network.backbone.tokenizer.layers.0.convolution.weight" in turned
        assert "network.backbone.encoder.0.attention.qkv.weight" in turned or any("attention" in n for n in turned)
        assert not any("head" in name or "positions" in name or "norm" in name for name in turned)

    def test_going_on_from_a_state_is_the_same_as_going_on(self) -> None:
        def taught(parameter: torch.nn.Parameter, optimizer: Muon, steps: range) -> None:
            for step in steps:
                parameter.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
                optimizer.step()

        def muon(parameter: torch.nn.Parameter) -> Muon:
            group = {"params": [parameter], "weight_decay": 0.1, "matrices": True}
            return Muon([group], lr=0.01, betas=(0.9, 0.99))

        whole, parted = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
        taught(whole, muon(whole), range(5))
        first = muon(parted)
        taught(parted, first, range(3))
        second = muon(parted)
        second.load_state_dict(first.state_dict())
        taught(parted, second, range(3, 5))
        assert torch.equal(whole, parted)


class TestConvolutionalStem:
    def test_grid_of_sizes_that_patches_do_not_divide(self) -> None:
        stem = ConvolutionalStem(32, patch_size=(6, 4))
        tokens = stem(torch.randn(2, 3, 13, 17))
        assert tokens.grid == stem.grid((13, 17)) == (3, 5)
        assert tokens.x.shape == (2, 15, 32)

    def test_neighbouring_tokens_see_pixels_in_common(self) -> None:
        stem = ConvolutionalStem(32, patch_size=(8, 8)).eval()
        pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
        stem(pixels).x[0, 4].sum().backward()  # the token in the middle
        assert pixels.grad is not None
        assert pixels.grad[0, :, 7, 12].abs().sum() > 0  # a pixel of the patch above it

    def test_an_image_gets_in_a_batch_of_unlike_sizes_the_answer_it_gets_alone(self) -> None:
        network = describe("vit_pico_patch4_32", 3, tokenizer="convolution").build().eval()
        torch.nn.init.normal_(network.head.classifier.weight)
        pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        together = network(pixels, torch.tensor([[8, 8], [4, 8]]))
        torch.testing.assert_close(together, torch.cat([network(pixels[:1]), network(pixels[1:, :, :4])]))


def test_facts_of_a_folder(tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(5):
            Image.new("RGB", (70 + i, 30), (40 * i, 0, 0)).save(tmp_path / label / f"{i}.png")
    known = facts(read_splits(tmp_path, seed=0, held_out=0.2).train, 0)
    assert (known.images, known.classes, known.alike) == (8, 2, True)
    assert known.size[0] == 30
    assert isinstance(from_scratch(known), Recipe)
