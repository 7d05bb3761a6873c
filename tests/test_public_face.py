"""What a user of the package meets: names, their explanations, models as objects, and what a model directory says."""

import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import sightline
from sightline.datasets.digits import digits
from sightline.datasets.folder import write_images
from sightline.model import Model
from sightline.recipes.train import Trained

PACKAGE = Path(sightline.__file__).parent
MODULES = ["sightline", *(m.name for m in pkgutil.walk_packages([str(PACKAGE)], "sightline."))]
MODULES.remove("sightline.__main__")


class TestNames:
    def test_those_that_are_promised(self):
        promised = {"create_model", "list_models", "load", "train", "Model", "Prediction", "Preprocess", "Tokens"}
        assert promised | {"UserError", "WorkError", "__version__"} == set(sightline.__all__) == set(dir(sightline))
        for name in promised:
            thing = getattr(sightline, name)
            assert thing.__name__ == name
            assert getattr(sightline, name) is thing
        assert issubclass(sightline.UserError, ValueError)
        with pytest.raises(AttributeError, match="no attribute 'create_modle'"):
            sightline.create_modle  # noqa: B018

    def test_each_is_loaded_when_it_is_first_used(self):
        script = (
            "import sys, sightline\n"
            "dir(sightline), sightline.__version__, sightline.UserError, sightline.WorkError\n"
            "print('torch' in sys.modules)\n"
            "from sightline import list_models\n"
            "print('torch' in sys.modules, 'sightline.training' in sys.modules, 'transformers' in sys.modules)\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert done.stdout.split() == ["False", "True", "False", "False"], done.stderr

    def test_models_by_name(self):
        names = sightline.list_models("vit_tiny_patch*")
        assert names == ["vit_tiny_patch16_224", "vit_tiny_patch16_384"]
        assert set(names) < set(sightline.list_models())
        assert sightline.list_models("nothing*") == []
        size = {"image_size": (32, 48), "embed_dim": 24, "depth": 1, "num_heads": 3}
        network = sightline.create_model("vit_tiny_patch16_224", num_classes=7, **size)
        assert isinstance(network, nn.Module)
        assert network(torch.zeros(2, 3, 32, 48)).shape == (2, 7)
        tokens = network.backbone(torch.zeros(2, 3, 32, 48))
        assert isinstance(tokens, sightline.Tokens)
        assert (tokens.x.shape, tokens.grid, tokens.prefix) == ((2, 7, 24), (2, 3), 1)
        with pytest.raises(sightline.UserError, match="Did you mean vit_tiny_patch16_224"):
            sightline.create_model("vit_tiny_patch16_242")


class TestTheHouse:
    @pytest.mark.parametrize("name", MODULES)
    def test_everything_public_says_what_it_is(self, name):
        module = importlib.import_module(name)
        silent = [] if _is_sentence(module.__doc__) else ["the module"]
        for key, thing in vars(module).items():
            own = getattr(thing, "__module__", None) == name
            if key.startswith("_") or not own or not (inspect.isclass(thing) or inspect.isfunction(thing)):
                continue
            if not _is_sentence(thing.__doc__):
                silent.append(key)
            if inspect.isclass(thing):
                silent += [f"{key}.{member}" for member in _members(thing) if not _is_sentence(_doc(thing, member))]
        assert not silent, f"{name} leaves without a first sentence: {', '.join(silent)}"

    def test_files_are_short_and_rooms_have_names(self):
        files = list(PACKAGE.rglob("*.py"))
        assert len(files) > 80
        for file in files:
            assert len(file.read_text(encoding="utf-8").splitlines()) <= 450, file
        names = {part for file in files for part in file.relative_to(PACKAGE).with_suffix("").parts}
        assert not names & {"util", "utils", "misc", "common", "helpers", "helper", "tools", "shared"}
        assert all(len(file.relative_to(PACKAGE).parts) <= 2 for file in files)


def _is_sentence(doc: str | None) -> bool:
    return doc is not None and doc.strip().splitlines()[0].endswith((".", ":"))


def _members(kind: type) -> list[str]:
    """The public methods and properties that a class brings along; what it overrides is explained where it begins."""
    return [
        name
        for name, thing in vars(kind).items()
        if not name.startswith("_")
        and isinstance(inspect.unwrap(thing) if callable(thing) else thing, _METHODS)
        and not any(hasattr(base, name) for base in kind.__mro__[1:])
    ]


_METHODS = (property, staticmethod, classmethod, type(_is_sentence))


def _doc(kind: type, member: str) -> str | None:
    return vars(kind)[member].__doc__


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Trained:
    """A model of three digits, taught from image files by the Python interface."""
    root = tmp_path_factory.mktemp("face")
    images = digits()
    write_images(images.select(np.flatnonzero(images.targets < 3)[:45]), root / "three digits")
    small = {"embed_dim": 16, "depth": 2, "num_heads": 2}
    return sightline.train(root / "three digits", out=root / "run", epochs=2, workers=0, seed=3, network=small)


@pytest.fixture(scope="module")
def model(run) -> Model:
    return sightline.load(run.directory)


@pytest.fixture
def sources(tmp_path) -> list:
    """The same image in every shape that may be asked about."""
    array = np.random.default_rng(0).integers(0, 256, (37, 23, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "one.png")
    stream = BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    file = tmp_path / "one.png"
    return [file, str(file), stream.getvalue(), Image.fromarray(array), array]


class TestModel:
    def test_what_it_holds(self, run, model):
        assert list(model.labels) == ["0", "1", "2"]
        assert model.task == "classify"
        assert isinstance(model.preprocess, sightline.Preprocess)
        assert isinstance(model.network, nn.Module)
        assert not model.network.training
        assert run.model.labels == model.labels
        assert set(run.metrics) >= {"top1", "top5"}
        assert run.report.is_file()

    def test_predict_takes_every_kind_of_image(self, model, sources):
        answers = model.predict(sources)
        assert all(isinstance(answer, sightline.Prediction) for answer in answers)
        for answer in answers:
            assert answer.label == model.labels[answer.index] == answer.top[0].label
            assert answer.score == answer.top[0].score == max(score.score for score in answer.top)
            assert sum(score.score for score in answer.top) == pytest.approx(1, abs=1e-5)
            assert answer.score == pytest.approx(answers[0].score, abs=1e-6)
        assert len(model.predict(sources[:1], top=2)[0].top) == 2
        assert model.predict([]) == []

    def test_pixels_and_features(self, model, sources):
        pixels = model.preprocess(sources[0])
        assert (pixels.shape, pixels.dtype) == ((3, *model.preprocess.size), torch.float32)
        assert all(torch.equal(model.preprocess(source), pixels) for source in sources)
        vectors = model.embed(sources)
        assert vectors.shape == (5, 16)
        assert torch.allclose(vectors, vectors[:1].expand(5, -1), atol=1e-5)
        with torch.no_grad():
            logits = model.network.head.classifier(vectors[:1])
            assert torch.allclose(logits, model.network(pixels[None]), atol=1e-5)

    def test_explain(self, model, sources):
        views = [model.explain(source) for source in sources]
        rows, columns = views[0].rollout.shape
        n = views[0].prefix + rows * columns
        assert views[0].heads.shape == (2, 2, n, n)
        assert views[0].distance.shape == (2, 2)
        assert all(np.array_equal(view.rollout, views[0].rollout) for view in views)

    def test_saved_and_loaded(self, model, sources, tmp_path):
        again = sightline.load(model.save(tmp_path / "copy"))
        assert model.predict(sources) == again.predict(sources)
        assert (again.labels, again.preprocess) == (model.labels, model.preprocess)
        larger = sightline.load(tmp_path / "copy", image_size=(40, 32), num_classes=5)
        assert larger.preprocess.size == (40, 32)
        assert len(larger.labels) == 5

    def test_an_image_that_cannot_be_read_is_named(self, model, sources, tmp_path):
        for ask in (model.predict, model.embed):
            with pytest.raises(sightline.UserError, match=r"gone\.png: cannot decode: No such file"):
                ask([sources[0], tmp_path / "gone.png"])
        with pytest.raises(sightline.UserError, match=r"gone\.png"):
            model.explain(tmp_path / "gone.png")

    def test_one_image_is_no_list(self, model, sources):
        _, path, _, _, array = sources
        for ask in (model.predict, model.embed):
            for one in (path, array):
                with pytest.raises(sightline.UserError, match="a list of images"):
                    ask(one)
        batch = np.stack([array] * 2)
        assert len(model.predict(batch)) == 2


class TestModelDirectory:
    def test_config(self, run, model):
        config = json.loads((run.directory / "config.json").read_text())
        assert (config["format"], config["task"], config["labels"]) == ("sightline", "classify", ["0", "1", "2"])
        assert config["architecture"]["backbone"]["embed_dim"] == 16
        assert config["preprocess"]["fingerprint"] == model.preprocess.fingerprint
        assert config["preprocess"]["size"] == list(model.preprocess.size)
        assert set(config["versions"]) == {"sightline", "torch"}

    def test_card(self, run):
        card = (run.directory / "README.md").read_text()
        assert card.startswith("---\n")
        for part in (
            "library_name: sightline",
            "image-classification",
            "three digits",
            f"{run.metrics['top1']:.2%}",
            f"{run.counts['evaluated']} images, 0 refused",
            "seed 3",
            "sightline.load(",
            "## Limits",
            "0, 1, 2",
        ):
            assert part in card

    def test_record(self, run):
        record = json.loads((run.directory / "run.json").read_text())
        assert record["status"] == "finished"
        assert record["seed"] == 3
        assert record["data"]["classes"] == 3
        assert record["data"]["train"] + record["data"]["val"] == 45
        assert len(record["data"]["fingerprint"]["train"]) == 64
        assert record["metrics"] == dict(run.metrics)
        assert record["recipe"]["settings"]["epochs"] == 2
        assert {"python", "packages", "device", "precision"} <= record["environment"].keys()
        steps = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
        assert {"step", "loss", "lr"} <= steps[0].keys()
        assert "val_top1" in steps[-1]

    def test_report_is_one_page_that_loads_nothing(self, run):
        page = run.report.read_text()
        assert "three digits" in page
        assert not [word for word in ("<script", "<link", "http://", "https://", "url(", "@import") if word in page]

    def test_misspelt_settings_are_named(self, tmp_path):
        for wrong, says in (
            ({"epoch": 3}, "Did you mean epochs"),
            ({"augment": {"degree": 3}}, "Did you mean degrees"),
            ({"network": {"dept": 3}}, "Did you mean depth"),
        ):
            with pytest.raises(sightline.UserError, match=says):
                sightline.train("builtin:digits", out=tmp_path / "run", **wrong)
        assert not (tmp_path / "run" / "run.json").exists()
