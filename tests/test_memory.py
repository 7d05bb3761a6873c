"""Memory of a training: foreseen without numbers, held against what a process takes, and kept within limits."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from command import TINY, cli, refusal
from sightline.network import create_model
from sightline.objectives.mae import MAE, MAEConfig
from sightline.objectives.supervised import Supervised
from sightline.recipes.memory import Forecast, Need, available_memory, may_be_taken, plan_memory
from sightline.recipes.pace import noise_of
from sightline.recipes.task import task_of
from sightline.training.settings import Settings

CPU = torch.device("cpu")

MEASURE = """
import json, torch
from sightline.benching.memory import most_of
from sightline.device import give_back_at_once
from sightline.network import create_model, recompute
from sightline.objectives.supervised import Supervised
from sightline.recipes.memory import Forecast
from sightline.recipes.pace import noise_of
from sightline.recipes.task import task_of
from sightline.training.distributed import World
from sightline.training.settings import Settings
from sightline.training.update import Updater

give_back_at_once()
cpu, found = torch.device("cpu"), []
for name, images, again in (
    ("vit_tiny_patch16_224", 8, False),
    ("vit_tiny_patch16_224", 8, True),
):
    network = create_model(name, 7)
    settings = Settings(batch_size=images, micro_batch=images)
    objective = Supervised(network).train()
    forecast = Forecast(objective, settings, noise_of(network), torch.float32)
    foreseen = forecast.step(images, again)
    assert not forecast.kept, "it was foreseen, not measured"
    recompute(network, again)
    update = Updater(objective, settings, World(0, 1, cpu), torch.float32)
    batch = noise_of(network)(images)
    update(batch, 0, 1e-4)
    found.append((foreseen / 1e6, most_of(lambda: update(batch, 0, 1e-4), cpu)))
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process held at most")
def test_what_is_foreseen_is_what_a_process_takes():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    for foreseen, measured in found:
        assert foreseen == pytest.approx(measured, rel=0.25)
    assert found[1][0] < found[0][0] / 2  # recomputed


