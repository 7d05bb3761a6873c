"""Prediction: order, failures, laziness, and that the other images of a batch do not matter."""

import csv
import json
import os
import threading
import time
from io import BytesIO, StringIO
from itertools import count, groupby, islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sightline.device import devices, pick_device, pick_precision
from sightline.errors import UserError, WorkError
from sightline.images.preprocess import Preprocess
from sightline.inference.files import expand, to_json, write_csv
from sightline.inference.predictor import Answer, Predictor
from sightline.layers.dense import fast_products
from sightline.network import create_model
from sightline.types import Prediction, Score

LABELS = ["ant", "bee", "cat", "dog", "eel"]
PREPROCESS = Preprocess(size=(21, 15))


def network(**changes):
    torch.manual_seed(1)
    model = create_model(
        "vit_tiny_patch16_224",
        **{"num_classes": 5, "image_size": (21, 15), "patch_size": (7, 5), "embed_dim": 24, "depth": 2, **changes},
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def predictor(**changes) -> Predictor:
    return Predictor(network(), **{"preprocess": PREPROCESS, "labels": LABELS, "batch_size": 4, **changes})


def image(seed: int, size: tuple[int, int] = (29, 23)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def scores(answers) -> np.ndarray:
    rows = [sorted(a.prediction.top, key=lambda s: s.index) for a in answers]
    return np.array([[s.score for s in row] for row in rows])


class TestAnswers:
    def test_the_answer_is_that_of_the_network_alone(self):
        model = predictor()
        [answer] = model.predict([image(3)])
        with torch.inference_mode(), fast_products():
            expected = model.network(PREPROCESS(image(3))[None]).softmax(1)[0]
        assert answer.prediction.index == int(expected.argmax())
        assert answer.prediction.label == LABELS[answer.prediction.index]
        assert np.allclose(scores([answer])[0], expected, atol=1e-6)
        assert [s.score for s in answer.prediction.top] == sorted(expected.tolist(), reverse=True)

    def test_order_with_failures_and_every_kind_of_source(self, tmp_path):
        Image.fromarray(image(0)).save(tmp_path / "a.png")
        (tmp_path / "text.png").write_text("no image")
        (tmp_path / "empty.jpg").touch()
        encoded = BytesIO()
        Image.fromarray(image(0)).save(encoded, "PNG")
        refused = Answer("pics/*", error="nothing matches")
        sources = [
            str(tmp_path / "a.png"),
            str(tmp_path / "text.png"),
            tmp_path / "a.png",
            refused,
            encoded.getvalue(),
            Image.fromarray(image(0)),
            str(tmp_path / "empty.jpg"),
            str(tmp_path / "gone.jpg"),
            image(0),
        ]
        answers = list(predictor(top=2).predict(sources))
        assert [a.path for a in answers[:3]] == [str(tmp_path / n) for n in ("a.png", "text.png", "a.png")]
        assert [a.error is None for a in answers] == [True, False, True, False, True, True, False, False, True]
        assert answers[3] is refused
        assert answers[1].error.startswith("cannot decode: ")
        assert "empty" in answers[6].error
        good = [a for a in answers if a.prediction]
        assert len({a.prediction.index for a in good}) == 1
        assert np.allclose([a.prediction.score for a in good], good[0].prediction.score, atol=1e-6)
        assert all(len(a.prediction.top) == 2 for a in good)

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.integers(0, 11), min_size=1, max_size=13), st.integers(1, 7), st.booleans())
    def test_the_rest_of_the_batch_does_not_matter(self, seeds, batch_size, native):
        preprocess = Preprocess(size=(21, 15), resize="native", multiple=5) if native else PREPROCESS
        sizes = [(29, 23), (23, 29), (31, 31)]
        images = [image(seed, sizes[seed % 3]) for seed in seeds]
        together = list(predictor(preprocess=preprocess, batch_size=batch_size).predict(images))
        alone = [a for one in images for a in predictor(preprocess=preprocess, batch_size=1).predict([one])]
        assert np.abs(scores(together) - scores(alone)).max() <= 1e-6
        assert [a.prediction.index for a in together] == [a.prediction.index for a in alone]

    def test_training_mode_does_not_matter(self):
        noisy = Predictor(network(proj_drop_rate=0.5, drop_path_rate=0.5), PREPROCESS, LABELS)
        noisy.network.train()
        first, second = (scores(noisy.predict([image(2)])) for _ in range(2))
        assert np.array_equal(first, second)

    def test_bf16_is_near(self):
        images = [image(i) for i in range(6)]
        low = scores(predictor(precision=torch.bfloat16).predict(images))
        assert 0 < np.abs(low - scores(predictor().predict(images))).max() < 0.05

    def test_an_answer_that_is_not_a_number(self):
        model = predictor()
        with torch.no_grad():
            model.network.head.classifier.bias[2] = float("nan")
        [answer] = model.predict([image(0)])
        assert "not a number" in answer.error

    def test_too_little_memory_on_the_device(self, monkeypatch):
        model = predictor()

        def full(*_):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(model.network, "forward", full)
        with pytest.raises(WorkError, match="smaller batch size"):
            list(model.predict([image(0)]))

    def test_wrong_settings(self):
        for wrong, words in (
            ({"labels": LABELS[:4]}, "5 classes"),
            ({"batch_size": 0}, "batch size"),
            ({"top": 0}, "classes to show"),
        ):
            with pytest.raises(UserError, match=words):
                predictor(**wrong)
        with pytest.raises(UserError, match="no classifier"):
            next(Predictor(network(num_classes=0), PREPROCESS, []).predict([image(0)]))


