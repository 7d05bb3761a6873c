"""What holds for every image, every size and every setting of the pixel contract."""

import math
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from examples import altered, examples, tried
from sightline.images.augment import Augment, sample_key, sample_keys
from sightline.images.decode import Limits, Refusal, decode, image_size
from sightline.images.interchange import from_timm, from_transformers, to_timm, to_transformers
from sightline.images.preprocess import Preprocess, collate

SIDES = st.integers(1, 23)
PICTURES = st.tuples(SIDES, SIDES).flatmap(lambda size: arrays(np.uint8, (*size, 3)))
KEYS = st.integers(0, 2**63 - 1)

TURNED_BACK = {  # what a camera stores for each orientation of an upright image
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, 1),
    7: lambda image: image.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda image: np.rot90(image, -1),
}


def encoded(pixels: np.ndarray, kind: str, **options) -> bytes:
    stream = BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, kind, **options)
    return stream.getvalue()


# Reading


@given(
    upright=PICTURES, orientation=st.sampled_from(sorted(TURNED_BACK)), kind=st.sampled_from(["PNG", "WEBP", "TIFF"])
)
def test_every_orientation_comes_out_upright(upright, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = encoded(TURNED_BACK[orientation](upright), kind, exif=exif, **options)
    assert np.array_equal(decode(data), upright)
    assert image_size(data) == upright.shape[:2]


@given(arrays(np.uint8, st.tuples(SIDES, SIDES, st.just(4))))
def test_transparency_is_a_share_of_white(layer):
    colour, alpha = layer[..., :3].astype(float), layer[..., 3:] / 255
    expected = colour * alpha + 255 * (1 - alpha)
    assert np.abs(decode(layer) - expected).max() <= 1
    assert np.array_equal(decode(encoded(layer, "PNG")), decode(layer))


@given(arrays(np.uint16, st.tuples(SIDES, SIDES)))
def test_deep_grey_keeps_its_order_and_its_ends(grey):
    eight = decode(encoded(grey, "PNG"))
    assert np.array_equal(eight[..., 0], np.rint(grey / 257))
    assert (eight == eight[..., :1]).all()


@given(st.integers(0, 70_000), st.integers(0, 70_000), st.integers(1, 10**10), st.integers(1, 70_000))
def test_a_size_is_refused_exactly_where_it_is_over_a_limit(height, width, pixels, aspect):
    limits = Limits(pixels=pixels, aspect=aspect)
    bad = min(height, width) < 1 or height * width > pixels or max(height, width) > aspect * min(height, width)
    if bad:
        with pytest.raises(Refusal):
            limits.check(height, width)
    else:
        limits.check(height, width)


@examples(40)
@given(
    picture=PICTURES,
    kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]),
    cut=st.floats(0, 1, exclude_max=True),
)
def test_a_cut_file_is_an_image_or_a_refusal_with_its_name(picture, kind, cut, tmp_path_factory):
    data = encoded(picture, kind)
    file = tmp_path_factory.getbasetemp() / "cut"
    file.write_bytes(data[: int(cut * len(data))])
    found, refusal = tried(lambda: decode(file))
    assert refusal.startswith(f"{file}: cannot decode: ") or found.shape == picture.shape


# Sizes


@given(
    st.integers(1, 100_000),
    st.integers(1, 100_000),
    st.tuples(st.integers(1, 500), st.integers(1, 500)),
    st.integers(1, 32),
)
def test_native_sizes_keep_budget_and_aspect_ratio(height, width, size, multiple):
    assume(multiple**2 <= math.prod(size))
    contract = Preprocess(size, resize="native", multiple=multiple)
    rows, columns = contract.scaled(height, width)
    assert 0 < rows * columns <= math.prod(size)
    assert rows % multiple == columns % multiple == 0
    assert contract.scaled(width, height) == (columns, rows)
    rows, columns = rows // multiple, columns // multiple
    assert columns == -(-rows * width // height) or rows == -(-columns * height // width)


@given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=5), st.integers(0, 9))
def test_a_padded_batch_holds_every_image_and_zeros(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, *size, generator=generator) + 1 for size in sizes]
    pixels, told = collate(images)
    assert (told is None) == (len(set(sizes)) == 1)
    for row, image in zip(pixels, images, strict=True):
        assert torch.equal(row[:, : image.shape[1], : image.shape[2]], image)
        assert row.count_nonzero() == image.numel()
    assert told is None or told.tolist() == [list(size) for size in sizes]


