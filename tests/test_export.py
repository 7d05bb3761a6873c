"""Exported programs: the same pixels to the bit, the same answers from a file, and a gate that catches all else."""

import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from command import cli, model, pictures, refusal, trained  # noqa: F401
from examples import examples
from parity.clip import SMALL as CLIP
from parity.clip import SMALL_TEXT as CLIP_TEXT
from sightline.errors import UserError, WorkError
from sightline.images import program
from sightline.images.preprocess import Preprocess
from sightline.images.program import PixelProgram
from sightline.inference import export as exporting
from sightline.inference import gate
from sightline.inference.export import export
from sightline.inference.outputs import outputs_of
from sightline.inference.predictor import Predictor
from sightline.inference.runtimes import OnnxProgram
from sightline.model import Model
from sightline.network import create_model
from sightline.texts.vocabularies import learned
from test_networks import KINDS, small

CONTRACT = Preprocess(size=(33, 47), resize_size=(37, 53), kernel="pillow", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))


def predictor(kind: str = "vit", contract: Preprocess = CONTRACT, **settings) -> Predictor:
    return Predictor(small(kind, **settings), contract, ["a", "b", "c", "d", "é"])


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def few(monkeypatch):
    """Fewer and smaller pictures for a gate whose verdict they do not change."""
    monkeypatch.setattr(gate, "SIZES", {"column.png": (301, 1), "panorama.jpg": (23, 401), "turned.jpg": (61, 90)})
    monkeypatch.setattr(exporting, "photographs", list)


class TestPixels:
    @examples(200)
    @given(
        size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
        resize=st.sampled_from(["crop", "squash", "pad"]),
        resize_size=st.none() | st.integers(1, 60) | st.tuples(st.integers(1, 60), st.integers(1, 60)),
        interpolation=st.sampled_from(["bilinear", "bicubic", "lanczos"]),
        kernel=st.sampled_from(["torch", "pillow"]),
        crop_offset=st.sampled_from(["round", "floor"]),
        picture=st.tuples(st.integers(1, 150), st.integers(1, 150)),
        seed=st.integers(0, 99),
    )
    def test_every_pixel_is_that_of_the_contract(self, picture, seed, **settings):
        contract = Preprocess(**settings, fill=(3, 141, 250))
        image = noise(*picture, seed)
        pixels, _ = PixelProgram(contract).pixels(torch.from_numpy(image))
        assert torch.equal(pixels, contract.fit(image).double())

    @pytest.mark.parametrize("kernel", ["torch", "pillow"])
    @pytest.mark.parametrize("picture", [(1, 5003), (3001, 1), (2, 907), (1, 1), (811, 1201)])
    def test_slivers_and_large_pictures_are_too(self, picture, kernel):
        contract = Preprocess(size=(224, 224), crop_pct=0.875, kernel=kernel)
        pixels, _ = PixelProgram(contract).pixels(torch.from_numpy(noise(*picture)))
        assert torch.equal(pixels, contract.fit(noise(*picture)).double())

    def test_normalised_pixels_are_the_same_floats(self):
        image = noise(61, 43)
        pixels, (tall, wide) = PixelProgram(CONTRACT)(torch.from_numpy(image))
        assert torch.equal(pixels[0], CONTRACT(image))
        place = CONTRACT.placement(61, 43)
        assert (float(tall.scaled / tall.length), float(wide.scaled / wide.length)) == place.scale
        assert (-float(tall.begin), -float(wide.begin)) == place.offset

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"resize": "native", "resize_size": None, "multiple": 4}, "native"),
            ({"interpolation": "nearest"}, "nearest"),
            ({"antialias": False, "kernel": "torch"}, "antialias"),
            ({"draft": True}, "draft"),
        ],
    )
    def test_what_has_no_graph_is_refused_by_name(self, changes, says):
        with pytest.raises(UserError, match=says):
            PixelProgram(CONTRACT.replace(**changes))