class TestLaziness:
    def test_sources_without_end(self):
        drawn = count()
        picture = image(5)
        model = predictor(batch_size=3)
        answers = model.predict(picture for _ in drawn)
        for taken in range(1, 12):
            next(answers)
            assert next(drawn) <= taken + model.look_ahead + model.batch_size + taken  # this line draws one each time
        answers.close()

    def test_a_hundred_thousand_sources_are_not_held(self):
        drawn = 0

        def sources():
            nonlocal drawn
            for _ in range(100_000):
                drawn += 1
                yield picture

        picture = image(5)
        model = predictor()
        got = list(islice(model.predict(sources()), 10))
        assert len(got) == 10
        assert drawn <= 10 + model.look_ahead + 2 * model.batch_size

    def test_in_turn_nothing_is_read_while_the_network_computes(self, monkeypatch):
        model, moments, sources = predictor(batch_size=3), [], [image(i) for i in range(11)]
        exact = list(model.predict(sources))
        prepare, compute = Predictor.prepare, Predictor.compute

        def read(self, source, path=None):
            moments.append("read")
            return prepare(self, source, path)

        def computed(self, images, *, features):
            before = len(moments)
            found = compute(self, images, features=features)
            time.sleep(0.02)  # whoever reads beside it has time to
            assert len(moments) == before
            moments.append("compute")
            return found

        monkeypatch.setattr(Predictor, "prepare", read)
        monkeypatch.setattr(Predictor, "compute", computed)
        answers = list(model.altered(in_turn=True).predict(iter(sources)))
        assert [answer.prediction.index for answer in answers] == [answer.prediction.index for answer in exact]
        runs = [(what, len(list(same))) for what, same in groupby(moments)]
        assert runs == [("read", 6), ("compute", 1), ("read", 5), ("compute", 3)]  # two batches are read at a time

    def test_threads_end_when_the_consumer_leaves(self):
        answers = predictor().predict([image(i) for i in range(50)])
        next(answers)
        assert any(t.name.startswith("sightline-read") for t in threading.enumerate())
        answers.close()
        assert not any(t.name.startswith("sightline-read") for t in threading.enumerate())

    def test_no_sources(self):
        assert list(predictor().predict([])) == []


class TestEmbed:
    def test_rows_in_order(self):
        model = predictor(batch_size=2)
        vectors = model.embed([image(i) for i in range(5)])
        assert vectors.shape == (5, 24)
        assert vectors.dtype == torch.float32
        with torch.inference_mode():
            expected = model.network.embed(PREPROCESS(image(4))[None])[0]
        assert torch.allclose(vectors[4], expected, atol=1e-5)
        torch.nn.Linear(24, 2)(vectors).sum().backward()  # the features may be trained on

    def test_failures_are_raised_with_their_name(self, tmp_path):
        (tmp_path / "broken.png").write_text("no image")
        with pytest.raises(UserError, match=r"broken\.png: cannot decode"):
            predictor().embed([image(0), tmp_path / "broken.png"])
        with pytest.raises(UserError, match="no image"):
            predictor().embed([])

    def test_without_a_classifier(self):
        assert Predictor(network(num_classes=0), PREPROCESS, []).embed([image(0)]).shape == (1, 24)


