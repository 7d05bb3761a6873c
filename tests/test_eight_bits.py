"""Networks in 8 bits: hand-computed whole numbers, every family, and no answer that was not held against fp32."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from command import cli, ended, refusal, started
from sightline.device import pick_precision
from sightline.errors import UserError
from sightline.evaluation.cache import Cache
from sightline.images.preprocess import Preprocess
from sightline.inference import choose as choosing
from sightline.inference import eight_bits as bits
from sightline.inference import quantised as quantising
from sightline.inference.choose import choose
from sightline.inference.eight_bits import Measured, Pictures, in_eight_bits, paired, read
from sightline.inference.eight_bits import refusal as refused
from sightline.inference.packed import PackedLinear, PackedMlp
from sightline.inference.predictor import Predictor
from sightline.inference.quantised import (
    Grid,
    QuantisedAttention,
    QuantisedLinear,
    QuantisedMlp,
    WholeNorm,
    calibrated,
    multiplies_int8,
    quantised,
)
from sightline.inference.zero_shot import ZeroShotNetwork
from sightline.layers.attention import Attention
from sightline.layers.encoder import Mlp
from sightline.model import Model
from sightline.reports.card import add_section
from test_clip import small as text_reader
from test_networks import KINDS, small
from test_predictor import LABELS, PREPROCESS, image, network, predictor

DENSE = [kind for kind in KINDS if kind not in ("bit", "resnet", "dvae")]


@pytest.fixture
def every_layer(monkeypatch):
    """Layers of small networks count as large enough."""
    monkeypatch.setattr(quantising, "SMALL", 2)


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "int8", 2**24)


def reference(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, low: float, high: float) -> np.ndarray:
    """The layer in whole numbers, one at a time."""
    step = (high - low) / 255
    zero = round(-low / step)
    out = np.zeros((len(x), len(weight)))
    for o, row in enumerate(weight):
        scale = np.abs(row).max() / 127
        whole = np.rint(row / scale).astype(int)
        for n, values in enumerate(x):
            read = np.clip(np.floor(values / step + zero + 0.5), 0, 255).astype(int)
            out[n, o] = int(((read - zero) * whole).sum()) * step * scale + bias[o]
    return out


class TestLayers:
    def test_by_hand(self):
        layer = nn.Linear(3, 2)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[1.27, -0.5, 0.004], [0.0, 2.54, -0.03]]))
            layer.bias.copy_(torch.tensor([10.0, -20.0]))
        grid = Grid(-1.0, 1.55)
        assert (round(grid.step, 9), grid.zero) == (0.01, 100)
        x = torch.tensor([[-1.0, 0.0, 1.55], [0.5, -3.0, 9.0], [0.004, 0.006, -0.004]])
        assert grid.whole(x).tolist() == [[0, 100, 255], [150, 0, 255], [100, 101, 100]]
        # steps of the weights: 0.01 → (127, -50, 0); 0.02 → (0, 127, -2), for half a step goes to the even number
        expected = [
            [10 - 100 * 127 * 1e-4, -20 - 155 * 2 * 2e-4],
            [10 + (50 * 127 + 100 * 50) * 1e-4, -20 + (-100 * 127 - 155 * 2) * 2e-4],
            [10 - 50 * 1e-4, -20 + 127 * 2e-4],
        ]
        with torch.inference_mode():
            found = QuantisedLinear(PackedLinear(layer, torch.float32), grid, torch.float32)(x)
        assert np.allclose(found, expected, atol=2e-5)

    def test_as_in_whole_numbers(self):
        torch.manual_seed(2)
        layer, x = nn.Linear(13, 7), torch.randn(5, 13)
        packed = PackedLinear(layer, torch.float32)
        expected = reference(x.numpy(), *(p.detach().numpy() for p in (layer.weight, layer.bias)), -2.0, 1.5)
        with torch.inference_mode():
            eight = QuantisedLinear(packed, Grid(-2.0, 1.5), torch.float32)
            assert np.allclose(eight(x), expected, atol=1e-5)
            assert torch.equal(eight(x), eight(eight.grid.whole(x)))
            assert np.allclose(eight(x.view(5, 1, 13)).numpy()[:, 0], expected, atol=1e-5)
            halved = QuantisedLinear(packed, Grid(-2.0, 1.5), torch.float32, rows=torch.full((7,), 0.5))
            assert np.allclose(halved(x), expected / 2, atol=1e-5)

    def test_shared_channels_change_what_is_rounded_and_nothing_else(self):
        torch.manual_seed(3)
        layer, x = nn.Linear(11, 5), torch.randn(97, 11) * torch.tensor([50.0] + [0.02] * 10)
        with torch.no_grad():
            layer.weight[:, 0] /= 50
        seen = quantising._Met()
        seen(layer, (x,))
        plain, shared = seen.grid(None), seen.grid(layer.weight.detach())
        assert plain.channels is None
        assert abs(float(shared.channels.log().mean())) < 1e-6
        with torch.inference_mode():
            errors = [
                float((QuantisedLinear(PackedLinear(layer, torch.float32), g, torch.float32)(x) - layer(x)).abs().max())
                for g in (plain, shared)
            ]
        assert errors[1] < errors[0] / 3

    @pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
    def test_an_mlp_hands_whole_numbers_on(self, activation):
        torch.manual_seed(4)
        mlp, x = Mlp(17, 29, activation=activation).eval(), torch.randn(3, 5, 17)
        first, second = Grid(-3.0, 3.0), Grid(-0.2, 2.0)
        with torch.inference_mode():
            eight = QuantisedMlp(PackedMlp(mlp, torch.float32), first, second)
            assert eight.fc1(x).dtype == torch.uint8
            alone = QuantisedLinear(PackedLinear(mlp.fc1, torch.float32, activation), first, torch.float32)
            assert int((eight.fc1(x).int() - second.whole(alone(x)).int()).abs().max()) <= 1  # halves may go either way
            assert torch.allclose(eight(x), mlp(x), atol=0.06)

    def test_a_norm_gives_what_the_layer_would_have_read(self):
        torch.manual_seed(5)
        norm, x = nn.LayerNorm(19, eps=1e-6), torch.randn(7, 19)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        grid = Grid(-2.0, 3.0, torch.rand(19) + 0.5)
        with torch.inference_mode():
            whole = WholeNorm(norm, grid)(x)
            assert int((whole.int() - grid.whole(norm(x)).int()).abs().max()) <= 1
            assert float((whole != grid.whole(norm(x))).float().mean()) < 0.03

    @pytest.mark.parametrize("fused", [True, False])
    def test_attention_with_a_bias(self, fused):
        torch.manual_seed(6)
        attention, x = Attention(24, 3).eval(), torch.randn(2, 7, 24)
        hidden = torch.zeros(2, 1, 1, 7)
        hidden[1, ..., 4:] = -torch.inf
        expected = attention(x, bias=hidden), attention(x)
        attention.qkv, attention.out = (PackedLinear(layer, torch.bfloat16) for layer in (attention.qkv, attention.out))
        attention.fused = fused
        eight = QuantisedAttention(attention, Grid(-4.0, 4.0), Grid(-1.0, 1.0))
        with torch.inference_mode():
            found = [eight(x, bias=hidden.bfloat16()), eight(x)]
        assert all(torch.allclose(a.float(), b, atol=0.03) for a, b in zip(found, expected, strict=True))


class TestEveryKind:
    @pytest.mark.parametrize("kind", DENSE)
    def test_near_and_told_in_fp32(self, kind, every_layer):
        torch.manual_seed(0)
        plain, pixels = small(kind), torch.randn(5, 3, 33, 47)
        before = {name: value.clone() for name, value in plain.state_dict().items()}
        grids = calibrated(plain, [pixels])
        assert grids
        with torch.inference_mode():
            expected, found = plain(pixels), quantised(plain, grids)(pixels)
        assert found.dtype == torch.float32
        assert 0 < float((found - expected).abs().max()) < 0.1 * float(expected.max() - expected.min())
        assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
        eight = [p for p in quantised(plain, grids).modules() if isinstance(p, QuantisedLinear)]
        assert len(eight) == len(grids)

    @pytest.mark.parametrize("kind", ["bit", "resnet"])
    def test_without_dense_layers_it_is_refused(self, kind, every_layer, cache):
        given = Predictor(small(kind), PREPROCESS, LABELS)
        with pytest.raises(UserError, match="no dense layer"):
            in_eight_bits(given, pictures(given), cache=cache)

    def test_small_layers_are_no_gain(self, cache):
        with pytest.raises(UserError, match="at least 8,192 weights"):
            in_eight_bits(predictor(), pictures(predictor()), cache=cache)

    def test_merged_networks_too(self, every_layer):
        merged = network(depth=3, image_size=(42, 30), patch_size=(7, 5)).merged(4).eval()
        pixels = torch.randn(2, 3, 42, 30)
        with torch.inference_mode():
            assert quantised(merged, calibrated(merged, [pixels]))(pixels).shape == (2, 5)

    def test_a_layer_that_read_infinities_is_left_out(self, every_layer):
        plain, pixels = small("vit"), torch.randn(2, 3, 33, 47)
        with torch.no_grad():
            plain.backbone.encoder.blocks[-1].norm2.weight[0] = torch.inf
        names = calibrated(plain, [pixels])
        assert any("blocks.0" in name for name in names)
        assert not any(f"blocks.{len(plain.backbone.encoder.blocks) - 1}.mlp" in name for name in names)


def pictures(given: Predictor, number: int = 40, labelled: bool = False) -> Pictures:
    targets = [i % 5 for i in range(number)] if labelled else None
    return read(given, [image(i) for i in range(number)], targets)


@pytest.mark.usefixtures("every_layer")
class TestGate:
    def test_this_processor_has_it(self):
        assert multiplies_int8()  # if not, the rest of this file says little

    def test_what_is_measured_is_what_is_answered(self, cache):
        given = predictor()
        found = in_eight_bits(given, pictures(given, 60, labelled=True), agreement=0.5, cache=cache)
        number = found.measured
        assert (number.images, number.tuned, number.labelled) == (45, 15, 45)
        judged = [i for i in range(60) if i % 4]
        exact, eight = (
            [a.prediction.index for a in p.predict([image(i) for i in judged])] for p in (given, found.predictor)
        )
        assert number.same == sum(a == b for a, b in zip(exact, eight, strict=True))
        assert number.right == tuple(sum(a == i % 5 for a, i in zip(p, judged, strict=True)) for p in (exact, eight))
        assert number.gained - number.lost == number.right[1] - number.right[0]
        assert found.predictor.computing is not given.computing

    def test_it_is_known_the_next_time(self, cache, monkeypatch):
        given = predictor()
        first = in_eight_bits(given, pictures(given), agreement=0.5, cache=cache)
        monkeypatch.setattr(bits, "calibrated", lambda *_: pytest.fail("it was measured again"))
        again = in_eight_bits(predictor(), pictures(given), agreement=0.5, cache=cache)
        assert (first.kept, again.kept) == (False, True)
        assert again.measured == first.measured
        one, other = ([a.prediction.top for a in p.predictor.predict([image(3)])] for p in (first, again))
        assert one == other
        monkeypatch.undo()
        monkeypatch.setattr(quantising, "SMALL", 2)
        assert not in_eight_bits(given, pictures(given, 41), agreement=0.5, cache=cache).kept
        assert not in_eight_bits(given, pictures(given, labelled=True), agreement=0.5, cache=cache).kept

    @pytest.mark.parametrize("text", ["", "[", '{"images": 3}', '{"images": 9, "same": 10}'])
    def test_what_nobody_here_wrote_counts_as_not_there(self, text, cache):
        given = predictor()
        in_eight_bits(given, pictures(given), agreement=0.5, cache=cache)
        key = bits._key(given, pictures(given))
        tensors, _ = cache.get(key)
        cache.put(key, tensors, text)
        assert not in_eight_bits(given, pictures(given), agreement=0.5, cache=cache).kept

    def test_it_is_refused_where_answers_change(self, cache, monkeypatch):
        make = quantised

        def sabotaged(plain, grids):
            copy = make(plain, grids)
            copy.head.classifier.bias = nn.Parameter(copy.head.classifier.bias + torch.tensor([99.0, 0, 0, 0, 0]))
            return copy

        monkeypatch.setattr("sightline.inference.predictor.quantised", sabotaged)
        given = predictor()
        with pytest.raises(UserError, match="8 bits change too many answers: top-1 as in fp32 "):
            in_eight_bits(given, pictures(given), cache=cache)
        with pytest.raises(UserError, match="change too many"):  # and what is kept is no way around
            in_eight_bits(given, pictures(given), cache=cache)

    def test_who_does_not_fit_is_told_why(self, cache, monkeypatch):
        given = predictor()
        with pytest.raises(UserError, match="31 images are too few"):
            in_eight_bits(given, pictures(given, 31), cache=cache)
        for share in (0.0, 1.5, float("nan")):
            with pytest.raises(UserError, match="share above 0"):
                in_eight_bits(given, pictures(given), agreement=share, cache=cache)
        with pytest.raises(UserError, match="first class"):
            in_eight_bits(Predictor(network(num_classes=0), PREPROCESS, ()), pictures(given), cache=cache)
        with pytest.raises(UserError, match="the device is meta"):
            in_eight_bits(given.altered(device=torch.device("meta")), pictures(given), cache=cache)
        with pytest.raises(UserError, match="2 images to calibrate on, and 1 classes"):
            read(given, [image(0), image(1)], [3])
        monkeypatch.setattr(bits, "multiplies_int8", lambda: False)
        with pytest.raises(UserError, match="does not multiply 8-bit numbers"):
            in_eight_bits(given, pictures(given), cache=cache)
        with pytest.raises(UserError, match="calibrated on your own images"):
            pick_precision("int8", torch.device("cpu"))

    def test_a_processor_without_the_instructions(self, monkeypatch):
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
        assert not multiplies_int8.__wrapped__()

    def test_classes_by_name_are_part_of_what_is_known(self, cache):
        reader, keys = text_reader(), []
        for labels in (["circle", "square"], ["square", "circle"]):
            words = torch.randn(2, reader.architecture.head.projection_dim, generator=torch.Generator().manual_seed(7))
            asked = ZeroShotNetwork(reader, F.normalize(words if labels[0] == "circle" else -words))
            given = Predictor(asked, Preprocess(reader.architecture.backbone.image_size), labels)
            found = in_eight_bits(given, pictures(given), agreement=0.1, cache=cache)
            assert found.measured.layers > 2
            assert not any("text" in name for name in found.predictor.grids)
            keys.append(bits._key(given, pictures(given)))
        assert keys[0] != keys[1]

    def test_files_that_cannot_be_read_are_left_out(self, tmp_path):
        (tmp_path / "text.png").write_text("no image")
        found = read(predictor(), [image(0), str(tmp_path / "text.png"), image(2)], [3, 1, 4], "abc")
        assert [item.path for item in found.images] == ["a", "c"]
        assert found.targets == [3, 4]


class TestFigures:
    def test_more_changes_are_offered_where_most_answers_stay(self):
        assert "--agreement 0.983)" in refused(Measured(300, 295, 7, 3, 0.1), 0.99)
        assert "at least 98.50% is asked for" in refused(Measured(300, 269, 7, 3, 0.1), 0.985)
        assert "--agreement" not in refused(Measured(300, 269, 7, 3, 0.1), 0.985)

    def test_the_interval_of_a_change(self):
        # 3 gained and 13 lost of 200: (3.5 - 13.5)/202 ± 1.96·√(17 - 100/202)/202, by hand
        assert paired(3, 13, 200) == pytest.approx((-0.088917, -0.010093), abs=1e-5)
        low, high = paired(0, 0, 98)
        assert low == -high
        assert high == pytest.approx(1.959964 / 100)

    @pytest.mark.parametrize(
        "changes",
        [
            {"same": 101},
            {"images": 0, "same": 0},
            {"tuned": 0},
            {"layers": 0},
            {"right": (5, 7)},
            {"gained": 3},
            {"labelled": 101},
            {"right": (60, 61), "labelled": 50},
            {"difference": float("nan")},
        ],
    )
    def test_what_cannot_be_is_refused(self, changes):
        good = {"images": 100, "same": 99, "tuned": 7, "layers": 3, "difference": 0.1}
        good |= {"labelled": 100, "right": (50, 51), "gained": 2, "lost": 1}
        assert Measured(**good).agreement == 0.99
        with pytest.raises(UserError):
            Measured(**{**good, **changes})


@pytest.mark.usefixtures("every_layer")
class TestChoice:
    def test_nobody_gets_8_bits_unasked(self):
        for precision in ("auto", "fp32", "bf16"):
            assert "int8" not in choosing._ways(predictor(), precision)

    def test_the_first_images_of_the_job(self, cache, monkeypatch):
        monkeypatch.setattr(bits, "LOOK", 50)
        given, sources = predictor(), ["gone.png", *(image(i) for i in range(60))]
        chosen = choose(given, sources, precision="int8", agreement=0.5, cache=cache)
        assert (chosen.measured.images + chosen.measured.tuned, chosen.kept) == (50, False)
        assert "torch in int8, " in chosen.why
        assert "top-1 as in fp32" in chosen.why
        answers = list(chosen.predictor.predict(chosen.sources))
        assert len(answers) == 61
        assert answers[0].error.startswith("cannot decode")
        eight = [a.prediction.index for a in chosen.predictor.predict(sources[1:])]
        assert [a.prediction.index for a in answers[1:]] == eight
        assert choose(given, sources, precision="int8", agreement=0.5, cache=cache).kept

    def test_images_of_ones_own(self, cache):
        given, few = predictor(), [image(1), image(2)]
        chosen = choose(
            given, few, precision="int8", calibrate=[image(i) for i in range(40)], agreement=0.5, cache=cache
        )
        assert chosen.predictor.precision == torch.int8
        assert len(list(chosen.predictor.predict(chosen.sources))) == 2
        with pytest.raises(UserError, match="2 images are too few"):
            choose(given, few, precision="int8", cache=cache)
        with pytest.raises(UserError, match="computed by torch"):
            choose(given, few, precision="int8", runtime="onnx", cache=cache)


class TestCard:
    CARD = "---\nlibrary_name: sightline\n---\n# name\n\n## Use\n\ntext\n\n## Limits\n\nmore\n"

    def test_a_section_takes_the_place_of_an_older_one(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "README.md").write_text(self.CARD)
        assert add_section(tmp_path, "In 8 bits", "one")
        assert add_section(tmp_path, "In 8 bits", "two")
        assert (tmp_path / "README.md").read_text() == f"{self.CARD}\n## In 8 bits\n\ntwo\n"

    def test_other_cards_are_left_alone(self, tmp_path):
        assert not add_section(tmp_path, "In 8 bits", "one")
        (tmp_path / "README.md").write_text(self.CARD)
        assert not add_section(tmp_path, "In 8 bits", "one")  # no model directory
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "README.md").write_text("# somebody's\n")
        assert not add_section(tmp_path, "In 8 bits", "one")
        assert (tmp_path / "README.md").read_text() == "# somebody's\n"
        (tmp_path / "README.md").write_bytes(b"---\nlibrary_name: sightline\n\xff")
        with pytest.raises(UserError, match="not UTF-8"):
            add_section(tmp_path, "In 8 bits", "one")


class TestCommand:
    @pytest.fixture
    def model(self, tmp_path):
        folder = tmp_path / "model"
        wide = network(embed_dim=96, depth=1, num_heads=3)
        with torch.no_grad():
            for parameter in wide.parameters():
                parameter.mul_(0.3)
        Model(wide.eval(), PREPROCESS, LABELS).save(folder)
        (folder / "README.md").write_text(TestCard.CARD)
        return folder

    @pytest.fixture
    def photos(self, tmp_path):
        folder = tmp_path / "photos"
        for i in range(40):
            place = folder / LABELS[i % 5]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image(i)).save(place / f"{i}.png")
        return folder

    def test_calibrated_noted_and_known_again(self, model, photos, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("SIGHTLINE_CACHE_BYTES", str(2**24))
        words = ("predict", model, photos / "ant", "--precision", "int8", "--calibrate", photos, "--agreement", 0.5)
        first = ended(started(*words, "--json"))
        assert first.status == 0, first.err
        assert len(first.document["results"]) == 8
        found = first.document["int8"]
        assert found["images"] == found["accuracy"]["images"] == 30
        assert found["interval"][0] <= found["agreement"] <= found["interval"][1]
        assert "top-1 as in fp32" in first.err
        assert "a change of" in first.err
        card = (model / "README.md").read_text()
        assert card.startswith(TestCard.CARD)
        assert f"Calibrated on '{photos}': top-1 as in fp32" in card
        again = cli(*words, "--json")
        assert again.document["int8"] == found
        assert "as was known" in again.err
        assert again.document["results"] == first.document["results"]

    def test_classes_of_others_and_plain_folders(self, model, photos, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        (photos / "eel").rename(photos / "yak")
        words = ("predict", model, photos / "ant" / "0.png", "--precision", "int8", "--agreement", 0.5, "--calibrate")
        said = cli(*words, photos)
        assert said.status == 0
        assert "accuracy is not measured: the classes of" in said.err
        loose = tmp_path / "loose"
        loose.mkdir()
        for path in photos.glob("*/*.png"):
            path.rename(loose / path.name)
        said = cli(*words, loose, "--json")
        assert json.loads(said.out)["int8"]["images"] == 30
        assert "accuracy" not in said.document["int8"]

    def test_refusals(self, model, photos, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        assert "too few to calibrate" in refusal("predict", model, photos / "ant", "--precision", "int8")
        assert "is for --precision int8" in refusal("predict", model, photos, "--agreement", 0.9)
        assert "is for --precision int8" in refusal("predict", model, photos, "--calibrate", photos)
        assert "share above 0" in refusal("predict", model, photos, "--precision", "int8", "--agreement", 2)
        make = quantised
        monkeypatch.setattr(
            "sightline.inference.predictor.quantised", lambda plain, grids: nn.Sequential(make(plain, grids), Turned())
        )
        said = refusal("predict", model, photos, "--precision", "int8")
        assert "8 bits change too many answers: top-1 as in fp32 0.00%" in said
        assert (model / "README.md").read_text() == TestCard.CARD


class Turned(nn.Module):
    """The worst class first."""

    def forward(self, logits):
        return F.normalize(-logits)