CONTRACTS = st.builds(
    Preprocess,
    size=st.tuples(st.integers(16, 400), st.integers(16, 400)) | st.integers(16, 400).map(lambda n: (n, n)),
    resize=st.sampled_from(["squash", "crop", "pad"]),
    crop_pct=st.floats(0.3, 1),
    crop_offset=st.sampled_from(["round", "floor"]),
    fill=st.tuples(*[st.integers(0, 255)] * 3),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]),
    kernel=st.sampled_from(["torch", "pillow"]),
    mean=st.tuples(*[st.floats(0, 1)] * 3),
    std=st.tuples(*[st.floats(0.01, 2)] * 3),
)


@pytest.mark.parametrize(("write", "read"), [(to_timm, from_timm), (to_transformers, from_transformers)])
@given(contract=CONTRACTS, height=st.integers(1, 3000), width=st.integers(1, 3000))
def test_what_another_library_is_told_means_the_same_sizes_and_colours(write, read, contract, height, width):
    told, refusal = tried(lambda: write(contract))
    if refusal:
        return  # it cannot be expressed there, and that is said
    again = read(told)
    assert again.size == contract.size
    assert again.scaled(height, width) == contract.scaled(height, width)
    assert (again.mean, again.std, again.interpolation) == (contract.mean, contract.std, contract.interpolation)


@given(altered(Preprocess((8, 8)).to_json()).filter(lambda data: isinstance(data, dict)))
def test_any_json_is_a_pixel_contract_or_refused(data):
    contract, refusal = tried(lambda: Preprocess.from_json(data))
    assert refusal or Preprocess.from_json(contract.to_json()) == contract


# Variation


def changes(**fixed) -> st.SearchStrategy[Augment]:
    share = st.just(0.0) | st.floats(0, 1)
    settings = {
        "crop": st.sampled_from(["resized", "none"]),
        "horizontal_flip": share,
        "vertical_flip": share,
        "degrees": st.just(0.0) | st.floats(0, 180),
        "translate": share,
        "zoom": st.sampled_from([(1.0, 1.0), (0.5, 1.5)]),
        "shear": st.just(0.0) | st.floats(0, 60),
        "elastic_alpha": st.sampled_from([0.0, 20.0]),
        "randaugment": st.integers(0, 2),
        "brightness": share,
        "saturation": share,
        "hue": st.just(0.0) | st.floats(0, 0.5),
        "erasing": share,
    }
    return st.builds(Augment, **{**settings, **{name: st.just(value) for name, value in fixed.items()}})


@examples(30)
@given(changes(), PICTURES, KEYS)
def test_variation_follows_from_image_and_key_alone(augment, picture, key):
    contract = Preprocess((12, 9), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    before, state = picture.copy(), torch.get_rng_state()
    first = augment.bind(contract)(picture, key)
    torch.rand(5)
    assert torch.equal(augment.bind(contract)(picture, key), first)
    assert np.array_equal(picture, before)
    torch.set_rng_state(state)
    assert first.shape == (3, 12, 9)
    least, most = (
        contract.normalise(torch.zeros(3, 1, 1, dtype=torch.uint8)),
        contract.normalise(torch.full((3, 1, 1), 255, dtype=torch.uint8)),
    )
    assert ((least <= first) & (first <= most)).all()


@given(st.tuples(SIDES, SIDES).flatmap(lambda size: arrays(np.uint8, (*size, 3))), KEYS, st.booleans())
def test_flipped_twice_is_the_same(picture, key, vertical):
    contract = Preprocess(picture.shape[:2], resize="squash")
    name, axis = ("vertical_flip", 1) if vertical else ("horizontal_flip", 2)
    flipped = Augment(**{name: 1.0}).bind(contract)(picture, key)
    assert torch.equal(flipped.flip(axis), contract(picture))
    again = Augment(**{name: 1.0}).bind(contract)(np.flip(picture, axis - 1), key)
    assert torch.equal(again, contract(picture))


@given(changes())
def test_variation_survives_json(augment):
    assert Augment.from_json(augment.to_json()) == augment


@given(altered(Augment().to_json()).filter(lambda data: isinstance(data, dict)))
def test_any_json_is_a_variation_or_refused(data):
    augment, refusal = tried(lambda: Augment.from_json(data))
    assert refusal or Augment.from_json(augment.to_json()) == augment


@given(st.integers(0, 2**31 - 1), st.integers(0, 10**6), st.lists(st.integers(0, 2**40), unique=True, min_size=1))
def test_keys_are_alike_one_by_one_and_together(seed, epoch, rows):
    keys = sample_keys(seed, epoch, np.array(rows))
    assert keys.tolist() == [sample_key(seed, epoch, row) for row in rows]
    assert keys.min() >= 0
    others = [sample_keys(seed + 1, epoch, np.array(rows)), sample_keys(seed, epoch + 1, np.array(rows))]
    assert len({*keys.tolist(), *others[0].tolist(), *others[1].tolist()}) == 3 * len(rows)
