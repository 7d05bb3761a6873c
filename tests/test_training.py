"""The loop and its parts: schedules, groups, averages, plans, resuming, and many processes as one."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import sightline
from sightline.errors import UserError, WorkError
from sightline.network import create_model
from sightline.objectives.supervised import Supervised
from sightline.recipes.evaluate import evaluate
from sightline.recipes.train import train
from sightline.registry import table
from sightline.training.average import Average
from sightline.training.journal import read
from sightline.training.optimizer import build, decays, groups, set_rate
from sightline.training.run import locked
from sightline.training.schedule import Plan, rate
from sightline.training.settings import Settings
from sightline.training.state import State, Store
from sightline.types import Batch

QUICK = {"epochs": 2, "batch_size": 64, "workers": 0, "network": {"embed_dim": 16, "depth": 2, "num_heads": 2}}


def losses(directory: Path) -> list[float]:
    """The training losses of a run, step by step."""
    return [record["loss"] for record in read(directory / "metrics.jsonl") if "loss" in record]


# The schedule


@pytest.mark.parametrize(
    ("sched", "expected"),
    [
        ("cosine", {0.1: 0.5, 0.2: 1.0, 0.6: 0.1 + 0.9 / 2, 1.0: 0.1}),
        ("linear", {0.1: 0.5, 0.2: 1.0, 0.6: 0.1 + 0.9 / 2, 1.0: 0.1}),
        ("constant", {0.1: 0.5, 0.2: 1.0, 0.6: 1.0, 1.0: 1.0}),
        ("inverse_sqrt", {0.1: 0.5, 0.2: 1.0, 0.8: 0.5, 1.0: math.sqrt(0.2)}),
    ],
)
def test_rates_by_hand(sched, expected):
    settings = Settings(sched=sched, warmup=0.2, min_lr=0.1)
    assert {p: rate(settings, p) for p in expected} == pytest.approx(expected)


@given(
    st.sampled_from(["cosine", "linear", "constant", "inverse_sqrt"]),
    st.floats(0, 0.9),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_a_rate_is_a_share(sched, warmup, floor, progress):
    assert 0 <= rate(Settings(sched=sched, warmup=warmup, min_lr=floor), progress) <= 1


@given(st.integers(1, 10_000), st.lists(st.floats(0.001, 10), min_size=1, max_size=8))
def test_a_plan_made_anew_never_turns_back(total, speeds):
    plan, seconds = Plan(total), 0.0
    for step, speed in enumerate(speeds, start=1):
        if step >= plan.total:
            break
        before = plan.at(step - 1)
        seconds += speed
        plan = plan.replan(step, 100.0 - seconds, seconds / step)
        assert before <= plan.at(step) <= 1
        assert plan.total > step
    assert plan.at(plan.total) == pytest.approx(1)


# Groups, decay, average


def test_decay_leaves_out_what_it_should():
    network = create_model("vit_tiny_patch16_224", 3, image_size=32, depth=1, init_values=0.1, pre_logits=5)
    decayed = {name for name, parameter in network.named_parameters() if decays(name, parameter)}
    assert decayed == {
        "backbone.tokenizer.projection.weight",
        "backbone.encoder.blocks.0.attention.qkv.weight",
        "backbone.encoder.blocks.0.attention.out.weight",
        "backbone.encoder.blocks.0.mlp.fc1.weight",
        "backbone.encoder.blocks.0.mlp.fc2.weight",
        "head.pre_logits.weight",
        "head.classifier.weight",
    }


def test_layer_decay_slows_the_input():
    network = create_model("vit_tiny_patch16_224", 3, image_size=32, depth=2)
    settings = Settings(layer_decay=0.5, weight_decay=0.3)
    scales = {}
    for group in groups(Supervised(network), network, settings):
        for parameter in group["params"]:
            name = next(n for n, p in network.named_parameters() if p is parameter)
            scales[name] = group["scale"]
            assert group["weight_decay"] == (0.3 if decays(name, parameter) else 0.0)
    assert len(scales) == len(list(network.parameters()))
    assert scales["backbone.place.class_token"] == 0.5**3
    assert scales["backbone.encoder.blocks.0.mlp.fc1.weight"] == 0.5**2
    assert scales["backbone.encoder.blocks.1.mlp.fc1.bias"] == 0.5
    assert scales["backbone.norm.weight"] == scales["head.classifier.weight"] == 1.0


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_optimizers_take_the_rate_of_their_group(name):
    network = create_model("vit_tiny_patch16_224", 3, image_size=32, depth=1)
    optimizer = build(Supervised(network), network, Settings(optimizer=name, layer_decay=0.5, lr=1.0))
    set_rate(optimizer, 0.1)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1, 0.05, 0.025}


def test_the_average_of_weights_by_hand():
    network = create_model("vit_tiny_patch16_224", 1, image_size=16, depth=1, embed_dim=2, num_heads=1)
    nn.init.constant_(network.head.classifier.bias, 1.0)
    average = Average(network, 0.5)
    nn.init.constant_(network.head.classifier.bias, 3.0)
    average.update(network, 0)  # early on the decay is (1 + 0) / (10 + 0)
    assert average.network.head.classifier.bias.item() == pytest.approx(0.1 * 1 + 0.9 * 3)
    nn.init.constant_(network.head.classifier.bias, 0.0)
    average.update(network, 1000)
    assert average.network.head.classifier.bias.item() == pytest.approx(2.8 / 2)


@pytest.mark.parametrize("name", table("objectives", "OBJECTIVES"))
def test_every_objective_teaches_the_whole_network(name):
    network = create_model("vit_tiny_patch16_224", 3, image_size=16, depth=2, embed_dim=6, num_heads=2)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    objective = table("objectives", "OBJECTIVES")[name](network).train()
    batch = Batch(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]), torch.arange(4), torch.arange(4))
    step = objective(batch)
    step.loss.backward()
    objective.after_update(0.5)
    assert step.loss.isfinite()
    assert all(value.ndim == 0 for value in step.metrics.values())
    assert not [n for n, p in network.backbone.named_parameters() if p.grad is None or not p.grad.any()]


@settings(deadline=None, max_examples=20)
@given(st.floats(0, 0.9), st.integers(2, 7))
def test_smoothed_loss_is_the_frameworks(smoothing, classes):
    network = create_model("vit_tiny_patch16_224", classes, image_size=16, depth=1, embed_dim=6, num_heads=2)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    objective = Supervised(network, smoothing=smoothing).train()
    pixels, targets = torch.randn(3, 3, 16, 16), torch.randint(classes, (3,))
    batch = Batch(pixels, targets, torch.arange(3), torch.arange(3))
    expected = nn.functional.cross_entropy(network(pixels), targets, label_smoothing=smoothing)
    torch.testing.assert_close(objective(batch).loss, expected)


# Runs


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A short run with everything on that could break a resumed one."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    train("builtin:digits", out=out, **hard())
    return out


def hard() -> dict:
    quick = {**QUICK, "network": {**QUICK["network"], "drop_path_rate": 0.2}}
    return quick | {"mixup": 0.3, "cutmix": 0.5, "smoothing": 0.1, "ema": 0.9, "repeats": 2, "save_seconds": 1e-9}


def test_a_run_leaves_a_model_directory(undisturbed):
    names = {path.name for path in undisturbed.iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "run.json", "metrics.jsonl", "report.html"} <= names
    record = json.loads((undisturbed / "run.json").read_text())
    assert record["status"] == "finished"
    model = sightline.load(undisturbed)
    assert list(model.labels) == [str(i) for i in range(10)]
    assert not model.network.training
    assert "http" not in (undisturbed / "report.html").read_text().replace("http://www.w3.org", "")


def test_tensorboard_reads_the_events_back(undisturbed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(undisturbed))
    events.Reload()
    written = [record["loss"] for record in read(undisturbed / "metrics.jsonl") if "loss" in record]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(written)
    assert {"lr", "val_top1", "images_per_second"} <= set(events.Tags()["scalars"])


def test_the_same_seed_gives_the_same_bits_and_another_does_not(undisturbed, tmp_path):
    train("builtin:digits", out=tmp_path / "again", **hard() | {"workers": 2})
    assert losses(tmp_path / "again") == losses(undisturbed)
    same(undisturbed, tmp_path / "again")
    train("builtin:digits", out=tmp_path / "other", seed=1, **hard())
    assert losses(tmp_path / "other") != losses(undisturbed)


def same(first: Path, second: Path) -> None:
    """Both runs ended with the same weights and the same figures."""
    ours, theirs = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()


def test_a_stopped_run_goes_on_to_the_same_bits(undisturbed, tmp_path, monkeypatch):
    from sightline.training.signals import Interrupted
    from sightline.training.update import Updater

    plain = Updater.__call__

    def stopping_at_17(self, batch, step, lr):
        if step == 17:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, batch, step, lr)

    out = tmp_path / "stopped"
    monkeypatch.setattr(Updater, "__call__", stopping_at_17)
    with pytest.raises(Interrupted, match="SIGTERM") as stop:
        train("builtin:digits", out=out, **hard())
    assert stop.value.status == 143
    monkeypatch.undo()
    assert not (out / "model.safetensors").exists()
    train("builtin:digits", out=out, resume=True)
    same(undisturbed, out)


def test_a_killed_process_goes_on_to_the_same_bits(undisturbed, tmp_path):
    out = tmp_path / "killed"
    settings = json.dumps(hard())
    code = "import json, sys; from sightline.recipes.train import train; "
    code += "train('builtin:digits', out=sys.argv[1], **json.loads(sys.argv[2]))"
    process = subprocess.Popen([sys.executable, "-c", code, str(out), settings])
    deadline = time.monotonic() + 120
    while len(losses(out)) < 9 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (out / "model.safetensors").exists()
    train("builtin:digits", out=out, resume=True)
    same(undisturbed, out)


def test_micro_batches_change_nothing_but_rounding(undisturbed, tmp_path):
    train("builtin:digits", out=tmp_path / "parts", **hard() | {"micro_batch": 24})
    assert losses(tmp_path / "parts") == pytest.approx(losses(undisturbed), rel=1e-3)


def test_two_processes_learn_what_one_does(undisturbed, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "sightline", "train", "builtin:digits", "--out", str(tmp_path / "two"), "--device", "cpu"]
    flags = hard() | hard()["network"]
    del flags["network"]
    for name, value in flags.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("top-1") == 1
    together = losses(tmp_path / "two")
    assert together == pytest.approx(losses(undisturbed), rel=2e-3)
    assert together[:5] == pytest.approx(losses(undisturbed)[:5], rel=1e-5)


def test_a_run_by_the_clock_plans_its_schedule_for_the_time(tmp_path):
    done = train("builtin:digits", out=tmp_path / "clock", minutes=0.15, **QUICK)
    rates = [r["lr"] for r in read(done.directory / "metrics.jsonl") if "lr" in r]
    assert max(rates) > 1e-4
    assert rates[-1] < 0.1 * max(rates)  # the schedule came to its end
    steps = json.loads((done.directory / "run.json").read_text())["steps"]
    assert steps != 2 * 22  # not that of the epochs
    assert done.seconds["train"] < 60


def test_a_run_by_the_clock_that_stopped_before_it_was_planned_still_ends(tmp_path, monkeypatch):
    from sightline.training.signals import Interrupted
    from sightline.training.update import Updater

    plain = Updater.__call__

    def stopping_at_6(self, batch, step, lr):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, batch, step, lr)

    monkeypatch.setattr(Updater, "__call__", stopping_at_6)
    with pytest.raises(Interrupted):
        train("builtin:digits", out=tmp_path / "clock", minutes=0.05, **QUICK)
    monkeypatch.undo()
    done = train("builtin:digits", out=tmp_path / "clock", resume=True)
    assert done.seconds["train"] < 60
    assert json.loads((done.directory / "run.json").read_text())["status"] == "finished"


def test_patience_keeps_the_best(tmp_path):
    done = train("builtin:digits", out=tmp_path / "early", **QUICK | {"lr": 1e-12, "epochs": 9, "patience": 2})
    values = [r["val_top1"] for r in read(done.directory / "metrics.jsonl") if "val_top1" in r]
    assert len(values) < 9
    assert done.metrics["top1"] == pytest.approx(max(values))


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_named(tmp_path, monkeypatch, capsys):
    plain = Supervised.forward

    def poisoned(self, batch):
        step = plain(self, batch)
        return step._replace(loss=step.loss * float("nan"))

    monkeypatch.setattr(Supervised, "forward", poisoned)
    with pytest.raises(WorkError, match="learning rate") as fault:
        train("builtin:digits", out=tmp_path / "nan", **QUICK)
    assert ".png" in str(fault.value)


def test_fine_tuning_starts_from_the_weights_and_an_undecided_head(undisturbed, tmp_path):
    settings = {"epochs": 0.05, "batch_size": 32, "workers": 0, "lr": 1e-9, "weight_decay": 0.0}
    done = train("builtin:digits", weights=undisturbed, out=tmp_path / "fine", **settings)
    assert losses(done.directory)[0] == pytest.approx(math.log(10), abs=0.15)
    ours, theirs = load_file(done.directory / "model.safetensors"), load_file(undisturbed / "model.safetensors")
    torch.testing.assert_close(ours["backbone.norm.weight"], theirs["backbone.norm.weight"])


def test_the_published_recipe_at_a_higher_resolution(undisturbed, tmp_path):
    done = train(
        "builtin:digits",
        weights=undisturbed,
        recipe="fine-tune-as-published",
        image_size=36,
        out=tmp_path / "paper",
        epochs=1,
        batch_size=128,
        workers=0,
    )
    record = json.loads((done.directory / "run.json").read_text())
    assert record["recipe"]["settings"]["optimizer"] == "sgd"
    assert record["recipe"]["settings"]["weight_decay"] == 0
    assert done.model.network.backbone.config.image_size == (36, 36)
    assert done.model.network.backbone.place.positions.grid == (6, 6)


@pytest.fixture
def unlike(tmp_path) -> Path:
    """A folder of wide, tall and square pictures, told apart by the colour of a rectangle."""
    random = np.random.default_rng(0)
    for part, count in (("train", 14), ("val", 5)):
        for channel, (name, size) in enumerate({"wide": (21, 47), "tall": (43, 19), "even": (31, 31)}.items()):
            (tmp_path / "unlike" / part / name).mkdir(parents=True)
            for i in range(count):
                height, width = size + random.integers(-3, 4, 2)
                picture = random.integers(0, 90, (height, width, 3), dtype=np.uint8)
                picture[height // 4 : height // 2, width // 4 : width // 2, channel] = 250
                Image.fromarray(picture).save(tmp_path / "unlike" / part / name / f"{i}.png")
    return tmp_path / "unlike"


def test_images_keep_their_own_aspect_ratio(unlike, tmp_path):
    settings = QUICK | {"resize": "native", "epochs": 12, "batch_size": 14}
    done = train(unlike, out=tmp_path / "native", **settings)
    assert done.metrics["top1"] > 0.9
    model = done.model
    shapes = {tuple(model.preprocess(path).shape[1:]) for path in sorted(unlike.glob("val/*/0.png"))}
    assert len(shapes) == 3
    assert evaluate(done.directory, unlike, batch_size=1).metrics == pytest.approx(done.metrics, abs=1e-5)
    paths = sorted(unlike.glob("val/*/*.png"))
    answers = model.predict([str(path) for path in paths])
    right = [answer.label == path.parent.name for answer, path in zip(answers, paths, strict=True)]
    assert sum(right) / len(right) == pytest.approx(done.metrics["top1"])


def test_what_differs_in_size_is_not_mixed(unlike, tmp_path):
    with pytest.raises(UserError, match="native"):
        train(unlike, out=tmp_path / "native", resize="native", mixup=0.2)
    assert not (tmp_path / "native").exists()


# Faults


def test_a_folder_in_use_is_left_alone(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="another run"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_full_folder_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        train("builtin:digits", out=tmp_path, **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_there_has_to_be_something_to_resume(tmp_path):
    with pytest.raises(UserError, match="no run to resume"):
        train("builtin:digits", out=tmp_path / "nothing", resume=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": 0}, "lr must be positive"),
        ({"smoothing": 1.5}, "smoothing"),
        ({"sched": "sawtooth"}, "sawtooth"),
        ({"epochz": 3}, "Did you mean epochs"),
        ({"model": "vit_tiny_patch16_22"}, "Did you mean"),
        ({"device": "tpu"}, "no device"),
        ({"weights": "none", "recipe": "fine-tune"}, "--weights"),
        ({"network": {"depth": -1}}, "depth must be positive"),
    ],
)
def test_nonsense_is_refused_before_anything_is_made(settings, words, tmp_path):
    with pytest.raises(UserError, match=words):
        train("builtin:digits", out=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


# Checkpoints


def state(step: int) -> State:
    return State(Plan(100), step=step)


def test_the_newest_good_checkpoint_counts(tmp_path):
    store = Store(tmp_path)
    assert store.newest() is None
    for step in range(1, 6):
        store.save(state(step), {"x": torch.full((3,), float(step))})
    assert sorted(path.name for path in tmp_path.glob("*.json")) == [f"step-{i:09d}.json" for i in (3, 4, 5)]
    damaged = tmp_path / "step-000000005.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    (tmp_path / "step-000000004.json").write_text("{")
    found, tensors, passed = store.newest()
    assert (found.step, tensors["x"].tolist()) == (3, [3.0] * 3)
    assert len(passed) == 2
    (tmp_path / "step-000000003.safetensors").unlink()
    with pytest.raises(UserError, match="no good checkpoint"):
        store.newest()


def test_tensors_without_a_manifest_do_not_count(tmp_path):
    store = Store(tmp_path)
    store.save(state(1), {"x": torch.ones(2)})
    store.save(state(2), {"x": torch.zeros(2)})
    (tmp_path / "step-000000002.json").unlink()
    assert store.newest()[0].step == 1
