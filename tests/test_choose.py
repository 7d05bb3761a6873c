"""What computes a job: the fastest way whose answers are the model's, and nothing that cannot be trusted."""

import importlib.util
import os
import threading
from collections import Counter
from dataclasses import replace
from itertools import accumulate, chain, count, cycle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from command import cli, refusal
from sightline.errors import UserError, WorkError
from sightline.evaluation.cache import Cache
from sightline.inference import choose as choosing
from sightline.inference import packed as packing
from sightline.inference.choose import Chosen, choose
from sightline.inference.predictor import Answer, Predictor
from sightline.inference.speeds import Bench, Speeds, Timing
from sightline.model import Model, load
from test_predictor import LABELS, PREPROCESS, image, network, predictor, scores

FAST = {"plain": 1.0, "packed": 0.5, "bf16": 0.25, "onnx": 0.1, "openvino": 0.2}


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "speeds", 2**20)


@pytest.fixture
def speeds(monkeypatch):
    """Speeds that are known beforehand, in seconds of one image; the other ways are those of a processor with bf16."""
    table = dict(FAST)

    def seconds(self: Bench, way: str, cores: int, batch: int) -> float:
        self.by(way)
        known = Timing(way, cores, batch, 2 * table[way] / cores)
        self.speeds = replace(self.speeds, timings=(*self.speeds.timings, known))
        return known.seconds

    monkeypatch.setattr(Bench, "seconds", seconds)
    monkeypatch.setattr(choosing, "computes_bf16", lambda: True)
    monkeypatch.setattr("sightline.inference.predictor.computes_bf16", lambda: True)
    installed(monkeypatch, None)
    return table


def installed(monkeypatch, found):
    """As if the other runtimes were there, or none were; what else is looked for is found as ever."""
    real = importlib.util.find_spec
    programs = choosing.MODULE.values()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *at: found if name in programs else real(name, *at))


def images(number: int = 60) -> list[np.ndarray]:
    return [image(i) for i in range(number)]


def answered(chosen: Chosen) -> list[Answer]:
    return list(chosen.predictor.predict(chosen.sources))


