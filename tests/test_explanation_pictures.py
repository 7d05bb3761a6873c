"""Explanations as pictures, pages and files: each thing at its right place on the image, whole and self-contained."""

import math
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sightline.errors import UserError, WorkError
from sightline.explanation.explain import explain
from sightline.explanation.figures import distance_plot
from sightline.explanation.files import explain_image, folder_names, seen_box
from sightline.explanation.render import View, colours, filter_sheet, overlay, sheet, spread, tiles
from sightline.images.preprocess import Preprocess
from sightline.network import Network, create_model
from sightline.types import Prediction, Score
from test_explanation import small


def bright_seeker(size: tuple[int, int], patch: tuple[int, int]) -> Network:
    """A network made by hand whose class token attends to bright patches."""
    network = create_model(
        "vit_tiny_patch16_224", num_classes=3, image_size=size, patch_size=patch, embed_dim=8, depth=2, num_heads=2
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.backbone.tokenizer.projection.weight[0] = 1 / (3 * math.prod(patch))  # channel 0: mean brightness
        for block in network.backbone.encoder.blocks:
            block.norm1 = torch.nn.Identity()
            for head in range(2):
                block.attention.qkv.bias[4 * head] = 10.0  # every query asks …
                block.attention.qkv.weight[8 + 4 * head, 0] = 4.0  # … and brightness answers
    return network


class TestOverlay:
    @pytest.mark.parametrize("mode", ["crop", "pad", "squash"])
    def test_a_bright_object_is_found_where_it_stands_in_the_original(self, mode):
        image = np.full((230, 410, 3), 20, np.uint8)
        centre = (87, 253)
        image[centre[0] - 9 : centre[0] + 9, centre[1] - 9 : centre[1] + 9] = 255
        preprocess = Preprocess(size=(77, 91), resize=mode, crop_pct=0.9 if mode == "crop" else 1.0, std=(1.0,) * 3)
        network = bright_seeker((77, 91), (7, 7))
        view = explain(network, preprocess(image))
        box = seen_box(preprocess, 230, 410)
        heat, seen = spread(view.rollout_raw, 230, 410, view.view(230, 410, box))
        heat = np.where(seen, heat - np.median(heat), 0).clip(0)
        rows, columns = np.mgrid[:230, :410] + 0.5
        found = ((heat * rows).sum() / heat.sum(), (heat * columns).sum() / heat.sum())
        assert np.hypot(found[0] - centre[0], found[1] - centre[1]) < 8  # a patch is 16 to 31 pixels here

        picture = view.overlay(image, view.rollout_raw, box=box)
        assert picture.shape == image.shape
        darkened = picture[:, :, 0].astype(int) - image[:, :, 0]
        assert (darkened[~seen] < 0).all()
        assert seen.all() == (mode != "crop")

    def test_without_a_box_the_whole_image_was_seen(self):
        view = explain(small(), torch.randn(3, 35, 15))
        heat, seen = spread(view.rollout, 70, 30, view.view(70, 30))
        assert seen.all()
        # Two pixels of the image for one of the input: cell centres lie at odd rows of 7 and columns of 5.
        assert np.allclose(heat[6:8, 4:6].mean(), view.rollout[0, 0], rtol=0.2)
        assert view.overlay(np.zeros((70, 30, 3), np.uint8)).shape == (70, 30, 3)

    def test_interpolation_by_hand(self):
        heat, seen = spread(np.array([[0.0, 8.0]], np.float32), 2, 8, View((0, 0, 8, 2), (2, 8), (2.0, 4.0)))
        assert np.allclose(heat[0], [0, 0, 1, 3, 5, 7, 8, 8])
        assert seen.all()

    def test_pixels_beyond_dropped_patches_were_not_seen(self):
        _, seen = spread(np.ones((1, 2), np.float32), 5, 13, View((0, 0, 13, 5), (5, 13), (5.0, 6.0)))
        assert seen[:, :12].all()
        assert not seen[:, 12:].any()

    def test_seen_box_of_each_mode(self):
        assert seen_box(Preprocess(size=(20, 20)), 40, 100) == (30, 0, 70, 40)
        assert seen_box(Preprocess(size=(20, 20), resize="squash"), 40, 100) == (0, 0, 100, 40)
        assert seen_box(Preprocess(size=(20, 20), resize="pad"), 40, 100) == (0, -30, 100, 70)
        assert seen_box(Preprocess(size=(20, 20), resize="native", multiple=2), 40, 100) == (0, 0, 100, 40)


class TestPictures:
    def test_colours_grow_lighter_from_end_to_end(self):
        lightness = colours(np.linspace(-0.1, 1.1, 101)) @ np.array([0.299, 0.587, 0.114])
        assert (np.diff(lightness) >= -1).all()
        assert lightness[0] < 2
        assert lightness[-1] > 240

    def test_sheet_holds_unlike_pictures_and_long_labels(self):
        page = sheet([np.zeros((10, 8, 3), np.uint8), np.ones((6, 9, 3), np.uint8)], ["a", "a much longer label"], 7)
        assert page.height == 24
        assert page.width > 2 * 60

    def test_tiles_of_a_fine_grid_are_thinned_out(self):
        assert max(tiles(np.zeros((40, 30, 40, 30), np.float32)).size) < 14 * 60
        assert tiles(np.eye(6, dtype=np.float32).reshape(2, 3, 2, 3)).mode == "RGBA"

    def test_filters_of_other_channel_counts(self):
        assert filter_sheet(np.zeros((2, 5, 3, 3), np.float32)) is None
        assert filter_sheet(np.zeros((2, 1, 3, 3), np.float32)) is not None

    @given(st.floats(0, 1e4, width=32), st.integers(1, 24))
    def test_distance_plot_keeps_its_dots_inside(self, largest, depth):
        plot = distance_plot(np.linspace(0, largest, 3 * depth, dtype=np.float32).reshape(depth, 3))
        heights = [float(part.split('"')[0]) for part in plot.split('cy="')[1:]]
        assert len(heights) == 3 * depth
        assert all(9.9 <= y <= 206.1 for y in heights)

    def test_overlay_of_an_empty_map(self):
        view = View((0, 0, 6, 4), (4, 6), (2, 2))
        picture = overlay(np.full((4, 6, 3), 100, np.uint8), np.zeros((2, 3), np.float32), view)
        assert (picture == picture[0, 0]).all()
        assert picture.max() < 100


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.sources = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset")]


class TestFiles:
    def test_everything_on_disk_and_a_page_that_needs_nothing_else(self, tmp_path):
        image = np.random.default_rng(0).integers(0, 256, (61, 37, 3), dtype=np.uint8)
        buffer = BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        told = Prediction([Score("<script>alert(1)</script>", 2, 0.75)])
        name = 'a"<img src=x onerror=alert(1)>$style.png'
        preprocess = Preprocess(size=(35, 15))
        view, page = explain_image(
            small(), preprocess, buffer.getvalue(), tmp_path / "out", name=name, prediction=told, layers=[1]
        )
        files = {path.name for path in (tmp_path / "out").iterdir()}
        assert files == {
            *("index.html", "explanation.npz", "original.png", "rollout.png", "rollout-raw.png", "side-by-side.png"),
            *("attention.png", "relevance.png", "heads-layer-02.png", "masks.png", "distance.png", "positions.png"),
            *("filters.png", "colours.png", "norms.png"),
        }
        assert view.layers == (1,)
        text = page.read_text()
        seen = Links()
        seen.feed(text)
        assert "script" not in seen.tags
        assert len(seen.sources) == 11
        assert all(source.startswith("data:image/png;base64,") for source in seen.sources)
        assert "75.0%" in text
        with Image.open(tmp_path / "out" / "rollout.png") as picture:
            assert picture.size == (194, 320)  # small images are enlarged
        saved = np.load(tmp_path / "out" / "explanation.npz")["rollout"]
        assert np.array_equal(saved, view.rollout)

    def test_large_images_are_drawn_small(self, tmp_path):
        explain_image(small(), Preprocess(size=(35, 15)), np.zeros((30, 3000, 3), np.uint8), tmp_path)
        with Image.open(tmp_path / "rollout.png") as picture:
            assert picture.size == (1024, 10)

    def test_nothing_is_written_for_an_unreadable_image(self, tmp_path):
        with pytest.raises(UserError, match="cannot decode"):
            explain_image(small(), Preprocess(size=(35, 15)), b"no image", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_place_that_cannot_be_written(self, tmp_path):
        (tmp_path / "taken").write_text("a file")
        with pytest.raises(WorkError, match="taken"):
            explain_image(small(), Preprocess(size=(35, 15)), np.zeros((9, 9, 3), np.uint8), tmp_path / "taken")

    def test_folder_names_are_unlike(self):
        sources = ["a/cat.jpg", "b/cat.png", Path("c/Cat.jpg"), "cat-2.jpg", b"bytes", ".."]
        names = folder_names(sources)
        assert names == ["cat", "cat-2", "Cat-3", "cat-2-2", "image", "image-2"]
