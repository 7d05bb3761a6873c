"""The web page in a real browser against a real server: what a hand, a keyboard and a voice meet."""

import base64
import json
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from browser import browser  # noqa: F401
from served import Served, saved, serving
from sightline.model import load


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    saved(folder / "first")
    saved(folder / "second", seed=1, labels=("ant", "bee"))
    for name, seed in (("one.png", 1), ("two.png", 2)):
        pixels = np.random.default_rng(seed).integers(0, 256, (48, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "broken.png").write_bytes((folder / "one.png").read_bytes()[:2000])
    return folder


@pytest.fixture(scope="module")
def server(house):
    with serving(f"first={house / 'first'}", f"second={house / 'second'}") as server:
        yield server


@pytest.fixture
def page(browser, server):
    context = browser.new_context(viewport={"width": 1200, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.asked, faults = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda fault: faults.append(str(fault)))
    page.on("console", lambda message: message.type == "error" and faults.append(message.text))
    page.goto(server.url)
    yield page
    # Neither the page nor anything in it has asked another host, and the policy had nothing to stop.
    assert {urlsplit(url).netloc for url in page.asked if not url.startswith("blob:")} == {urlsplit(server.url).netloc}
    assert not [fault for fault in faults if "422" not in str(fault)]
    context.close()


def add(page: Page, *files: Path) -> None:
    page.set_input_files("#files", list(map(str, files)))


def shown(page: Page, pane: int = 0) -> np.ndarray:
    """The pixels of a view."""
    canvas = page.locator("canvas").nth(pane)
    data = canvas.evaluate("canvas => canvas.toDataURL('image/png')")
    return np.asarray(Image.open(BytesIO(base64.b64decode(data.partition(",")[2]))).convert("RGB")).astype(int)


def hover(page: Page, x: float, y: float) -> None:
    expect(page.locator("canvas").first).to_be_visible()
    box = page.locator("canvas").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
    page.wait_for_timeout(60)


def test_upload_answer_and_hover(page, house, server):
    expect(page.locator("#look")).to_be_hidden()
    add(page, house / "one.png")
    prediction = load(house / "first").predict([house / "one.png"], top=5)[0]
    rows = page.locator(".answers li")
    expect(rows).to_have_count(3)
    for row, score in zip(rows.all(), prediction.top, strict=True):
        expect(row.locator("span").last).to_have_text(score.label)  # `<b>bird</b>` as text, not as a tag
        words = "under 0.1 %" if score.score < 0.0005 else f"{100 * score.score:.1f} %"
        expect(row.locator("b")).to_have_text(words)
    expect(page.locator("#status")).to_contain_text(f"one.png: {prediction.label}")

    before, asked = shown(page), len(page.asked)
    hover(page, 0.1, 0.17)
    first = shown(page)
    expect(page.locator("#told")).to_contain_text("the patch in row 1, column 1")
    hover(page, 0.9, 0.83)
    second = shown(page)
    expect(page.locator("#told")).to_contain_text("the patch in row 3, column 5")
    assert np.abs(first - before).mean() > 1
    assert np.abs(second - first).mean() > 1
    assert len(page.asked) == asked  # from what the page has already

    # What is said is what the model computes: the most attended patch of the patch under the pointer, mean of heads.
    row = load(house / "first").explain(house / "one.png").heads[2, :, 15, 1:].mean(axis=0)
    best = int(row.argmax())
    expect(page.locator("#told")).to_contain_text(f"to row {best // 5 + 1}, column {best % 5 + 1}")


def test_layers_heads_depths_and_modes(page, house):
    add(page, house / "one.png")
    hover(page, 0.5, 0.5)
    pictures = [shown(page)]
    page.locator("#layer").select_option("0")
    pictures.append(shown(page))
    page.locator("#head").select_option("1")
    pictures.append(shown(page))
    page.locator("#plot circle").nth(4).dispatch_event(
        "click"
    )  # dots may overlap; two heads in each layer: layer 3, head 1
    expect(page.locator("#layer")).to_have_value("2")
    expect(page.locator("#head")).to_have_value("0")
    pictures.append(shown(page))
    page.get_by_text("Rollout", exact=True).click()
    page.wait_for_timeout(60)
    pictures.append(shown(page))
    page.locator("#depth").fill("0")
    page.wait_for_timeout(60)
    pictures.append(shown(page))
    expect(page.locator("#depth-value")).to_have_text("layers 1 to 1")
    page.get_by_text("Positions", exact=True).click()
    page.wait_for_timeout(60)
    pictures.append(shown(page))
    page.get_by_text("Features", exact=True).click()
    page.wait_for_timeout(60)
    pictures.append(shown(page))
    page.get_by_text("Image alone", exact=True).click()
    page.wait_for_timeout(60)
    pictures.append(shown(page))
    for i, picture in enumerate(pictures):
        for other in pictures[:i]:
            assert np.abs(picture - other).mean() > 0.3
    original = np.asarray(Image.open(house / "one.png")).astype(int).repeat(4, axis=0).repeat(4, axis=1)
    away = [np.abs(picture - original).mean() for picture in pictures]
    assert away[-1] < 0.7 * min(away[:-1])  # JPEG, and how a browser scales, are all that is left


def test_two_images_and_two_models_side_by_side(page, house):
    add(page, house / "one.png", house / "two.png")
    page.get_by_label("Side by side").check()
    expect(page.locator(".pane")).to_have_count(2)
    expect(page.locator(".pane h2").nth(1)).to_have_text("two.png")
    page.get_by_label("Model of view B").select_option("second")
    expect(page.locator(".pane").nth(1).locator(".answers li")).to_have_count(2)
    page.get_by_label("Image of view B").select_option("0")
    expect(page.locator(".pane h2").nth(1)).to_have_text("one.png")
    before = shown(page, 0), shown(page, 1)
    hover(page, 0.3, 0.5)
    assert all(np.abs(shown(page, i) - before[i]).mean() > 0.3 for i in (0, 1))  # both follow the hand
    expect(page.locator("#plot svg")).to_have_count(2)


def test_a_bad_file_is_named_and_the_rest_goes_on(page, house):
    add(page, house / "broken.png")
    expect(page.get_by_role("alert")).to_contain_text("broken.png: cannot decode: image file is truncated")
    add(page, house / "two.png")
    expect(page.locator(".answers li")).to_have_count(3)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_by_keyboard_alone(page, house):
    page.keyboard.press("Tab")
    expect(page.locator("#files")).to_be_focused()  # a file dialog is the browser's own
    add(page, house / "one.png")
    expect(page.locator(".answers li")).to_have_count(3)
    seen = []
    for _ in range(14):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        if seen[-1] == "layer":
            page.keyboard.press("ArrowUp")
        if seen[-1] == "CANVAS":
            break
    assert seen[-1] == "CANVAS", seen
    expect(page.locator("#layer")).to_have_value("1")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#told")).to_contain_text("Layer 2. Attention (mean of heads) of the patch in row 2, column 3")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    expect(page.locator("#told")).to_contain_text("the patch in row 1, column 4")
    page.keyboard.press("Escape")
    expect(page.locator("#told")).to_contain_text("the class token")


def test_paste_and_drop(page, house):
    text = base64.b64encode((house / "one.png").read_bytes()).decode()
    script = """([text, kind]) => {
        const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
        const carried = new DataTransfer();
        carried.items.add(new File([bytes], kind + '.png', { type: 'image/png' }));
        const how = kind === 'paste' ? { clipboardData: carried } : { dataTransfer: carried };
        const made = kind === 'paste' ? new ClipboardEvent('paste', how) : new DragEvent('drop', how);
        document.dispatchEvent(made);
    }"""
    for kind in ("paste", "drop"):
        page.evaluate(script, [text, kind])
        expect(page.locator(".pane h2")).to_have_text(f"{kind}.png")


def test_what_can_be_taken_home(page, house):
    add(page, house / "one.png")
    with page.expect_download() as picture:
        page.get_by_role("button", name="Save picture").click()
    assert picture.value.suggested_filename == "one-heads.png"
    with Image.open(picture.value.path()) as taken:
        assert taken.size == (320, 192)
    with page.expect_download() as arrays:
        page.get_by_role("button", name="Save arrays").click()
    with np.load(arrays.value.path()) as found:
        assert found["heads"].shape == (3, 2, 16, 16)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_narrow_screen(browser, server: Served, house, scheme):
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True)
    page = context.new_page()
    page.goto(server.url)
    add(page, house / "one.png", house / "two.png")
    expect(page.locator(".answers li")).to_have_count(3)
    page.get_by_label("Side by side").check()
    expect(page.locator(".pane h2")).to_have_text(["one.png", "two.png"])
    assert page.evaluate("document.documentElement.scrollWidth") <= 360  # nothing is cut off at the side
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(json.loads(ground.replace("rgb(", "[").replace(")", "]")))
    assert (light > 600) == (scheme == "light")
    context.close()