class TestFiles:
    @pytest.fixture
    def pictures(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("in/10.png", "in/9.png", "in/deep/a.JPG", "in/notes.txt", "b[1].png", "z.png"):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        (tmp_path / "empty").mkdir()
        return tmp_path

    def test_files_folders_and_globs_in_the_order_given(self, pictures):
        found = list(expand(["z.png", "in", "b[1].png", "in/*.png", pictures / "in/notes.txt", "gone.png"]))
        assert found == [
            *("z.png", "in/9.png", "in/10.png", "in/deep/a.JPG", "b[1].png", "in/9.png", "in/10.png"),
            *(str(pictures / "in/notes.txt"), "gone.png"),
        ]

    def test_what_stands_for_nothing_is_an_answer(self, pictures):
        first, folder, glob, last = expand(["z.png", "empty", "in/*.webp", "z.png"])
        assert (first, last) == ("z.png", "z.png")
        assert (folder.path, glob.path) == ("empty", "in/*.webp")
        assert "no images" in folder.error
        assert "nothing matches" in glob.error
        assert "empty" not in folder.error

    def test_names_that_are_not_utf8(self, pictures):
        odd = os.fsdecode(b"in/\xff.png")
        (pictures / odd).touch()
        assert odd in list(expand(["in"]))
        [answer] = predictor().predict([odd])
        document = json.dumps(to_json([answer], "m"))
        assert json.loads(document)["results"][0]["path"] == odd
        document.encode("ascii")

    def test_the_document(self):
        told = Prediction([Score("cat", 2, 0.75), Score("ant", 0, 0.25)])
        document = to_json(iter([Answer("a.png", told), Answer("b.png", error="cannot decode: no")]), "runs/pets")
        assert document == {
            "model": "runs/pets",
            "task": "classify",
            "results": [
                {
                    "path": "a.png",
                    "predictions": [
                        {"label": "cat", "index": 2, "score": 0.75},
                        {"label": "ant", "index": 0, "score": 0.25},
                    ],
                },
                {"path": "b.png", "error": "cannot decode: no"},
            ],
        }

    def test_csv_rows_stand_as_answers_pass(self):
        told = Prediction([Score('=1+1,"x"\n', 1, 0.1 + 0.2), Score("ant", 0, 0.0)])
        answers = [Answer("@a.png", told), Answer("b.png", error="cannot decode: no")]
        stream = StringIO()
        passing = write_csv(iter(answers), stream)
        assert next(passing) is answers[0]
        assert stream.getvalue().count("@a.png") == 2
        assert list(passing) == answers[1:]
        assert list(csv.reader(StringIO(stream.getvalue(), newline=""))) == [
            ["path", "label", "index", "score", "error"],
            ["./@a.png", '\'=1+1,"x"\n', "1", "0.30000000000000004", ""],
            ["./@a.png", "ant", "0", "0.0", ""],
            ["b.png", "", "", "", "cannot decode: no"],
        ]


class TestDevice:
    def test_what_exists(self):
        assert "cpu" in devices()
        assert pick_device("cpu") == torch.device("cpu")
        assert str(pick_device()) == devices()[0]

    @pytest.mark.parametrize("name", ["cuda:97", "tpu", "", "cpu:1", "CPU", "meta"])
    def test_what_does_not(self, name):
        with pytest.raises(UserError, match=r"there is no device.*cpu"):
            pick_device(name)

    def test_precision(self):
        cpu = torch.device("cpu")
        chosen = [pick_precision(name, cpu) for name in ("auto", "fp32", "bf16", "fp16")]
        assert chosen == [torch.float32, torch.float32, torch.bfloat16, torch.float16]
        with pytest.raises(UserError, match="fp8"):
            pick_precision("fp8", cpu)

    def test_precision_of_a_device_with_and_without_bf16(self, monkeypatch):
        cuda = torch.device("cuda:0")
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
        assert pick_precision("auto", cuda) == torch.bfloat16
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
        assert pick_precision("auto", cuda) == torch.float32
        with pytest.raises(UserError, match="bf16"):
            pick_precision("bf16", cuda)
