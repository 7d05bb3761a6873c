"""Every kind of network through every command: taught, stopped, weighed, asked, saved, fine-tuned, carried over."""

import json
import os
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import sightline
from command import Said, cli, refusal
from sightline.checkpoints.convert import convert
from sightline.checkpoints.directory import write_model
from sightline.checkpoints.sealed import sealed
from sightline.datasets.digits import digits
from sightline.datasets.folder import write_images
from sightline.errors import UserError
from sightline.images.preprocess import Preprocess
from sightline.network import Architecture, count_macs, describe
from sightline.objectives.supervised import Supervised
from sightline.registry import table, variant
from sightline.training.journal import read
from sightline.training.optimizer import groups
from sightline.training.settings import Settings
from sightline.training.update import Updater

KINDS = {**table("backbones", "SMALL"), **table("tokenizers", "SMALL")}
FIRST = list({variant(name).family: kind for kind, (name, _) in reversed(KINDS.items())}.values())
"""A kind of each family."""

SIDES = (32, 48)


class Run(NamedTuple):
    """A small network of a kind, taught a little by the command line."""

    kind: str
    folder: Path
    said: Said

    @property
    def model(self) -> sightline.Model:
        return sightline.load(self.folder)


def taught(kind: str, data: Path, out: Path, *more: object) -> Said:
    """A few updates with everything that a run can have, each setting of the network as an option of its own."""
    name, overrides = KINDS[kind]
    settings = {key: value for key, value in overrides.items() if key != "image_size"}
    words = [f"--{key.replace('_', '-')}={json.dumps(value)}" for key, value in settings.items()]
    words += ["--image-size", "x".join(map(str, SIDES)), "--drop-path-rate", 0.2, "--layer-decay", 0.8, "--ema", 0.9]
    words += ["--batch-size", 8, "--micro-batch", 4, "--checkpointing", "--epochs", 1, "--evaluations", 1]
    return cli("train", data, "--model", name, *words, "--workers", 0, "--json", "--out", out, *more)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Forty digits as image files in class folders."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    write_images(digits().select(np.arange(40)), folder)
    return folder


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    """Three of the classes."""
    folder = tmp_path_factory.mktemp("data") / "three"
    write_images(digits().select(np.flatnonzero(np.asarray(digits().targets) < 3)[:24]), folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def run(request, photos, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / request.param
    return Run(request.param, folder, taught(request.param, photos, folder))


def pixels(count: int = 2, size: tuple[int, int] = SIDES) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def test_it_is_taught_and_weighed(run, photos):
    assert run.said.status == 0, run.said.err
    losses = [record["loss"] for record in read(run.folder / "metrics.jsonl") if "loss" in record]
    assert len(losses) >= 3
    assert np.isfinite(losses).all()
    config = run.model.network.architecture.backbone
    assert (config.image_size, config.drop_path_rate) == (SIDES, 0.2)
    weighed = cli("evaluate", run.folder, photos, "--json", "--workers", 0)
    assert weighed.document["metrics"]["top1"] == run.said.document["metrics"]["top1"]


@pytest.mark.parametrize("run", FIRST, indirect=True)
def test_stopped_it_goes_on_to_the_same_bits(run, photos, tmp_path, monkeypatch):
    plain = Updater.__call__

    def stopping(self, batch, step, *words):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, batch, step, *words)

    monkeypatch.setattr(Updater, "__call__", stopping)
    assert taught(run.kind, photos, tmp_path / "again").status == 143
    monkeypatch.undo()
    assert cli("train", photos, "--out", tmp_path / "again", "--resume").status == 0
    first, second = (folder / "model.safetensors" for folder in (run.folder, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()


def test_it_answers_images_of_any_shape(run, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (23, 61), dtype=np.uint8)).save(tmp_path / "wide.png")
    (answer,) = cli("predict", run.folder, tmp_path / "wide.png", "--json").document["results"]
    model = run.model
    (same,) = model.predict([tmp_path / "wide.png"], top=1)
    assert answer["predictions"][0]["label"] == same.label
    features = model.embed([tmp_path / "wide.png"])
    assert features.shape == (1, model.network.head.classifier.in_features)
    assert features.isfinite().all()


def test_saved_again_it_is_the_same_to_the_bit(run, tmp_path):
    model = run.model
    again = sightline.load(model.save(tmp_path / "again"))
    assert again.network.architecture == model.network.architecture
    assert torch.equal(again.network(pixels()), model.network(pixels()))


def test_it_learns_other_classes_at_another_resolution(run, three, tmp_path):
    words = ("--image-size", "40x56", "--epochs", 0.5, "--workers", 0, "--json")
    said = cli("train", three, "--weights", run.folder, *words, "--out", tmp_path / "fine")
    assert said.status == 0, said.err
    tuned = sightline.load(tmp_path / "fine")
    assert tuned.network.architecture.backbone.image_size == (40, 56)
    assert tuned.network(pixels(size=(40, 56))).shape == (2, 3)


SUFFIX = {"timm": "", "transformers": "", "torchvision": ".pth", "original": ".pth", "google": ".npz"}
PUBLISHED_ONLY = {"hybrid"}
"""Kinds that other libraries read at the published sizes alone; the parity tests carry those over."""


def test_other_libraries_carry_it_there_and_back(run, tmp_path):
    name, overrides = KINDS[run.kind]
    ours = sightline.load(run.folder, image_size=32).network(pixels(size=(32, 32)))
    carried = []
    for library, suffix in SUFFIX.items():
        out = tmp_path / f"{library}{suffix}"
        try:
            convert(run.folder, library, out, image_size=32)
        except UserError:
            continue
        carried.append(library)
        told = {**overrides, "architecture": name, "image_size": 32} if suffix else {}
        theirs = sightline.load(out, **told).network(pixels(size=(32, 32)))
        torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=1e-5, msg=library)
    assert carried or run.kind in PUBLISHED_ONLY


def test_its_graph_can_be_exported(run):
    network = run.model.network
    exported = torch.export.export(network, (pixels(),)).module()
    torch.testing.assert_close(exported(pixels()), network(pixels()), atol=1e-6, rtol=1e-5)


def test_every_parameter_learns_at_the_rate_of_its_layer(run):
    network = run.model.network
    sets = groups(Supervised(network), network, Settings(layer_decay=0.5))
    taught_ones = [id(parameter) for group in sets for parameter in group["params"]]
    assert sorted(taught_ones) == sorted(id(p) for p in network.parameters() if p.requires_grad)
    assert {group["scale"] for group in sets} <= {0.5**layers for layers in range(network.backbone.depth + 2)}


# What a family's settings are to the command line


def test_every_setting_of_a_family_is_an_option(photos, tmp_path):
    words = ("--model", "swin_tiny_patch4_window7_224", "--image-size", "32x48", "--epochs", 0.4, "--workers", 0)
    settings = ("--embed-dim", 16, "--depths", "1,2", "--num-heads", "2,4", "--window-size", 4, "--mlp_ratio", 2)
    assert cli("train", *settings, photos, *words, "--out", tmp_path / "run").status == 0
    config = sightline.load(tmp_path / "run").network.architecture.backbone
    assert (config.depths, config.num_heads, config.window_size, config.mlp_ratio) == ((1, 2), (2, 4), (4, 4), 2.0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--depths", "1,2"), "no setting 'depths'. Did you mean depth"),
        (("--model", "swin_t", "--depth", 3), "no setting 'depth'. Did you mean depths"),
        (("--model", "swin_t", "--depths", "a,b"), "depths: expected"),
        (("--model", "pit_ti_224", "--depth", "1,2"), "one number each"),
        (("--windw-size", 4), "unknown option --windw-size"),
        (("--num-classes", 4), "unknown option --num-classes"),
        (("--tokenizer-options", '{"layrs": [1]}', "--model", "vit_base_r50_s16_224"), "Did you mean layers"),
    ],
)
def test_settings_that_a_family_has_not(words, says, photos, tmp_path):
    assert says in refusal("train", photos, *words, "--out", tmp_path / "run")


