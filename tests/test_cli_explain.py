"""`sightline explain` as its users type it: an image, a folder, a model alone; whatever is wrong is said."""

import json
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

import sightline
from command import cli, refusal
from sightline.checkpoints.directory import write_model
from sightline.cli.explain import METHODS
from sightline.errors import UserError
from sightline.explanation import page
from sightline.images.preprocess import Preprocess
from sightline.network import create_model
from sightline.types import Prediction, Score
from test_networks import KINDS, small

CLASSES = ["ant", "bee", "<i>", "dog", "eel"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Model directories of several kinds, and three images with masks."""
    root = tmp_path_factory.mktemp("explain")
    for kind in ("vit", "dinov2_registers", "resnet"):
        write_model(root / kind, small(kind), Preprocess(size=(33, 47)), CLASSES)
    for number, name in enumerate(("a", "b & c", "d")):
        image = np.random.default_rng(number).integers(0, 256, (61, 97, 3), dtype=np.uint8)
        (root / "images").mkdir(exist_ok=True)
        (root / "masks").mkdir(exist_ok=True)
        Image.fromarray(image).save(root / "images" / f"{name}.png")
        mask = np.zeros((61, 97), np.uint8)
        mask[10:50, 20:60] = 1
        Image.fromarray(mask).save(root / "masks" / f"{name}.png")
    return root


class Page(HTMLParser):
    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.sources, self.links, self.text = [], [], [], ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.sources += [given["src"]] if "src" in given else []
        self.links += [given["href"]] if "href" in given else []

    def handle_data(self, data):
        self.text += data


def test_the_command_knows_the_maps_by_the_names_of_the_page():
    assert tuple(page.METHODS) == METHODS


def test_one_image_with_everything(runs, tmp_path):
    said = cli(
        *("explain", runs / "dinov2_registers", runs / "images" / "a.png", "--out", tmp_path, "--json"),
        *("--masks", runs / "masks", "--faithfulness", "--query", "register-2", "--layers", 2, "--target", "dog"),
    )
    assert said.status == 0, said.err
    [result] = said.document["results"]
    assert "page" not in said.document  # one image needs no overview
    folder = tmp_path / "a"
    expected = {"rollout", "rollout-raw", "attention", "relevance", "heads-layer-02", "masks", "colours", "norms"}
    expected |= {"distance", "positions", "filters", "deletion", "insertion", "original", "side-by-side"}
    assert {path.stem for path in folder.glob("*.png")} == expected
    shown = Page(folder / "index.html")
    assert "script" not in shown.tags
    assert all(source.startswith("data:image/png;base64,") for source in shown.sources)
    for words in ("the register 2", "Relevance speaks for", "overlap with the given mask", "4 registers", "random"):
        assert words in shown.text
    with np.load(result["arrays"]) as arrays:
        assert int(arrays["relevance_class"]) == 3
        assert arrays["overlaps"].shape == (3,)
        assert arrays["deletion_relevance"].shape == arrays["shares_random"].shape


def test_chosen_maps_alone(runs, tmp_path):
    words = ("--method", "relevance", "raw", "--fusion", "max", "--residual", 0.3)
    said = cli("explain", runs / "vit", runs / "images" / "d.png", "--out", tmp_path, *words)
    assert said.status == 0, said.err
    names = {path.name for path in (tmp_path / "d").glob("*.png")}
    assert {"relevance.png", "rollout-raw.png"} <= names
    assert not {"rollout.png", "attention.png", "activation.png"} & names
    with (
        Image.open(tmp_path / "d" / "side-by-side.png") as both,
        Image.open(tmp_path / "d" / "relevance.png") as first,
    ):
        width, height = first.size
        beside = both.convert("RGB").crop((both.width - width, both.height - height, both.width, both.height))
        assert beside.tobytes() == first.convert("RGB").tobytes()
    without = cli("explain", runs / "vit", runs / "images" / "d.png", "--out", tmp_path / "raw", "--method", "raw")
    assert without.status == 0
    with np.load(tmp_path / "raw" / "d" / "explanation.npz") as arrays:
        assert "relevance" not in arrays  # no way back where nobody asks


def test_a_folder_has_an_overview(runs, tmp_path):
    said = cli("explain", runs / "vit", runs / "images", "--out", tmp_path, "--layers", 1, "--json")
    assert said.status == 0, said.err
    shown = Page(Path(said.document["page"]))
    assert shown.links == ["a/index.html", "b%20%26%20c/index.html", "d/index.html"]
    assert all((tmp_path / unquote(link)).is_file() for link in shown.links)
    assert "3 images" in shown.text
    assert len(shown.sources) == 4
    each = [np.load(result["arrays"])["distance"] for result in said.document["results"]]
    with np.load(said.document["arrays"]) as together:
        assert np.allclose(together["distance"], np.mean(each, axis=0), rtol=1e-5)
        assert int(together["images"]) == 3
    assert {"distance.png", "colours.png"} <= {path.name for path in tmp_path.iterdir()}
    said = cli("explain", runs / "resnet", runs / "images", "--out", tmp_path / "cnn", "--json")
    assert said.status == 0, said.err
    assert not (tmp_path / "cnn" / "distance.png").exists()


@pytest.mark.parametrize("kind", ["vit", "dinov2_registers", "resnet"])
def test_a_model_alone(runs, tmp_path, kind):
    said = cli("explain", runs / kind, "--out", tmp_path, "--json")
    assert said.status == 0, said.err
    assert said.document["results"] == []
    shown = Page(Path(said.document["page"]))
    assert ("Left out: this network has no table of positions" in shown.text) == (kind == "resnet")
    with np.load(said.document["arrays"]) as arrays:
        assert ("position_similarity" in arrays) == (kind != "resnet")
        assert arrays["filters"].shape[0] > 3
    assert ("register 4" in shown.text) == (kind == "dinov2_registers")


def test_one_bad_image_among_good_ones(runs, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    said = cli("explain", runs / "vit", tmp_path / "bad.png", runs / "images", "--out", tmp_path / "out", "--json")
    assert said.status == 1
    assert "error" in said.document["results"][0]
    assert len(Page(Path(said.document["page"])).links) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--query", "register-1"), "no token 'register 1'"),
        (("--query", "10,9"), "no patch 10,9: the grid has 9 rows and 12 columns"),
        (("--layers", 9), "no layer 9"),
        (("--residual", 1), "from 0 to below 1"),
        (("--residual", "nan"), "from 0 to below 1"),
        (("--target", "dogs"), "no class 'dogs'. Did you mean dog"),
        (("--method", "rollouts"), "invalid choice: 'rollouts'"),
        (("--masks", "nowhere"), "nowhere"),
        (("--method", "activation"), "no activation map; it has: rollout, raw, attention"),
    ],
)
def test_what_cannot_be_done_is_refused(runs, tmp_path, words, message):
    said = refusal("explain", runs / "vit", runs / "images" / "a.png", "--out", tmp_path / "out", *words)
    assert message in said
    assert not (tmp_path / "out").exists()


def test_masks_that_do_not_fit(runs, tmp_path):
    Image.new("L", (5, 7)).save(tmp_path / "a.png")
    image = runs / "images" / "a.png"
    said = refusal("explain", runs / "vit", image, "--out", tmp_path / "out", "--masks", tmp_path / "a.png")
    assert "7×5 pixels, and its image 61×97" in said
    said = refusal("explain", runs / "vit", runs / "images" / "d.png", "--out", tmp_path / "o", "--masks", tmp_path)
    assert "no mask for d.png (a file named d.png)" in said
    said = refusal("explain", runs / "vit", "--out", tmp_path / "out", "--masks", tmp_path)
    assert "--masks speaks of images, and none was named" in said


class TestNotebookFace:
    def test_explanations_show_the_image_they_are_of(self, runs):
        view = sightline.load(runs / "vit").explain(runs / "images" / "a.png")
        assert view.image.shape == (61, 97, 3)
        assert view._repr_png_().startswith(b"\x89PNG")
        html = view._repr_html_()
        assert 'src="data:image/png;base64,' in html
        assert "asked by the class token" in html
        assert view.picture.size == (97, 61)

    def test_explanations_of_bare_pixels_show_the_map(self):
        from sightline.explanation.explain import explain

        pixels = sightline.Preprocess(size=(33, 47))(np.zeros((33, 47, 3), np.uint8))
        view = explain(small("vit"), pixels)
        assert view.image is None
        assert view.picture.width / view.picture.height == view.grid[1] / view.grid[0]
        name, overrides = KINDS["resnet"]
        nothing = explain(create_model(name, **overrides | {"num_classes": 0}), pixels)
        assert nothing.picture is None
        assert nothing._repr_png_() is None
        assert "img" not in nothing._repr_html_()

    def test_predictions_are_tables_in_which_labels_are_text(self):
        html = Prediction([Score("<script>", 1, 0.75), Score("b", 0, 0.25)])._repr_html_()
        assert "<script>" not in html
        assert "&lt;script&gt;" in html
        assert html.count("<tr>") == 2
        assert "75.0%" in html


def test_json_stays_one_document(runs, tmp_path):
    said = cli("explain", runs / "vit", runs / "images" / "a.png", "--out", tmp_path, "--json")
    assert set(json.loads(said.out)) == {"model", "task", "results"}


def test_masks_of_arrays_from_python(runs):
    from sightline.explanation.files import head_overlaps

    model = sightline.load(runs / "vit")
    view = model.explain(runs / "images" / "a.png")
    overlaps = head_overlaps(view, np.ones((61, 97), bool))
    assert len(overlaps) == 3
    assert all(0 < overlap <= 1 for overlap in overlaps)
    with pytest.raises(UserError, match="no token"):
        model.explain(runs / "images" / "a.png", query="register 1")
