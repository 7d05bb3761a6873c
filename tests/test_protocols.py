"""Protocols of frozen features: against goldens, scikit-learn and values by hand, and through the command."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy import stats
from sklearn.linear_model import LogisticRegression, Ridge

from command import cli, model, photos, refusal, trained  # noqa: F401  (fixtures)
from sightline.datasets.digits import digits
from sightline.datasets.image_set import ImageSet, Names, Samples
from sightline.datasets.open import open_dataset
from sightline.evaluation import linear_probe
from sightline.evaluation.cache import Cache
from sightline.evaluation.features import Embedding
from sightline.evaluation.few_shot import BIAS, SWEEP, choose, few_shot, solve
from sightline.evaluation.linear_probe import linear, logistic, sgd
from sightline.evaluation.protocol import STUDENT, Labelled, of_seeds, wilson
from sightline.images.preprocess import Preprocess
from test_knn import drawn
from test_networks import KINDS, small

GOLDEN = Path(__file__).parent / "data" / "goldens" / "few-shot"
CPU = torch.device("cpu")


# Few-shot


@pytest.mark.parametrize("case", json.loads((GOLDEN / "case.json").read_text())["results"])
def test_few_shot_as_big_vision_has_it(case):
    io, classes = load_file(GOLDEN / "io.safetensors"), 6
    features, labels = io["input.train_features"], io["input.train_labels"]
    name = f"{case['shots']}shot_seed{case['seed']}"
    chosen = choose(labels, classes, case["shots"], case["seed"])
    assert chosen.tolist() == io[f"output.indices_{name}"].tolist()
    standard, (weights,) = solve(features[chosen], labels[chosen], classes, (case["l2"],))
    expected = io[f"output.weights_{name}_l2_{case['l2']:g}"]
    assert (weights - expected).abs().max() / expected.abs().max() < 1e-6
    answers = (standard(io["input.test_features"]) @ weights).argmax(dim=1)
    assert (answers == io["input.test_labels"]).double().mean() == pytest.approx(case["accuracy"], abs=1e-9)


@pytest.mark.parametrize("count", [29, 5], ids=["tall", "wide"])
def test_least_squares_as_sklearn_solves_them(count):
    x, y = drawn(count, 3)
    standard, weights = solve(x, y, 5, (0.5, 8.0))
    exact = x.double()
    known = torch.cat([(exact - exact.mean(0)) / (exact.std(0, correction=0) + 1e-5), torch.full((count, 1), BIAS)], 1)
    assert torch.allclose(standard(x), known)
    for l2, found in zip((0.5, 8.0), weights, strict=True):
        theirs = Ridge(alpha=l2, fit_intercept=False, solver="cholesky").fit(known, 2 * np.eye(5)[y] - 1)
        assert np.allclose(found, theirs.coef_.T, atol=1e-9)


def test_few_shot_counts_what_could_not_be_read():
    train, test = drawn(200, 1), drawn(90, 2)
    whole = few_shot(Labelled(*train), Labelled(*test), 5, (10,), 0)
    short = few_shot(Labelled(*train), Labelled(*test, refused=10), 5, (10,), 0)
    assert short.metrics["few_shot_top1"] == pytest.approx(0.9 * whole.metrics["few_shot_top1"])


def test_few_shot_reports_each_number_of_shots():
    found = few_shot(Labelled(*drawn(400, 1)), Labelled(*drawn(300, 2)), 5, (), 7)
    rows = found.details["few_shot"]
    assert [row["shots"] for row in rows] == [1, 5, 10, 25]
    assert [row["examples"] for row in rows] == [5, 25, 50, 125]
    assert found.metrics["few_shot_top1"] == rows[2]["top1"] == pytest.approx(np.mean(rows[2]["each"]))
    assert rows[0]["top1"] < rows[3]["top1"]
    assert all(len(row["sweep"]) == len(SWEEP) for row in rows)
    assert rows[2]["sweep"]["1024"] == pytest.approx(rows[2]["top1"])
    assert found.details["seeds"] == [7, 8, 9, 10, 11]


# Linear probe


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_logistic_regression_as_sklearn_solves_it(strength):
    (x, y), (asked, _) = drawn(300, 1), drawn(50, 2)
    theirs = LogisticRegression(C=strength, tol=1e-9, max_iter=2000).fit(x.double(), y)
    _, ours = logistic(x, y, 5, (10 * strength, strength), standardise=False)(asked).softmax(dim=2)
    assert np.allclose(ours, theirs.predict_proba(asked.double()), atol=1e-5)


def test_sgd_by_hand(monkeypatch):
    """Two updates of momentum on all images at once, for two rates, against the plain sums."""
    monkeypatch.setattr(linear_probe, "UPDATES", 2)
    x, y = drawn(11, 3, width=3, classes=2)
    start = sgd(x, y, 2, (0.0,), seed=5).weights[0].double()
    exact = x.double()
    batch = torch.cat([(exact - exact.mean(0)) / (exact.std(0, correction=0) + 1e-5), torch.ones(11, 1)], 1)

    def slope(weights):
        return batch.T @ ((batch @ weights).softmax(1) - torch.eye(2)[y]) / 11

    for rate, found in zip((0.1, 3.0), sgd(x, y, 2, (0.1, 3.0), seed=5).weights, strict=True):
        step, first = rate * 11 / 256, slope(start)
        once = start - step * first
        twice = once - step * 0.5 * (0.9 * first + slope(once))
        assert torch.allclose(found.double(), twice, atol=1e-5)


def test_the_images_that_judge_choose_nothing():
    train, test = drawn(300, 1), drawn(200, 2)
    found = linear(Labelled(*train), Labelled(*test), 5, (), 0)
    other = linear(Labelled(*train), Labelled(test[0], test[1].flip(0)), 5, (), 0)
    assert found.details == other.details
    best = LogisticRegression(C=0.1).fit(*(v.numpy() for v in train)).score(*(v.numpy() for v in test))
    assert abs(found.metrics["linear_top1"] - best) < 0.03
    assert found.metrics["linear_top1"] == found.metrics[f"linear_{found.details['chosen']}_top1"]


# Uncertainty


def test_intervals():
    low, high = wilson(0.9, 50)
    theirs = stats.binomtest(45, 50).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-6)
    assert [stats.t.ppf(0.975, n + 1) for n in range(len(STUDENT))] == pytest.approx(STUDENT, abs=1e-3)
    mean, (low, high) = of_seeds([0.5, 0.6, 0.7])
    assert mean == pytest.approx(0.6)
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 2, 0.6, stats.sem([0.5, 0.6, 0.7])), abs=1e-3)


# Features


def noise(count: int, shape: tuple[int, int] = (33, 47)) -> ImageSet:
    random = np.random.default_rng(3)
    pixels = [random.integers(0, 256, (*shape, 3), dtype=np.uint8) for _ in range(count)]
    return ImageSet(("a",), Samples(Names(map(str, range(count))), np.zeros(count, dtype=np.int64), arrays=pixels))


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_every_kind_are_its_embedding(kind):
    network, preprocess, images = small(kind), Preprocess((33, 47)), noise(3)
    found = Embedding(network, preprocess, CPU, batch_size=2)(images)
    with torch.no_grad():
        expected = network.embed(torch.stack([preprocess(image) for image in images.samples.arrays]))
    assert torch.allclose(found.vectors, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert found.rows.tolist() == [0, 1, 2]
    assert not network.training


@pytest.fixture
def photographs(tmp_path) -> ImageSet:
    """Seven files, the third of which is no image."""
    for i in range(7):
        file = tmp_path / "set" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((5, 7, 3), 30 * i, np.uint8)).save(file)
    (tmp_path / "set" / "a" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    return open_dataset(tmp_path / "set").together()


def test_cached_features_are_the_same_and_cost_nothing(photographs, tmp_path, monkeypatch):
    network, preprocess, cache = small("vit"), Preprocess((33, 47)), Cache(tmp_path / "kept", 2**20)
    first = Embedding(network, preprocess, CPU, batch_size=3, cache=cache)(photographs)
    assert not first.cached
    assert [photographs.samples.names[row] for row in first.refused] == ["a/2.png"]
    assert len(first.vectors) == len(first.rows) == 6

    def computed(*words):
        raise AssertionError("nothing was to be computed")

    monkeypatch.setattr(type(network), "embed", computed)
    again = Embedding(network, preprocess, CPU, batch_size=2, cache=cache)(photographs)
    assert again.cached
    assert torch.equal(again.vectors, first.vectors)
    assert again.rows.tolist() == first.rows.tolist()
    assert again.refused == first.refused
    assert not [file for file in (tmp_path / "kept").iterdir() if file.suffix != ".safetensors"]


def test_whatever_changes_features_asks_the_network_again(photographs, tmp_path):
    network, cache = small("vit"), Cache(tmp_path / "kept", 2**20)

    def cached(preprocess=Preprocess((33, 47)), precision=torch.float32, images=photographs) -> bool:  # noqa: B008
        return Embedding(network, preprocess, CPU, precision, cache=cache)(images).cached

    assert (cached(), cached()) == (False, True)
    assert not cached(preprocess=Preprocess((33, 47), mean=(0.4, 0.5, 0.5)))
    assert not cached(precision=torch.bfloat16)
    assert not cached(images=photographs.select(np.arange(5)))
    file = photographs.samples.root / "b" / "1.png"
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[-13] ^= 1  # the checksum of the last chunk: equal in size, and in age below
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (cached(), cached()) == (False, True)
    with torch.no_grad():
        next(network.parameters()).add_(1e-3)
    assert not cached()


def test_a_damaged_or_full_cache_is_no_fault(tmp_path):
    cache, rows = Cache(tmp_path, 3000), torch.arange(200)
    assert cache.put("one", {"x": rows}, "told")
    assert cache.get("one")[1] == "told"
    (file,) = tmp_path.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert cache.get("one") is None
    file.write_bytes(b"nothing of the kind")
    assert cache.get("one") is None
    assert not cache.put("large", {"x": torch.arange(2000)})
    assert cache.put("two", {"x": rows})  # 1,600 bytes and their header; another one does not fit
    assert cache.put("three", {"x": rows + 1})
    assert cache.get("two") is None
    assert torch.equal(cache.get("three")[0]["x"], rows + 1)
    closed = Cache(tmp_path / "file" / "below", 2**20)
    (tmp_path / "file").write_text("in the way")
    assert not closed.put("one", {"x": rows})
    assert closed.get("one") is None


# The command


@pytest.mark.parametrize(
    ("protocol", "metric"), [("knn", "knn_top1"), ("linear", "linear_top1"), ("few-shot", "few_shot_top1")]
)
def test_protocols_by_command(model, tmp_path, monkeypatch, protocol, metric):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("SIGHTLINE_CACHE_BYTES", "1e6")
    monkeypatch.setattr(linear_probe, "UPDATES", 200)
    said = cli("evaluate", model, "builtin:digits", "--protocol", protocol, "--json")
    assert said.status == 0, said.err
    first = said.document
    assert set(first["metrics"]) >= {metric}
    low, high = first["intervals"][metric]
    assert 0.15 < low < first["metrics"][metric] < high <= 1
    assert first["counts"] == {"evaluated": 359, "refused": 0, "train": 1438}
    again = cli("evaluate", model, "builtin:digits", "--protocol", protocol, "--json").document
    assert (first["details"].pop("cached"), again["details"].pop("cached")) == (False, True)
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert "%" in cli("evaluate", model, "builtin:digits", "--protocol", protocol).out


def test_other_classes_and_unreadable_images(model, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("SIGHTLINE_CACHE_BYTES", "1e6")
    for place, label in (("train", "x"), ("train", "y"), ("val", "x"), ("val", "y")):
        for number, image in enumerate(sorted(photos.glob(f"{'01'[label == 'y']}/*"))[:4]):
            file = tmp_path / "data" / place / label / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(image.read_bytes())
    (tmp_path / "data" / "val" / "x" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    said = cli("evaluate", model, tmp_path / "data", "--protocol", "knn", "--json", "--no-cache")
    assert said.document["counts"] == {"evaluated": 7, "refused": 1, "train": 8}
    assert said.document["metrics"]["knn_top1"] * 8 == pytest.approx(round(said.document["metrics"]["knn_top1"] * 8))
    assert said.document["metrics"]["knn_top1"] <= 7 / 8
    assert [row["path"] for row in said.document["refused"]] == ["val/x/3.png"]
    assert not (tmp_path / "sightline").exists()


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("--protocol", "few_shot"), "Did you mean few-shot?"),
        (("--protocol", "akuracy"), "Did you mean accuracy?"),
        (("--protocol", "few-shot", "--shots", 0), "shots must be positive"),
        (("--protocol", "knn", "--shots", 5), "shots are for the protocol few-shot"),
        (("--protocol", "knn", "--seed", -1), "seed must lie in"),
    ],
)
def test_requests_that_cannot_be_met(model, words, answer):
    assert answer in refusal("evaluate", model, "builtin:digits", *words)


def test_seeds_draw_other_examples():
    images = digits()
    drawn_by = [choose(torch.from_numpy(images.targets), 10, 5, seed).tolist() for seed in (0, 0, 1)]
    assert drawn_by[0] == drawn_by[1] != drawn_by[2]