# What a configuration may ask for

VALUES = [0, -1, 1, 10**6, 2**20, 10**30, 1e30, True, None, "", "x", [], [2**20] * 3, [10**6], [[1]], {"a": 2**20}]


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_is_laid_out_or_refused(kind):
    name, overrides = KINDS[kind]
    written = describe(name, 5, **overrides).to_json()
    for setting in written["backbone"]:
        for value in VALUES:
            try:
                architecture = Architecture.from_json({**written, "backbone": {**written["backbone"], setting: value}})
                if architecture.computed < 2**22:
                    architecture.shapes()
            except UserError:
                continue


SIZES = [
    ("vit_tiny_patch16_224", {"depth": 1025}, "depth 1025 is larger"),
    ("swin_t", {"depths": (600, 600), "num_heads": (3, 6)}, "at most"),
    ("pit_ti_224", {"depth": (500, 500, 500)}, "1500 layers"),
    ("cait_xxs24_224", {"depth": 1000, "depth_token_only": 1000}, "2000 layers"),
    ("resnet18", {"layers": (2, 2, 2, 1025)}, "at most"),
    ("vit_base_r50_s16_224", {"tokenizer_options": {"layers": [100, 100]}}, "at most 128"),
    ("vit_base_r50_s16_224", {"image_size": 2**15}, "makes too many patches: 4194305"),
    ("pit_ti_224", {"image_size": 2**14}, "makes too many patches"),
    ("resnetv2_50x1_bit", {"width_factor": 2**20}, "too large"),
]