class TestChoice:
    def test_the_fastest_that_holds(self, speeds, cache):
        chosen = choose(predictor(), images(), cache=cache)
        assert chosen.predictor.precision == torch.bfloat16
        assert "torch in bf16" in chosen.why
        assert "4.0 times as fast" in chosen.why
        assert "the first 16 images have the same answers" in chosen.why
        exact = scores(predictor().predict(images()))
        assert 0 < abs(scores(answered(chosen)) - exact).max() < 0.05

    def test_exact_where_that_is_asked_for(self, speeds, cache):
        chosen = choose(predictor(), images(), precision="fp32", cache=cache)
        assert (chosen.predictor.precision, chosen.predictor.pack) == (torch.float32, True)
        assert "packed" in chosen.why
        assert abs(scores(answered(chosen)) - scores(predictor().predict(images()))).max() < 1e-6

    @pytest.mark.parametrize("way", ["bf16", "packed"])
    def test_a_way_that_answers_otherwise_is_refused_and_remembered(self, way, speeds, cache, monkeypatch):
        if way == "packed":
            del speeds["bf16"]
            monkeypatch.setattr(choosing, "computes_bf16", lambda: False)
        make, dtype = packing.packed, {"bf16": torch.bfloat16, "packed": torch.float32}[way]

        def sabotaged(plain: nn.Module, kind: torch.dtype = torch.float32) -> nn.Module:
            copy = make(plain, kind)
            if kind == dtype:
                copy.head.classifier.bias = nn.Parameter(copy.head.classifier.bias + torch.arange(5) / 3)
            return copy

        monkeypatch.setattr("sightline.inference.predictor.packed", sabotaged)
        first = choose(predictor(), images(), cache=cache)
        assert first.predictor.precision == torch.float32
        assert first.predictor.pack == (way == "bf16")
        assert ("not in bf16: on image its logits differ by" in first.why) == (way == "bf16")
        monkeypatch.setattr("sightline.inference.predictor.packed", make)
        again = choose(predictor(), images(), cache=cache)
        assert (again.predictor.precision, again.predictor.pack) == (torch.float32, way == "bf16")

    def test_another_choice_is_refused_too(self, cache, speeds, monkeypatch):
        monkeypatch.setattr(choosing, "LOW", 1e-9)
        assert "1e-09 is allowed of their range" in choose(predictor(), images(), cache=cache).why

    @pytest.mark.parametrize("changes", [{"packed": 0.98, "bf16": 0.95}, {way: s / 1000 for way, s in FAST.items()}])
    def test_what_saves_little_is_left(self, changes, speeds, cache):
        speeds.update(changes)
        chosen = choose(predictor(), images(), cache=cache)
        assert (chosen.predictor.precision, chosen.predictor.pack) == (torch.float32, False)
        assert chosen.why.startswith("torch in fp32, ")

    @pytest.mark.parametrize(
        ("number", "asked"),
        [(47, {}), (60, {"runtime": "torch"}), (60, {"precision": "bf16"}), (60, {"precision": "fp16"})],
    )
    def test_short_jobs_and_plain_wishes_are_done_at_once(self, number, asked, speeds, cache):
        given, sources = predictor(), images(number)
        chosen = choose(given, sources, cache=cache, **asked)
        assert (chosen.predictor, chosen.sources, chosen.why) == (given, sources, "")
        assert choose(given, iter(sources), cache=cache).predictor is given  # nobody knows how many there are

    def test_names_that_there_are_not(self):
        for wrong in ({"runtime": "tpu"}, {"precision": "fp8"}):
            with pytest.raises(UserError, match=r"there is no (runtime 'tpu': choose|precision 'fp8': choose) auto, "):
                choose(predictor(), [], **wrong)

    def test_programs_are_for_long_jobs(self, speeds, cache, monkeypatch):
        made = []

        def through(plain: Predictor, format: str) -> Predictor:
            made.append(format)
            if format == "openvino":
                raise WorkError("the exported program is not the model")
            return plain.altered(pack=False)

        installed(monkeypatch, True)
        monkeypatch.setattr("sightline.inference.speeds.through", through)
        assert choose(predictor(), images(), precision="fp32", cache=cache).predictor.pack
        assert made == []
        long = choose(predictor(), images(), count=10**6, precision="fp32", cache=cache)
        assert "ONNX Runtime in fp32" in long.why
        assert made == ["onnx", "openvino"]
        choose(predictor(), images(), count=10**6, precision="fp32", cache=cache)
        assert made == ["onnx", "openvino", "onnx"]  # who was refused is not made again

    @pytest.mark.parametrize(
        ("reading", "passed", "cores", "in_turn"),
        [
            (0.01, 0.01, 2, True),
            (0.1, 0.1, 2, True),
            (5.0, 5.0, 1, False),  # the network would wait for the one thread that reads
            (0.01, 1.0, 2, False),  # reading waits, for a disk or a network
            (0.1, 1.0, 2, False),
        ],
    )
    def test_threads_and_turns_follow_from_what_reading_takes(
        self, reading, passed, cores, in_turn, speeds, cache, monkeypatch
    ):
        monkeypatch.setattr(choosing, "available", lambda: 2)
        clock, wall = count(), count()
        monkeypatch.setattr(choosing.time, "thread_time", lambda: reading * next(clock))
        monkeypatch.setattr(choosing.time, "monotonic", lambda: passed * next(wall))
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
        model = predictor()
        model.threads = 1
        found = choose(model, images(), cache=cache).predictor
        assert (found.cores, found.in_turn) == (cores, in_turn)

    def test_the_first_image_that_a_thread_reads_tells_nothing(self, speeds, cache, monkeypatch):
        monkeypatch.setattr(choosing, "available", lambda: 2)
        clock = accumulate(chain([0.0, 500.0], cycle([0.0, 0.1])))
        monkeypatch.setattr(choosing.time, "thread_time", lambda: next(clock))
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
        model = predictor()
        model.threads = 1
        assert choose(model, images(), cache=cache).predictor.cores == 2

    def test_batches_are_measured_where_they_are_not_told(self, speeds, cache):
        speeds["bf16"] = 0.001
        assert choose(predictor(), images(), batch_size=13, cache=cache).predictor.batch_size == 13
        assert choose(predictor(), images(), cache=cache).predictor.batch_size == 8

    def test_nothing_is_packed_twice(self, speeds, cache, monkeypatch):
        made, make = [], packing.packed
        monkeypatch.setattr(
            "sightline.inference.predictor.packed",
            lambda plain, dtype=torch.float32: made.append(dtype) or make(plain, dtype),
        )
        answered(choose(predictor(), images(), cache=cache))
        assert sorted(made, key=str) == [torch.bfloat16, torch.float32]

    def test_measured_for_good(self, cache):
        chosen = choose(predictor(), images(), cache=cache)
        assert chosen.why.startswith("torch in ")
        assert len(answered(chosen)) == 60


