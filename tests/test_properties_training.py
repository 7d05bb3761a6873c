"""What holds for every run: its schedule, its state on disk, its figures, its average of weights."""

import json
import math
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from examples import altered, examples, tried
from sightline.errors import UserError
from sightline.network import create_model
from sightline.schema import from_json, to_json
from sightline.training.average import Average
from sightline.training.journal import Journal
from sightline.training.schedule import Plan, rate
from sightline.training.settings import Settings
from sightline.training.state import State, Store

FIGURES = st.floats(allow_nan=False)
WORDS = st.text(max_size=9)
STATES = st.builds(
    State,
    st.builds(Plan, st.integers(1, 10**9), st.integers(0, 10**6), st.floats(0, 1)),
    step=st.integers(0, 999_999_999),
    seconds=st.floats(0, 1e9),
    best=FIGURES,
    stale=st.integers(0, 99),
    evaluations=st.integers(0, 99),
    infinite=st.integers(0, 9),
    metrics=st.dictionaries(WORDS, FIGURES, max_size=3),
    refused=st.dictionaries(WORDS, WORDS, max_size=3),
)
TENSORS = st.dictionaries(
    st.text("abc.", min_size=1, max_size=5),
    arrays(np.float32, st.lists(st.integers(1, 3), max_size=2).map(tuple)).map(torch.from_numpy),
    min_size=1,
    max_size=3,
)


def same_tensors(one, two) -> bool:
    return one.keys() == two.keys() and all(one[n].numpy().tobytes() == two[n].numpy().tobytes() for n in one)


# Schedule


@given(
    st.integers(1, 10_000),
    st.lists(st.tuples(st.floats(0.001, 10), st.floats(0.01, 3)), max_size=4),
    st.sampled_from(["cosine", "linear", "constant", "inverse_sqrt"]),
    st.floats(0, 0.9),
    st.data(),
)
def test_a_resumed_schedule_is_the_same_to_the_bit(total, looks, sched, warmup, data):
    plan, settings = Plan(total), Settings(sched=sched, warmup=warmup)
    for seconds, pace in looks:
        plan = plan.replan(data.draw(st.integers(plan.step, plan.total - 1)), 10 * seconds, pace)
    again = from_json(State, json.loads(json.dumps(asdict(State(plan)))), "here").plan
    steps = data.draw(st.lists(st.integers(plan.step, plan.total), min_size=1, max_size=9))
    assert [rate(settings, again.at(step)) for step in steps] == [rate(settings, plan.at(step)) for step in steps]
    progress = [plan.at(step) for step in sorted(steps)]
    assert progress == sorted(progress)
    assert 0 <= progress[0] <= progress[-1] <= 1 + 1e-12


# State


@examples(20)
@given(STATES, TENSORS)
def test_a_state_comes_back_bit_for_bit(tmp_path_factory, state, tensors):
    store = Store(tmp_path_factory.mktemp("store"))
    store.save(state, tensors)
    found, again, passed = store.newest()
    assert found == state
    assert math.copysign(1, found.best) == math.copysign(1, state.best)
    assert same_tensors(again, tensors)
    assert passed == []


@examples(12)
@given(st.lists(TENSORS, min_size=2, max_size=4), st.data())
def test_a_damaged_checkpoint_is_passed_over(tmp_path_factory, saved, data):
    store = Store(tmp_path_factory.mktemp("store"))
    for step, tensors in enumerate(saved):
        store.save(State(Plan(9), step=step), tensors)
    newest = len(saved) - 1
    file = store.directory / f"step-{newest:09d}.{data.draw(st.sampled_from(['json', 'safetensors']))}"
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    file.write_bytes(content)
    state, tensors, passed = store.newest()
    assert state.step == newest - 1
    assert same_tensors(tensors, saved[newest - 1])
    assert [f"step-{newest:09d}" in words for words in passed] == [True]


@examples(6)
@given(st.lists(st.integers(0, 99), min_size=1, max_size=7, unique=True).map(sorted))
def test_the_newest_few_checkpoints_stay(tmp_path_factory, steps):
    store = Store(tmp_path_factory.mktemp("store"))
    for step in steps:
        store.save(State(Plan(99), step=step), {"w": torch.tensor(float(step))})
        assert store.newest()[0].step == step
    kept = sorted(path.name for path in store.directory.iterdir() if not path.name.startswith("."))
    assert kept == [f"step-{step:09d}.{kind}" for step in steps[-3:] for kind in ("json", "safetensors")]
    shutil.rmtree(store.directory)


# Figures


@examples(30)
@given(st.lists(st.dictionaries(WORDS, FIGURES, max_size=3), min_size=1, max_size=6), st.binary(max_size=40), st.data())
def test_figures_of_a_resumed_run_are_those_of_an_undisturbed_one(tmp_path_factory, figures, torn, data):
    def journal(folder, **kept):
        return Journal(folder, total=9, quiet=True, **kept)

    lengths, whole = [0], tmp_path_factory.mktemp("whole")
    undisturbed = journal(whole)
    undisturbed.events = None
    for step, line in enumerate(figures, start=1):
        undisturbed.record(step, **{f"x{name}": value for name, value in line.items()})
        lengths.append(undisturbed.length)
    undisturbed.close()
    expected = (whole / "metrics.jsonl").read_bytes()

    kept = data.draw(st.integers(0, len(figures)))
    folder = tmp_path_factory.mktemp("torn")
    reached = data.draw(st.integers(lengths[kept], len(expected)))
    (folder / "metrics.jsonl").write_bytes(expected[:reached] + torn)
    resumed = journal(folder, kept=kept, length=lengths[kept])
    resumed.events = None
    for step, line in enumerate(figures[kept:], start=kept + 1):
        resumed.record(step, **{f"x{name}": value for name, value in line.items()})
    resumed.close()
    assert (folder / "metrics.jsonl").read_bytes() == expected


# Average


@examples(20)
@given(st.floats(0.01, 0.999), st.integers(0, 10_000), st.integers(0, 99))
def test_an_average_lies_between_what_it_was_and_what_comes(decay, step, seed):
    network = create_model("vit_tiny_patch16_224", 2, image_size=4, patch_size=4, embed_dim=2, depth=1, num_heads=1)
    average = Average(network, decay)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    before = [parameter.clone() for parameter in average.network.parameters()]
    average.update(network, step)
    share = min(decay, (1 + step) / (10 + step))
    for old, now, new in zip(before, average.network.parameters(), network.parameters(), strict=True):
        assert torch.allclose(now, share * old + (1 - share) * new, atol=1e-6)


# Settings


@given(altered(to_json(Settings())))
def test_any_json_is_settings_or_refused(data):
    settings, refusal = tried(lambda: from_json(Settings, data, "here"))
    assert refusal or from_json(Settings, json.loads(json.dumps(to_json(settings))), "here") == settings


@given(st.text(min_size=1, max_size=12).filter(lambda name: name not in Settings.__dataclass_fields__))
def test_a_setting_that_is_not_known_is_never_ignored(name):
    with pytest.raises(UserError, match="unknown setting"):
        from_json(Settings, {**to_json(Settings()), name: 1}, "here")