class TestTasks:
    @pytest.mark.parametrize("kind", ["vit", "swin"])
    def test_a_classifier_answers_as_predict(self, kind, tmp_path, few):
        self.agrees(predictor(kind), tmp_path, ["logits"])

    @pytest.mark.parametrize(("task", "names"), [("detect", ["logits", "boxes"]), ("segment", ["logits", "classes"])])
    def test_other_tasks_do(self, task, names, tmp_path, few):
        extra = {"detect": {"hidden_dim": 24, "queries": 7, "encoder_layers": 1, "decoder_layers": 1}}.get(task, {})
        model = predictor("vit", task=task, **extra)
        session = self.agrees(model, tmp_path, names)
        found = session.run(None, {"image": noise(71, 93)})[1]
        if task == "segment":
            (answer,) = (a.prediction for a in model.predict([noise(71, 93)]))
            assert found.dtype == np.uint8
            assert (found == answer.mask).mean() > 0.999
        else:
            assert found.shape == (7, 4)
            assert found.min() >= 0
            assert (found <= [93, 71, 93, 71]).all()
            assert found.max() > 47  # pixels of the picture

    def test_texts_are_fixed_where_images_are_held_against_them(self, tmp_path, few):
        words = learned(["a red circle and a blue square", "a green star"] * 3, 540)
        settings = {**CLIP, **CLIP_TEXT, "context_length": 13, "image_size": 32, "vocab_size": len(words)}
        network = create_model("ViT-B-32-quickgelu", **settings).eval()
        whole = Model(network, CONTRACT.replace(size=(32, 32)), (), "clip", vocabulary=words)
        with pytest.raises(UserError, match="name --labels"):
            export(whole.predictor(), tmp_path)
        model = whole.predictor(labels=["red star", "green circle"], device="cpu", precision="fp32")
        done = export(model, tmp_path)
        assert json.loads(done.labels.read_text()) == ["red star", "green circle"]
        (answer,) = model.predict([noise(57, 31)])
        logits = onnxruntime.InferenceSession(done.files[0]).run(["logits"], {"image": noise(57, 31)})[0]
        scores = torch.from_numpy(logits).softmax(dim=0)
        assert scores.max().item() == pytest.approx(answer.prediction.score, abs=1e-4)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("format", ["onnx", "torch"])
    def test_every_kind_does_in_every_runtime(self, kind, format, tmp_path):
        done = export(predictor(kind), tmp_path, format=format)
        assert done.agreement.top1 == 1 or done.agreement.ties
        assert done.agreement.pictures == len(gate.SIZES) + len(gate.photographs()) > 13
        assert done.agreement.difference <= gate.TOLERANCE

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind_takes_batches_of_prepared_pixels(self, kind, tmp_path):
        self.takes_batches(predictor(kind), tmp_path)

    def test_prepared_pixels_come_in_batches_of_any_size(self, tmp_path, few):
        self.takes_batches(predictor(), tmp_path)

    def takes_batches(self, model: Predictor, folder):
        done = export(model, folder, input="pixels")
        session = onnxruntime.InferenceSession(done.files[0])
        for count in (1, 5):
            pixels = np.stack([CONTRACT(noise(40 + i, 50, i)).numpy() for i in range(count)])
            with torch.inference_mode():
                expected = model.network(torch.from_numpy(pixels))
            np.testing.assert_allclose(session.run(None, {"pixels": pixels})[0], expected, atol=1e-4, rtol=0)

    def agrees(self, model: Predictor, folder, names) -> onnxruntime.InferenceSession:
        done = export(model, folder / "program.onnx")
        assert done.agreement.difference <= 1e-4
        assert done.files == (folder / "program.onnx",)
        assert json.loads((folder / "labels.json").read_text()) == model.labels
        session = onnxruntime.InferenceSession(folder / "program.onnx")
        (taken,) = session.get_inputs()
        assert (taken.name, taken.type, taken.shape[2]) == ("image", "tensor(uint8)", 3)
        assert [output.name for output in session.get_outputs()] == names
        for picture in (noise(1, 1), noise(5, 203), noise(90, 61)):  # beyond those of the gate
            with torch.inference_mode():
                expected = model.network(CONTRACT(picture)[None])
            logits = expected[0] if names[1:] != ["boxes"] else expected.logits[0]
            np.testing.assert_allclose(session.run(["logits"], {"image": picture})[0], logits, atol=1e-4, rtol=0)
        return session