class TestSources:
    def test_order_failures_and_no_image_read_twice(self, speeds, cache, tmp_path, monkeypatch):
        paths = []
        for i in range(50):
            paths.append(str(tmp_path / f"{i}.png"))
            Image.fromarray(image(i)).save(paths[-1])
        for broken in (0, 3, 40):
            (tmp_path / f"{broken}.png").write_text("no image")
        sources = [*paths[:2], Answer("nothing/*", error="nothing matches"), *paths[2:]]
        read = Counter()
        decode = type(PREPROCESS).placed
        monkeypatch.setattr(
            type(PREPROCESS), "placed", lambda self, source: read.update([source]) or decode(self, source)
        )
        answers = answered(choose(predictor(), sources, cache=cache))
        assert [a.path for a in answers] == [*paths[:2], "nothing/*", *paths[2:]]
        failed = [a.path for a in answers if a.error]
        assert failed == [paths[0], "nothing/*", paths[3], paths[40]]
        assert set(read.values()) == {1}
        assert len(read) == 50

    def test_sources_are_drawn_as_they_are_needed(self, speeds, cache):
        drawn = 0

        def endless():
            nonlocal drawn
            while True:
                drawn += 1
                yield image(drawn % 7)

        chosen = choose(predictor(), endless(), count=4096, cache=cache)
        assert drawn == choosing.LOOK
        answers = chosen.predictor.predict(chosen.sources)
        next(answers)
        assert drawn <= choosing.LOOK + chosen.predictor.look_ahead + 2 * chosen.predictor.batch_size
        answers.close()

    def test_nothing_that_can_be_read(self, speeds, cache):
        chosen = choose(predictor(), ["gone.png"] * 60, cache=cache)
        assert [a.error for a in answered(chosen)] == ["cannot decode: No such file or directory"] * 60


