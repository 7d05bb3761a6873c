"""The same image gives the same pixels, bit for bit, wherever they are prepared."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sightline.datasets.image_set import ImageSet, Names, Samples
from sightline.datasets.loader import OrderedLoader
from sightline.datasets.open import open_dataset
from sightline.images.preprocess import Preprocess
from sightline.inference.predictor import Predictor
from sightline.model import Model, load
from sightline.network import create_model
from sightline.recipes.evaluate import evaluate

CONTRACTS = {
    "squash": Preprocess((33, 47), resize="squash"),
    "squash and crop": Preprocess((33, 47), resize="squash", crop_pct=0.9, interpolation="bilinear"),
    "crop": Preprocess((33, 47), resize="crop", crop_pct=0.875),
    "crop, floor": Preprocess((41, 41), resize="crop", resize_size=46, crop_offset="floor"),
    "crop, Pillow": Preprocess((33, 47), resize="crop", kernel="pillow"),
    "crop, lanczos": Preprocess((33, 47), resize="crop", interpolation="lanczos"),
    "crop, aliased": Preprocess((33, 47), resize="crop", interpolation="bilinear", antialias=False),
    "crop, nearest": Preprocess((33, 47), resize="crop", interpolation="nearest"),
    "pad": Preprocess((33, 47), resize="pad", fill=(128, 3, 250)),
    "native": Preprocess((35, 49), resize="native", multiple=7),
    "drafted": Preprocess((33, 47), resize="crop", draft=True),
}


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Blocks of random colour, so that neighbouring pixels are alike as in a photograph and no two places are."""
    cells = np.random.default_rng(seed).integers(0, 256, (-(-height // 5), -(-width // 5), channels), dtype=np.uint8)
    return cells.repeat(5, axis=0).repeat(5, axis=1)[:height, :width]


def write(folder: Path) -> list[str]:
    """One image of every kind, odd in size; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)

    def save(name: str, image: Image.Image, **how) -> None:
        image.save(folder / name, **how)

    photo = Image.fromarray(noise(211, 307))
    for orientation in (1, 3, 6, 7):
        exif = Image.Exif()
        exif[0x0112] = orientation
        save(f"turned-{orientation}.jpg", photo, exif=exif, quality=90)
    save("progressive.jpg", photo, progressive=True)
    save("cmyk.jpg", photo.convert("CMYK"))
    save("grey.jpg", photo.convert("L"))
    save("large.jpg", Image.fromarray(noise(701, 911, seed=1)))
    save("rgba.png", Image.fromarray(noise(53, 71, 4)))
    save("grey-alpha.png", Image.fromarray(noise(71, 53, 4)).convert("LA"))
    save("palette.png", photo.quantize(37))
    save("palette-transparent.gif", photo.quantize(37), transparency=3)
    save("16-bit.png", Image.fromarray(np.random.default_rng(2).integers(0, 65536, (43, 59), dtype=np.uint16)))
    save("black-and-white.png", photo.convert("1"))
    save("float.tif", Image.fromarray(np.random.default_rng(3).random((37, 41), dtype=np.float32)))
    save("tiny.png", Image.fromarray(noise(1, 1)))
    save("flat.png", Image.fromarray(noise(3, 401)))
    save("tall.webp", Image.fromarray(noise(401, 29)), lossless=True)
    save("wrongly-named.jpg", Image.fromarray(noise(83, 67)), format="PNG")
    save("fits.png", Image.fromarray(noise(33, 47)))
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    assert len(write(folder)) == 20
    return folder


@pytest.fixture(scope="module")
def names(folder) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def loaded(folder: Path, names: list[str], preprocess: Preprocess, workers: int) -> dict[str, Tensor]:
    """What training-time evaluation gives to the network."""
    images = ImageSet(("any",), Samples(Names(names), np.zeros(len(names), dtype=np.int64), folder))
    batch_size = 1 if preprocess.resize == "native" else 3
    found = {}
    for _, batch, refused in OrderedLoader(images, preprocess, batch_size=batch_size, workers=workers):
        assert not refused
        found |= {names[i]: pixels for i, pixels in zip(batch.index.tolist(), batch.pixels, strict=True)}
    return found


def network_for(preprocess: Preprocess, classes: int = 5):
    size = {"image_size": preprocess.size, "patch_size": 7, "embed_dim": 12, "depth": 1, "num_heads": 2}
    return create_model("vit_tiny_patch16_224", classes, **size)


def read_by(network, run) -> list[Tensor]:
    """Every image [3, h, w] that reaches a network while `run` works."""
    seen: list[Tensor] = []
    hook = network.register_forward_pre_hook(lambda _, args: seen.extend(args[0].clone()))
    run()
    hook.remove()
    return seen


@pytest.mark.parametrize("contract", CONTRACTS)
def test_every_path_gives_the_same_bits(folder, names, contract):
    preprocess = CONTRACTS[contract]
    expected = loaded(folder, names, preprocess, workers=0)
    assert expected.keys() == set(names)
    network = network_for(preprocess)
    model = Model(network, preprocess, list("abcde"))

    for name, pixels in loaded(folder, names, preprocess, workers=1).items():
        assert torch.equal(pixels, expected[name]), name
    for name in names:
        path = folder / name
        assert expected[name].dtype == torch.float32
        assert torch.equal(model.preprocess(path), expected[name]), name
        assert torch.equal(model.preprocess(str(path)), expected[name]), name
        assert torch.equal(model.preprocess(path.read_bytes()), expected[name]), name
        if not (preprocess.draft and path.suffix == ".jpg"):  # an array has been decoded whole
            with Image.open(path) as image:
                assert torch.equal(model.preprocess(image), expected[name]), name

    predictor = Predictor(network, preprocess, list("abcde"), batch_size=3)
    seen = read_by(network, lambda: list(predictor.predict([str(folder / name) for name in names])))
    for name, pixels in zip(names, seen, strict=True):
        assert torch.equal(pixels, expected[name]), name
    seen = read_by(network, lambda: model.predict([(folder / name).read_bytes() for name in names], batch_size=7))
    for name, pixels in zip(names, seen, strict=True):
        assert torch.equal(pixels, expected[name]), name
    for name in names[::5]:
        [pixels] = read_by(network.backbone, lambda name=name: model.explain(folder / name))
        assert torch.equal(pixels, expected[name]), name


@pytest.mark.parametrize("contract", [name for name in CONTRACTS if name != "drafted"])
def test_decoded_pixels_are_as_good_as_their_file(contract):
    preprocess = CONTRACTS[contract]
    array = noise(59, 83, seed=4)
    stream = BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    expected = preprocess(stream.getvalue())
    for same in (array, Image.fromarray(array), np.asfortranarray(array), array[:, ::-1][:, ::-1]):
        assert torch.equal(preprocess(same), expected)


def test_evaluation_reads_what_training_and_prediction_read(tmp_path, monkeypatch):
    """`evaluate` of a saved model, over files of every kind, with and without a worker process."""
    preprocess = CONTRACTS["crop"]
    for part in ("train", "val"):
        for label in ("a", "b"):
            write(tmp_path / "data" / part / label)
    Model(network_for(preprocess, 2), preprocess, ["a", "b"]).save(tmp_path / "model")
    val = open_dataset(tmp_path / "data").val
    paths = [image for image, _, _ in val.samples]
    expected = [preprocess(path) for path in paths]
    assert len(expected) == 40

    from sightline.recipes import evaluate as recipe

    for workers in (0, 1):
        model = load(tmp_path / "model")
        monkeypatch.setattr(recipe, "load", lambda *_, model=model, **__: model)
        seen = read_by(
            model.network, lambda workers=workers: evaluate("model", tmp_path / "data", batch_size=7, workers=workers)
        )
        assert len(seen) == len(expected)
        assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))
    saved = load(tmp_path / "model")
    assert saved.preprocess == preprocess
    seen = read_by(saved.network, lambda: list(saved.predictor().predict(paths)))
    assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))