@pytest.mark.parametrize(("name", "settings", "says"), SIZES)
def test_sizes_beyond_every_network_are_refused(name, settings, says):
    with pytest.raises(UserError, match=says):
        describe(name, **settings).shapes()


def test_tokens_are_counted_as_the_network_makes_them():
    for name, tokens in (("vit_base_r50_s16_224", 1 + 80 * 80), ("t2t_vit_7", 1 + 80 * 80), ("pit_ti_224", 159 * 159)):
        network = describe(name, image_size=1280).lay_out()
        assert type(network.backbone).tokens(network.backbone.config) == tokens


def test_an_index_of_windows_is_bounded_by_the_weights_beside_it(tmp_path):
    settings = {"image_size": 8, "patch_size": 1, "embed_dim": 2, "depths": (150,), "num_heads": (1,)}
    model = sightline.create_model("swin_t", 2, window_fit="always", **settings, window_size=2)
    write_model(tmp_path, model, Preprocess((8, 8)), "ab")
    config = json.loads((tmp_path / "config.json").read_text())
    config["architecture"]["backbone"]["window_size"] = [32, 32]  # 150 times a million of numbers
    del config["seal"]
    (tmp_path / "config.json").write_bytes(sealed(config))
    with pytest.raises(UserError, match="makes too many patches"):
        sightline.load(tmp_path)


# What a network costs

GMACS = {
    "vit_base_patch16_224": 17.564,
    "vit_base_r50_s16_384": 67.156,
    "deit_base_distilled_patch16_224": 17.657,
    "beit_base_patch16_224": 17.56,
    "dino_vits8": 22.4,
    "vit_small_patch14_dinov2": 46.70,
    "cait_s24_224": 9.4,
    "t2t_vit_14": 4.8,
    "t2t_vit_t_24": 15.0,
    "swin_base_patch4_window12_384": 47.083,
    "swin_t": 4.491,
    "pit_b_224": 12.4,
    "resnetv2_152x2_bit": 45.814,
    "resnet50": 4.1,
}
"""As published, or as measured of the reference implementations."""


@pytest.mark.parametrize("name", GMACS)
def test_multiply_adds_are_the_published_ones(name):
    assert count_macs(describe(name)) / 1e9 == pytest.approx(GMACS[name], rel=0.02)