class TestCache:
    def bench(self, cache: Cache) -> Bench:
        return Bench(predictor(), cache)

    def kept(self, cache: Cache) -> Speeds:
        bench = self.bench(cache)
        bench.speeds = Speeds((Timing("plain", 2, 8, 0.25), Timing("bf16", 1, 8, 0.1)), ("bf16",), {"onnx": "no"})
        bench.keep()
        return bench.speeds

    def test_what_is_kept_is_known_again(self, cache):
        known = self.kept(cache)
        assert self.bench(cache).speeds == known
        assert [path.suffix for path in cache.folder.iterdir()] == [".safetensors"]  # nothing half written
        assert self.bench(cache).seconds("bf16", 1, 8) == 0.1
        other = Predictor(network(depth=3), PREPROCESS, list("abcde"))
        assert Bench(other, cache).speeds == Speeds()

    def test_no_more_is_kept_than_may_be(self, cache):
        bench = self.bench(cache)
        bench.speeds = Speeds(tuple(Timing("plain", 1, batch, 1.0) for batch in range(1, 257)))
        bench.images = [bench.predictor.prepare(image(0))]
        bench.seconds("packed", 1, 8)
        assert len(bench.speeds.timings) == 256
        assert bench.speeds.timings[-1].way == "packed"

    def test_known_speeds_are_not_measured_and_images_are_looked_at_anew(self, cache, monkeypatch):
        monkeypatch.setattr(choosing, "WORTH", 0.0)
        choose(predictor(), images(), cache=cache)
        known = self.bench(cache).speeds
        assert {timing.way for timing in known.timings} >= {"plain"}
        monkeypatch.setattr(choosing.time, "perf_counter", lambda: pytest.fail("it was measured again"))
        chosen = choose(predictor(), images(), cache=cache)
        assert ("first 2 images" in chosen.why) == bool(known.held)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "null",
            "[" * 100_000,
            '{"timings": 3}',
            '{"timings": [{"way": "rm", "cores": 1, "batch": 8, "seconds": 1.0}]}',
            '{"timings": [{"way": "bf16", "cores": -1, "batch": 8, "seconds": 1.0}]}',
            '{"timings": [{"way": "bf16", "cores": 1, "batch": 1000000000, "seconds": 1.0}]}',
            '{"timings": [{"way": "bf16", "cores": 1, "batch": 8, "seconds": NaN}]}',
            '{"timings": [{"way": "bf16", "cores": 1, "batch": 8, "seconds": 0.0}]}',
            '{"held": ["sudo"]}',
            '{"refused": {"bf16": 3}}',
            '{"refused": {"bf17": "x"}}',
            '{"other": 1}',
        ],
    )
    def test_what_nobody_here_wrote_counts_as_not_there(self, text, cache):
        bench = self.bench(cache)
        cache.put(bench._key, {}, text)
        assert self.bench(cache).speeds == Speeds()

    @pytest.mark.parametrize("harm", ["cut", "flipped", "folder", "pipe"])
    def test_a_damaged_file_counts_as_not_there(self, harm, cache):
        self.kept(cache)
        (path,) = cache.folder.iterdir()
        whole = bytearray(path.read_bytes())
        path.unlink()
        if harm == "cut":
            path.write_bytes(whole[: len(whole) // 2])
        elif harm == "flipped":
            at = whole.index(b"0.25")
            whole[at + 2] ^= 1
            path.write_bytes(whole)
        elif harm == "folder":
            path.mkdir()
        else:
            os.mkfifo(path)
        found = []
        thread = threading.Thread(target=lambda: found.append(self.bench(cache).speeds), daemon=True)
        thread.start()
        thread.join(20)
        assert found == [Speeds()]

    def test_a_disk_that_refuses_is_no_failure(self, tmp_path, speeds):
        (tmp_path / "taken").touch()
        assert choose(predictor(), images(), cache=Cache(tmp_path / "taken" / "speeds", 2**20)).why


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    Model(network().eval(), PREPROCESS, LABELS).save(folder)
    return folder


class TestCommand:
    def test_a_folder_is_answered_the_same_whatever_computes(self, model, tmp_path, monkeypatch):
        monkeypatch.setattr(choosing, "WORTH", 0.0)
        folder = tmp_path / "in"
        folder.mkdir()
        for i in range(55):
            Image.fromarray(image(i)).save(folder / f"{i}.png")
        (folder / "7.png").write_text("no image")
        plain = cli("predict", model, folder, "--json", "--runtime", "torch", "--top", 5)
        chosen = cli("predict", model, folder, "--json", "--top", 5)
        quiet = cli("predict", model, folder, "--json", "--precision", "fp32", "--quiet")
        assert plain.status == chosen.status == quiet.status == 1
        assert chosen.err.startswith("sightline: torch in ")
        assert chosen.err.endswith("sightline: 1 of the images could not be answered\n")
        assert quiet.err == ""
        rows = zip(plain.document["results"], chosen.document["results"], strict=True)
        for ours, theirs in rows:
            assert ours["path"] == theirs["path"]
            assert ours.get("error") == theirs.get("error")
            told = [{row["index"]: row["score"] for row in one.get("predictions", [])} for one in (ours, theirs)]
            assert told[1] == pytest.approx(told[0], abs=0.05)

    def test_draft_is_the_contract_with_draft(self, model, tmp_path):
        Image.fromarray(image(3, (400, 300))).save(tmp_path / "big.jpg")
        exact, drafted = (cli("predict", model, tmp_path / "big.jpg", "--json", *more) for more in ((), ("--draft",)))
        whole = load(model)
        rough = replace(whole, preprocess=whole.preprocess.replace(draft=True))
        for one, said in ((whole, exact), (rough, drafted)):
            assert (
                said.document["results"][0]["predictions"][0]["score"] == one.predict([tmp_path / "big.jpg"])[0].score
            )
        assert exact.out != drafted.out

    def test_a_runtime_that_there_is_not(self, model):
        assert "invalid choice: 'tpu'" in refusal("predict", model, "x.png", "--runtime", "tpu")
