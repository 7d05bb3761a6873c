"""The share of a run that goes into waiting for images: counted, reported, and named with its cause."""

import json
import time

import numpy as np
import pytest
import torch

import sightline
from sightline.datasets.digits import digits
from sightline.datasets.effort import Effort
from sightline.datasets.loader import TrainLoader
from sightline.training.doctor import Doctor
from sightline.training.settings import Settings

SMALL = {"batch_size": 64, "workers": 0, "network": {"embed_dim": 16, "depth": 1, "num_heads": 2}}


def doctor(workers: int = 2) -> Doctor:
    return Doctor(Settings(workers=workers), 10)


def test_a_twentieth_of_a_run_may_go_into_waiting():
    for waited, worked, share in ((50.0, 500.0, "9%"), (15.5, 15.0, "51%")):
        waiting = doctor()
        waiting.conclude(7, waited, waited / (waited + worked))
        (finding,) = waiting.findings
        assert (finding.kind, finding.step, finding.severity) == ("slow-input", 7, "note")
        assert finding.words.startswith(f"{share} of the time goes into waiting for images")
        waiting.conclude(8, waited, waited / (waited + worked))
        assert len(waiting.findings) == 1
    for waited, worked in ((50.0, 1000.0), (4.0, 4.0)):  # no more than a twentieth, or no more than a moment
        short = doctor()
        short.conclude(7, waited, waited / (waited + worked))
        assert not short.findings


def test_a_long_run_hears_of_it_on_the_way():
    told = doctor()
    for step in range(20_000):
        told.time(step, 0.01, 0.1)  # 9 %: 4.7 ms a step are lost beyond a twentieth
        if told.findings:
            break
    assert step == pytest.approx(60 / (0.01 - 0.1 / 19), rel=0.01)
    assert "more than 5% of the time" in told.findings[0].words


@pytest.mark.parametrize(
    ("effort", "workers", "cause", "remedy"),
    [
        (Effort(40, 20.0, 19.0, 0.5), 1, "a batch takes 0.5 s to read, nearly all of it in decoding", "--workers 2"),
        (Effort(40, 20.0, 19.0, 0.5), 8, "nearly all of it in decoding and augmenting", "augment less"),
        (Effort(40, 20.0, 11.0, 8.0), 1, "40% of it without a core", "--threads"),
        (Effort(40, 20.0, 5.0, 1.0), 2, "70% of it in waiting for the disk", "--workers 4"),
        (Effort(40, 20.0, 19.0, 0.5), 0, "which are read between the steps; a batch takes", "--workers 2"),
    ],
)
def test_the_cause_is_named(effort, workers, cause, remedy, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    waiting = doctor(workers)
    waiting.reading = effort
    waiting.conclude(100, 60.0, 0.3)
    assert cause in waiting.findings[0].words
    assert remedy in waiting.findings[0].advice


@pytest.mark.parametrize("workers", [0, 1])
def test_readers_tell_what_they_are_at(workers):
    loader = TrainLoader(digits().select(np.arange(8)), slowly, batch_size=4, seed=0, steps=range(4), workers=workers)
    assert len(list(loader)) == 4
    assert loader.effort.batches >= 4
    assert loader.effort.seconds >= 16 * 0.02
    assert loader.effort.busy > 0
    assert loader.effort.idle + loader.effort.queued > loader.effort.seconds / 2


def slowly(image, key):
    """As from a slow disk."""
    time.sleep(0.02)
    return torch.zeros(3, 4, 4)


def test_the_share_of_a_run_is_kept_and_reported(tmp_path):
    done = sightline.train("builtin:digits", out=tmp_path / "run", epochs=0.3, evaluations=1, **SMALL)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["seconds"] == done.seconds
    waited, whole = done.seconds["waiting"], done.seconds["train"]
    assert 0 < waited < whole
    assert f"{waited / whole:.1%} of it waiting for images" in done.report.read_text()


def test_waiting_goes_on_where_a_run_was_stopped(tmp_path, monkeypatch):
    from sightline.training.loop import Loop
    from sightline.training.signals import Interrupted

    clock, seen = Loop._clock, []

    def stopping(self, step, waited, worked):
        clock(self, step, 3.0 if not seen else 0.0, worked)
        seen.append(self.state.waited)
        if len(seen) == 1:
            self._keep()
            self.saver.wait()
            raise Interrupted(15, step)

    monkeypatch.setattr(Loop, "_clock", stopping)
    with pytest.raises(Interrupted):
        sightline.train("builtin:digits", out=tmp_path / "run", epochs=0.3, evaluations=1, **SMALL)
    done = sightline.train("builtin:digits", out=tmp_path / "run", resume=True)
    assert done.seconds["waiting"] == 3.0
