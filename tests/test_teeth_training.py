"""The loop alone, on a network of a few numbers: what it keeps, what it leaves out, and when it stops."""

import os
import signal
import subprocess
import sys
from itertools import count

import pytest
import torch

from sightline.errors import UserError, WorkError
from sightline.network import create_model
from sightline.objectives.supervised import Supervised, SupervisedConfig
from sightline.training.distributed import World
from sightline.training.loop import Loop, Task
from sightline.training.saver import Saver
from sightline.training.schedule import Plan
from sightline.training.settings import Settings
from sightline.training.signals import Interrupted
from sightline.training.state import State, Store
from sightline.training.update import Updater
from sightline.types import Batch

ALONE = World(0, 1, torch.device("cpu"))
PLAIN = {"epochs": 3, "batch_size": 6, "workers": 0, "lr": 0.05, "evaluations": 3, "save_seconds": 1e9}


def objective(**changes) -> Supervised:
    torch.manual_seed(4)
    size = {"image_size": 4, "patch_size": 2, "embed_dim": 4, "depth": 3, "num_heads": 1, "drop_path_rate": 0.5}
    return Supervised(create_model("vit_tiny_patch16_224", 3, **size), SupervisedConfig(**{"mixup": 0.4, **changes}))


def batch(step: int, size: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(step)
    index = torch.arange(size) + size * step
    pixels = torch.randn(size, 3, 4, 4, generator=generator)
    return Batch(pixels, torch.randint(3, (size,), generator=generator), index, index)


def loop(folder, at=None, *, resume=False, refused=(), poisoned=(), **settings) -> Loop:
    """A run of 15 steps; `at` maps steps to what happens before them."""

    def batches(step, say):
        for number in count(step):
            if at and number in at:
                at[number]()
            made = batch(number)
            if number in poisoned:
                made = made._replace(pixels=made.pixels * torch.nan)
            yield number, made, [(f"{name}.png", "broken") for name in refused if name == number]

    def evaluate(network, heed):
        heed()
        with torch.no_grad():
            return {"top1": float(torch.sin(9 * network(batch(10**6).pixels).sum())), "loss": 1.0}

    taught = objective()
    task = Task(
        objective=taught,
        settings=Settings(**{**PLAIN, **settings}),
        batches=batches,
        images=90,
        steps_per_epoch=5,
        evaluate=evaluate,
        name=lambda index: f"{index}.png",
    )
    folder.mkdir(exist_ok=True)
    return Loop(task, ALONE, folder, precision=torch.float32, resume=resume, quiet=True)


def terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def crashed() -> None:
    raise ZeroDivisionError


def kept(begun: Loop) -> None:
    """Leaves a checkpoint of a run before its first step."""
    begun._keep()
    begun.saver.wait()
    begun.journal.close()


def weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# Going on


@pytest.mark.parametrize("settings", [{"ema": 0.8}, {"patience": 3}, {"optimizer": "sgd", "sched": "linear"}])
def test_a_run_that_was_stopped_and_crashed_ends_with_the_same_bits(tmp_path, settings):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    undisturbed = loop(whole, **settings).run()
    with pytest.raises(Interrupted, match="SIGTERM after step"):
        loop(broken, {7: terminated}, **settings).run()
    assert Store(broken / "checkpoints").newest()[0].step in (7, 8)
    with pytest.raises(ZeroDivisionError):
        loop(broken, {13: crashed}, resume=True, **settings).run()
    again = loop(broken, resume=True, **settings)
    ended = again.run()
    assert equal(weights(ended.network), weights(undisturbed.network))
    assert ended.metrics == undisturbed.metrics
    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    last = [Store(folder / "checkpoints").newest() for folder in (whole, broken)]
    assert equal(dict(last[0][1]), dict(last[1][1]))
    assert (last[0][0].best, last[0][0].stale) == (last[1][0].best, last[1][0].stale)


def test_a_resumed_run_follows_the_plan_it_had(tmp_path):
    begun = loop(tmp_path)
    begun.state.plan = Plan(77, 3, 0.25)
    kept(begun)
    again = loop(tmp_path, resume=True)
    again.journal.close()
    assert again.state.plan == Plan(77, 3, 0.25)


def test_a_state_of_another_network_is_refused(tmp_path):
    kept(loop(tmp_path))
    with pytest.raises(UserError, match="average"):
        loop(tmp_path, resume=True, ema=0.9)


def test_a_second_signal_ends_the_process_at_once():
    code = (
        "import os, signal, time; from sightline.training.signals import listening\n"
        "with listening() as request:\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.3); print(request.number, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(5); print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, f"{signal.SIGTERM:d}\n")


# Saving


def test_what_is_saved_is_what_was_there_when_saving_began(tmp_path):
    tensors = {"w": torch.ones(3)}
    saver = Saver(Store(tmp_path), first=lambda: tensors["w"].zero_())
    saver.save(State(Plan(9)), tensors)
    assert Store(tmp_path).newest()[1]["w"].tolist() == [1, 1, 1]


def test_a_checkpoint_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    saver = Saver(Store(tmp_path / "file" / "checkpoints"), first=lambda: None)
    saver.start(State(Plan(9)), {"w": torch.ones(3)})
    with pytest.raises(WorkError, match="could not be saved"):
        saver.wait()


def test_there_has_to_be_room_for_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr("sightline.training.state.free_bytes", lambda folder: 1000)
    with pytest.raises(UserError, match=r"need [\d,]+ bytes .* and 1,000 are free"):
        loop(tmp_path)


# Updates


def updated(taught: Supervised, **settings) -> tuple[Updater, dict[str, torch.Tensor]]:
    updater = Updater(taught.train(), Settings(**{**PLAIN, **settings}), ALONE, torch.float32)
    updater(batch(3), 3, 0.05)
    return updater, weights(taught)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_micro_batches_make_the_same_update(size):
    _, whole = updated(objective(), optimizer="sgd", clip_grad=None)
    _, parts = updated(objective(), optimizer="sgd", clip_grad=None, micro_batch=size)
    assert not equal(whole, weights(objective()))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=1e-6)


def test_where_memory_does_not_suffice_the_update_is_made_in_parts(monkeypatch):
    _, whole = updated(objective(), optimizer="sgd", clip_grad=None)
    plain = Supervised.forward

    def greedy(self, part):
        if len(part.index) > 2:
            raise MemoryError
        return plain(self, part)

    monkeypatch.setattr(Supervised, "forward", greedy)
    updater, parts = updated(objective(), optimizer="sgd", clip_grad=None)
    assert updater.micro_batch == 2
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=1e-6)