class TestGate:
    def refused(self, folder, says: str, **settings) -> None:
        with pytest.raises(WorkError, match=says):
            export(predictor(), folder / "program.onnx", **settings)
        assert not list(folder.iterdir())

    def test_another_kernel_is_caught(self, tmp_path, few, monkeypatch):
        sharper = (lambda x: program.bicubic(x * 1.01), 2.0)
        monkeypatch.setitem(program.FILTERS, "bicubic", sharper)
        self.refused(tmp_path, r"on [a-z]+\.(png|jpg) its logits differ by .* nothing was written")

    def test_a_bit_less_of_a_weight_is_caught(self, tmp_path, few, monkeypatch):
        save = exporting._write

        def sabotaged(traced, path, *rest):
            save(traced, path, *rest)
            graph = onnx.load(path)
            weight = max((w for w in graph.graph.initializer if w.data_type == 1), key=lambda w: len(w.raw_data))
            values = onnx.numpy_helper.to_array(weight).copy()
            values.flat[0] += 0.5
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
            onnx.save(graph, path)

        monkeypatch.setattr(exporting, "_write", sabotaged)
        self.refused(tmp_path, "logits differ")

    def judged(self, model: Predictor, change, folder) -> gate.Agreement:
        """The verdict on a program that is the model itself, its answers changed."""
        outputs = outputs_of(model.network.architecture.task)

        class Changed(OnnxProgram):
            def __init__(self):
                """Nothing to load."""

            def run(self, image):
                ready = model.prepare(image)
                with torch.inference_mode():
                    found = outputs.expected(model.network(ready.pixels[None]), ready.place)
                return change({name: value.numpy() for name, value in zip(outputs.names, found, strict=True)})

        return gate.judge(Changed(), model, outputs, gate.draw_pictures(folder))

    def test_a_choice_that_differs_outside_ties_is_caught(self, tmp_path, few):
        model = predictor(task="segment")
        assert self.judged(model, lambda found: found, tmp_path).top1 == 1
        with pytest.raises(WorkError, match=r"column.png it chooses otherwise .* in 301 of 301 places"):
            self.judged(model, lambda found: {**found, "classes": (found["classes"] + 1) % 5}, tmp_path)

    @pytest.mark.parametrize(
        "change",
        [
            lambda found: {"logits": found["logits"] * np.float32("nan")},
            lambda found: {"logits": found["logits"][:-1]},
            lambda found: {"logits": found["logits"].astype(int)},
        ],
    )
    def test_answers_of_another_kind_are_caught(self, change, tmp_path, few):
        with pytest.raises(WorkError, match="logits differ by inf"):
            self.judged(predictor(), change, tmp_path)

    def test_a_small_difference_is_caught_and_one_below_is_told(self, tmp_path, few):
        agreement = self.judged(predictor(), lambda found: {"logits": found["logits"] + np.float32(5e-5)}, tmp_path)
        assert agreement.difference == pytest.approx(5e-5, rel=0.05)
        with pytest.raises(WorkError, match=r"differ by 0.0002"):
            self.judged(predictor(), lambda found: {"logits": found["logits"] + np.float32(2e-4)}, tmp_path)

    def test_what_was_there_stays_where_the_gate_fails(self, tmp_path, few):
        (tmp_path / "program.onnx").write_text("mine")
        with pytest.raises(WorkError, match="nothing was written"):
            export(predictor(), tmp_path / "program.onnx", tolerance=0)
        assert (tmp_path / "program.onnx").read_text() == "mine"
        assert len(list(tmp_path.iterdir())) == 1

    def test_the_users_own_pictures_count(self, tmp_path, few):
        Image.fromarray(noise(31, 29)).save(tmp_path / "own.png")
        done = export(predictor(), tmp_path / "out", pictures=[tmp_path / "own.png"])
        assert done.agreement.pictures == len(gate.SIZES) + 1
        (tmp_path / "bad.png").write_text("no image")
        with pytest.raises(UserError, match=r"bad\.png"):
            export(predictor(), tmp_path / "second", pictures=[tmp_path / "bad.png"])
        assert not (tmp_path / "second").exists()


ALONE = """
import json, sys
import numpy as np, onnxruntime
from PIL import Image
session = onnxruntime.InferenceSession(sys.argv[1])
labels = json.load(open(sys.argv[2], encoding="utf-8"))
logits = session.run(["logits"], {"image": np.asarray(Image.open(sys.argv[3]).convert("RGB"))})[0]
assert not {"torch", "sightline"} & set(sys.modules)
print(labels[logits.argmax()])
"""


class TestCommand:
    def test_the_program_runs_without_sightline(self, model, tmp_path):
        said = cli("export", model, "--format", "onnx", "--out", tmp_path, "--json")
        assert said.status == 0, said.err
        document = said.document
        assert document["agreement"]["top1"] == 1
        assert document["agreement"]["difference"] <= 1e-4
        assert document["bytes"] == (tmp_path / "model.onnx").stat().st_size
        Image.fromarray(noise(57, 43)).save(tmp_path / "picture.png")
        words = [
            sys.executable,
            "-c",
            ALONE,
            tmp_path / "model.onnx",
            tmp_path / "labels.json",
            tmp_path / "picture.png",
        ]
        alone = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60, check=False)
        (ours,) = cli("predict", model, tmp_path / "picture.png", "--json").document["results"]
        assert alone.stdout.strip() == ours["predictions"][0]["label"], alone.stderr

    def test_refusals(self, model, tmp_path):
        assert "--input pixels" in refusal("export", model, "--format", "openvino", "--out", tmp_path / "out")
        assert "ends with .onnx" in refusal("export", model, "--format", "onnx", "--out", tmp_path / "program.pt2")
        assert "tolerance" in refusal("export", model, "--tolerance", 2, "--out", tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_a_package_that_is_missing_is_named(self, model, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        assert 'pip install "sightline[export]"' in refusal("export", model, "--out", tmp_path / "out")

    def test_torch_programs_need_nothing_but_torch(self, tmp_path, few, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        model = predictor()
        (path,) = export(model, tmp_path, format="torch").files
        picture = noise(1, 77)
        with torch.inference_mode():
            expected = model.network(CONTRACT(picture)[None])[0]
        found = torch.export.load(path).module()(torch.from_numpy(picture))
        torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=0)

    def test_predict_gives_the_same_answers_through_onnx(self, model, pictures, few):
        ours, theirs = (cli("predict", model, pictures, "--json", "--runtime", name) for name in ("torch", "onnx"))
        assert theirs.status == ours.status == 1  # files that are no images
        for one, other in zip(ours.document["results"], theirs.document["results"], strict=True):
            assert one["path"] == other["path"]
            assert one.get("error") == other.get("error")
            for left, right in zip(one.get("predictions", []), other.get("predictions", []), strict=True):
                assert left["label"] == right["label"]
                assert left["score"] == pytest.approx(right["score"], abs=1e-4)