FAULTS = """
import resource, sys, torch
from sightline import device

for name in sys.argv[1:]:
    getattr(device, name)()
for turn in range(9):
    if turn == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    layers = [torch.ones(2_000_003) for _ in range(11)]
    del layers
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other ways")
def test_memory_is_kept_for_the_next_tensor_or_given_back():
    def faults(*what: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, *what], capture_output=True, text=True, check=True)
        return int(done.stdout)

    pages = 5 * 11 * 8_000_012 // 4096
    assert faults("give_back_at_once", "keep_for_next") < pages / 5  # some growth is left to the heap
    assert faults("keep_for_next", "give_back_at_once") > pages / 2


def test_moments_follow_the_optimiser():
    network = create_model("vit_pico_patch4_32", 3)
    weights = sum(parameter.nbytes for parameter in network.parameters())

    def moments(**settings):
        told = Settings(**settings)
        forecast = Forecast(Supervised(network), told, noise_of(network), torch.float32)
        forecast.known[2, False] = 5
        need = forecast.need(2, False)
        assert need.saving == need.weights + need.moments + need.average
        assert need.average == (need.weights if told.ema else 0)
        assert need.further == need.moments + need.average + need.saving + 5
        return need.moments

    assert moments(optimizer="adamw", ema=0.9) == 2 * weights
    assert moments(optimizer="sgd") == weights
    assert weights < moments(optimizer="muon") < 1.5 * weights


def test_what_is_drawn_for_each_image_is_foreseen_too():
    network = create_model("vit_pico_patch4_32", 3, drop_path_rate=0.1)
    settings = Settings(mixup=0.2, cutmix=1.0, smoothing=0.1)
    tiny = create_model("mae_vit_base_patch16_224", 0, 32, patch_size=4, embed_dim=48, depth=2, num_heads=3)
    small = MAEConfig(decoder_dim=24, decoder_depth=1, decoder_heads=2)
    for objective in (task_of("classify").objective(network, settings), MAE(tiny, small)):
        forecast = Forecast(objective, settings, noise_of(objective.network), torch.float32)
        two, four = (forecast.step(images, False) for images in (2, 4))
        assert not forecast.kept
        assert 0 < forecast.gradients < two < four


class Curious(Supervised):
    """Looks at the pixels before it begins."""

    def forward(self, batch):
        assert float(batch.pixels.sum()) != 0.5
        return super().forward(batch)


def test_objectives_that_look_at_pixels_are_measured():
    network = create_model("vit_pico_patch4_32", 3)
    objective = Curious(network)
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    forecast = Forecast(objective, Settings(), noise_of(network), torch.float32)
    two, four = (forecast.step(images, False) for images in (2, 4))
    assert set(forecast.kept) == {False}
    tokens, depth, width = 8 * 8 + 1, 4, 64
    assert (four - two) / 2 > 4 * tokens * depth * width * 5  # at least five activations of each layer, four bytes each
    assert all(torch.equal(before[name], tensor) for name, tensor in objective.state_dict().items())


class Linear(Forecast):
    """A step takes 7 bytes of gradients and 11 an image, or 3 an image where activations are recomputed."""

    compares = False

    def __init__(self, **settings):
        self.settings = Settings(**settings)

    def surely(self, images: int, free: int) -> bool:
        return False

    def need(self, images: int, checkpointing: bool) -> Need:
        return Need(images, checkpointing, 100, 13, 0, 113, 7 + images * (3 if checkpointing else 11))


@pytest.mark.parametrize(
    ("free", "settings", "micro_batch", "checkpointing", "said"),
    [
        (133 + 11 * 64, {}, None, False, ""),
        (132 + 11 * 64, {}, 62, False, "64 images at a time would take"),
        (133 + 11 * 64 - 1, {"memory": 1.0}, 62, False, "62 go at a time"),
        (133 + 11 * 7, {}, 6, False, "6 go at a time"),
        (133 + 11 * 2, {}, 2, False, "2 go at a time"),
        (132 + 11 * 2, {}, 6, True, "6 go at a time and activations are computed twice"),
        (133 + 3 * 2, {}, 2, True, "computed twice instead of kept"),
        (132 + 3 * 2, {}, 2, True, "which is still more: take smaller images"),
        (133 + 3 * 64, {"checkpointing": True}, None, True, ""),
        (133 + 3 * 10, {"checkpointing": True}, 10, True, "10 go at a time: about"),
        (133 + 3 * 10, {"micro_batch": 10}, 10, True, "they stay together and activations are computed twice"),
        (133 + 11 * 10, {"micro_batch": 10}, 10, False, ""),
        (133 + 11 * 64, {"memory": 1.0}, None, False, "memory: about 9.4e-07 GB"),
    ],
)
def test_the_plan_takes_as_many_images_as_fit(free, settings, micro_batch, checkpointing, said):
    plan = plan_memory(Linear(**settings), 64, free)
    assert (plan.micro_batch, plan.checkpointing) == (micro_batch, checkpointing)
    assert said in plan.words
    assert bool(plan.words) == bool(said)


@pytest.mark.parametrize(
    ("free", "settings", "micro_batch", "checkpointing", "said"),
    [
        (132 + 11 * 64, {}, None, True, "they stay together and activations are computed twice"),
        (133 + 3 * 64 - 1, {}, 16, False, "16 go at a time (compared with no others): about"),
        (132 + 3 * 64, {"checkpointing": True}, 62, True, "62 go at a time (compared with no others): about"),
    ],
)
def test_images_that_are_compared_stay_together_if_they_can(free, settings, micro_batch, checkpointing, said):
    class Comparing(Linear):
        compares = True

    plan = plan_memory(Comparing(**settings), 64, free)
    assert (plan.micro_batch, plan.checkpointing) == (micro_batch, checkpointing)
    assert said in plan.words


def test_what_fits_easily_is_not_looked_at(monkeypatch):
    network = create_model("vit_pico_patch4_32", 3)
    forecast = Forecast(Supervised(network), Settings(), noise_of(network), torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(Forecast, "need", None)
        assert plan_memory(forecast, 64, 10**9).micro_batch is None
    assert plan_memory(forecast, 64, 20 * 10**6).micro_batch in range(2, 64)
    large = Forecast(Supervised(create_model("resnet18", 3)), Settings(), noise_of(network), torch.float32)
    assert not large.surely(2, 10**12)


def test_free_memory_is_that_of_the_control_group(tmp_path):
    def write(path: str, text: object) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    write("proc/meminfo", "MemTotal: 9 kB\nMemAvailable: 7000 kB")
    assert available_memory(CPU, tmp_path) == 7000 * 1024
    write("proc/self/cgroup", "0::/outer/inner")
    assert available_memory(CPU, tmp_path) == 7000 * 1024
    write("sys/fs/cgroup/outer/inner/memory.max", "max")
    write("sys/fs/cgroup/outer/inner/memory.current", 11)
    write("sys/fs/cgroup/outer/memory.max", 5000)
    write("sys/fs/cgroup/outer/memory.current", 3000)
    assert available_memory(CPU, tmp_path) == 2000
    write("sys/fs/cgroup/outer/memory.stat", "anon 7\ninactive_file 1300")
    assert available_memory(CPU, tmp_path) == 3300
    write("proc/self/cgroup", "3:cpu:/x\n4:memory:/a")
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", 600)
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", 700)
    assert available_memory(CPU, tmp_path) == 0


def test_stated_memory_counts_what_is_held(monkeypatch):
    monkeypatch.setattr("sightline.recipes.memory.held", lambda device: 700_000_000)
    assert may_be_taken(Settings(memory=3.0), CPU) == 2_300_000_000
    assert may_be_taken(Settings(memory=3.0), CPU, processes=2) == 800_000_000
    assert may_be_taken(Settings(memory=0.5), CPU) == 0
    assert may_be_taken(Settings(), CPU, 2) == pytest.approx(0.375 * available_memory(CPU), rel=0.1)


def test_a_run_keeps_within_its_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("sightline.recipes.memory.held", lambda device: 0)
    words = ("train", "builtin:digits", *TINY, "--epochs", 0.1, "--evaluations", 1)
    said = cli(*words, "--memory", 0.001, "--out", tmp_path / "run")
    assert said.status == 0, said.err
    assert "memory: 64 images at a time would take" in said.err or "memory: 32 images" in said.err
    settings = json.loads((Path(tmp_path) / "run" / "run.json").read_text())["recipe"]["settings"]
    assert settings["micro_batch"] >= 2
    assert settings["memory"] == 0.001
    assert "memory must be positive" in refusal(*words, "--memory", 0, "--out", tmp_path / "other")