def test_an_update_without_a_finite_gradient_moves_nothing():
    taught = objective()
    updater, before = updated(taught)
    moments = {i: {n: t.clone() for n, t in state.items()} for i, state in enumerate(updater.optimizer.state.values())}
    update = updater(batch(4)._replace(pixels=torch.full((6, 3, 4, 4), torch.nan)), 4, 0.05)
    assert not update.finite
    assert equal(weights(taught), before)
    after = updater.optimizer.state.values()
    assert all(equal(dict(state), moments[i]) for i, state in enumerate(after))


def test_gradients_that_are_never_finite_end_the_run_with_the_images(tmp_path):
    with pytest.raises(WorkError, match=r"the last at step 8 with the images 48\.png"):
        loop(tmp_path, poisoned=range(4, 15)).run()
    assert loop(tmp_path / "once", poisoned=[4, 6]).run().steps == 15


# Images that cannot be read


def test_a_few_unreadable_images_are_noted_and_many_end_the_run(tmp_path):
    few = loop(tmp_path / "few", refused=[2, 9], refused_limit=0.03).run()
    assert few.refused == {"2.png": "broken", "9.png": "broken"}
    with pytest.raises(WorkError, match=r"3 of the 90 training images cannot be read \(2\.png: broken"):
        loop(tmp_path / "many", refused=[2, 9, 11], refused_limit=0.03).run()
