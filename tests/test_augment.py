"""Augmentation and mixing: pure functions of their keys, and of nothing else."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, one_hot
from torchvision.transforms import v2

from sightline.errors import UserError
from sightline.images.augment import Augment, sample_key, sample_keys
from sightline.images.crops import Crops
from sightline.images.mix import mix
from sightline.images.preprocess import Preprocess

PLAIN = Preprocess(size=(29, 23), resize="squash", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
EVERYTHING = Augment(
    crop="resized",
    horizontal_flip=0.5,
    vertical_flip=0.5,
    degrees=15.0,
    translate=0.1,
    zoom=(0.9, 1.1),
    shear=5.0,
    elastic_alpha=20.0,
    randaugment=2,
    brightness=0.4,
    hue=0.1,
    erasing=0.5,
)
KINDS = {
    "nothing": Augment(),
    "everything": EVERYTHING,
    "resized": Augment(crop="resized"),
    "padded": Augment(crop="padded", padding=3, horizontal_flip=0.5),
    "affine": Augment(degrees=10.0),
    "elastic": Augment(elastic_alpha=30.0),
    "colour": Augment(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.2),
    "randaugment": Augment(randaugment=2, randaugment_magnitude=15),
    "erasing": Augment(erasing=1.0),
    "views": Augment(brightness=0.4, jitter=0.8, grey=0.5, blur=0.5, solarize=0.5),
}


def image(height: int = 41, width: int = 37, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", KINDS)
def test_pure_function_of_image_and_key(name):
    augment = KINDS[name].bind(PLAIN)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    picture = image()
    before = picture.copy()
    results = {key: augment(picture, key) for key in (0, 7, 2**63 - 1)}
    torch.manual_seed(99)
    fresh = KINDS[name].bind(PLAIN)
    for key in reversed(results):
        assert torch.equal(fresh(picture, key), results[key])
    assert np.array_equal(picture, before)
    assert all(r.shape == (3, 29, 23) and r.dtype == torch.float32 for r in results.values())
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    if name != "nothing":
        assert len({r.numpy().tobytes() for r in results.values()}) > 1


def test_views_by_hand():
    plain, half = Preprocess(size=(2, 2), mean=(0.0,) * 3, std=(1.0,) * 3), np.zeros((2, 2, 3), dtype=np.uint8)
    half[0] = (10, 128, 200)
    solarized = Augment(solarize=1.0).bind(plain)(half, 1)
    assert torch.round(solarized[:, 0, 0] * 255).tolist() == [10, 127, 55]
    grey = Augment(grey=1.0).bind(plain)(half, 1)
    assert torch.equal(grey[0], grey[1])
    assert float(grey[0, 0, 0]) * 255 == pytest.approx(0.299 * 10 + 0.587 * 128 + 0.114 * 200, abs=1)
    large = plain.replace(size=(112, 112))
    sharp, blur = Augment().bind(large)(image(112, 112), 1), Augment(blur=1.0).bind(large)
    deviations = [float(blur(image(112, 112), key).std() / sharp.std()) for key in range(8)]
    assert max(deviations) <= 1
    assert min(deviations) < 0.6


def test_many_views_of_an_image_each_follow_from_its_key():
    see = Crops((0.5, 1.0), (0.1, 0.3), 3, (12, 10)).bind(Augment(), PLAIN)
    first, second, local = see(image(), 7)
    assert (first.shape, second.shape, local.shape) == ((3, 29, 23), (3, 29, 23), (3, 3, 12, 10))
    again = pickle.loads(pickle.dumps(see))(image(), 7)
    assert all(torch.equal(a, b) for a, b in zip((first, second, local), again, strict=True))
    assert not torch.equal(local[0], local[1])
    assert not torch.equal(first, see(image(), 8)[0])
    assert len(Crops(count=0).bind(Augment(), PLAIN)(image(), 7)) == 2


def test_global_random_state_is_left_alone():
    augment = EVERYTHING.bind(PLAIN)
    expected = torch.rand(5)
    torch.manual_seed(0)
    augment(image(), 3)
    assert torch.equal(torch.rand(5), expected)


def test_without_settings_it_is_evaluation():
    picture = image()
    for contract in (PLAIN, Preprocess((29, 23), crop_pct=0.8, draft=True), Preprocess((32, 32), kernel="pillow")):
        assert torch.equal(Augment().bind(contract)(picture, 5), contract(picture))
    assert torch.equal(Augment(crop="padded").bind(PLAIN)(picture, 5), PLAIN(picture))


def test_flips_are_flips():
    straight = PLAIN(image())
    assert torch.equal(Augment(horizontal_flip=1.0).bind(PLAIN)(image(), 1), straight.flip(2))
    assert torch.equal(Augment(vertical_flip=1.0).bind(PLAIN)(image(), 1), straight.flip(1))
    both = Augment(horizontal_flip=1.0, vertical_flip=1.0).bind(PLAIN)(image(), 1)
    assert torch.equal(both.flip(1, 2), straight)
    half = Augment(horizontal_flip=0.5).bind(PLAIN)
    flipped = sum(torch.equal(half(image(), key), straight.flip(2)) for key in range(200))
    assert 70 < flipped < 130


def test_resized_crop_is_that_of_torchvision():
    contract = Preprocess((23, 23), interpolation="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    augment = Augment(crop="resized", crop_scale=(0.2, 0.8)).bind(contract)
    theirs = v2.RandomResizedCrop((23, 23), scale=(0.2, 0.8), antialias=True)
    pixels = torch.from_numpy(image()).permute(2, 0, 1)
    for key in range(7):
        torch.manual_seed(key)
        assert torch.equal(augment(image(), key), theirs(pixels) / 255)


def test_padded_crop_shifts_over_black():
    contract = Preprocess((7, 5), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), resize="squash")
    white = np.full((7, 5, 3), 255, np.uint8)
    sums = {int(Augment(crop="padded", padding=2).bind(contract)(white, key)[0].sum()) for key in range(300)}
    assert sums == {rows * columns for rows in (5, 6, 7) for columns in (3, 4, 5)}


def test_settings_survive_json_and_are_checked():
    assert Augment.from_json(EVERYTHING.to_json()) == EVERYTHING
    assert Augment.from_json({}) == Augment()
    for wrong, reason in (
        ({"horizontal_filp": 1}, "Did you mean horizontal_flip"),
        ({"horizontal_flip": 1.5}, "horizontal_flip has to be a number from 0 to 1"),
        ({"hue": "red"}, "hue has to be"),
        ({"crop_scale": [0.9, 0.1]}, "crop_scale has to be two rising numbers"),
        ({"randaugment": True}, "randaugment has to be a whole number"),
        ({"crop": "wild"}, "resized, padded, none"),
        ({"padding": 4}, "padding needs crop='padded'"),
    ):
        with pytest.raises(UserError, match=reason):
            Augment.from_json(wrong)
    with pytest.raises(UserError, match="elastic_sigma"):
        Augment(elastic_alpha=1.0, elastic_sigma=8.0).bind(PLAIN)
    with pytest.raises(UserError, match="native"):
        Augment(crop="padded").bind(Preprocess((32, 32), resize="native", multiple=8))


def test_keys_are_stable_and_spread():
    assert [sample_key(0, 0, 0), sample_key(1, 2, 3), sample_key(-5, 0, 2**40)] == [
        1279368494785126216,
        7510213797696614745,
        8434491892661645240,
    ]
    keys = sample_keys(7, 3, np.arange(20_000))
    assert keys.dtype == np.int64
    assert keys.min() >= 0
    assert len(set(keys.tolist()) | set(sample_keys(7, 4, np.arange(20_000)).tolist())) == 40_000
    assert keys[11] == sample_key(7, 3, 11)
    bits = (keys[:, None] >> np.arange(63)) & 1
    assert np.abs(bits.mean(0) - 0.5).max() < 0.02


def batch(size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(size, 3, 11, 7, generator=generator)
    return pixels, torch.arange(size) % 5, torch.from_numpy(sample_keys(seed, 0, np.arange(size)))


MIXES = {
    "mixup": {"mixup_alpha": 0.8},
    "cutmix": {"cutmix_alpha": 1.0},
    "both": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "smoothing": 0.1},
}


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(sorted(MIXES)),
    size=st.integers(2, 13),
    cut=st.integers(0, 6).map(lambda n: 2 * n),
    seed=st.integers(0, 9),
)
def test_mixing_does_not_depend_on_the_split(name, size, cut, seed):
    pixels, targets, keys = batch(size, seed)
    original = pixels.clone()
    mixed, soft = mix(pixels, targets, keys, num_classes=5, **MIXES[name])
    parts = [slice(0, min(cut, size)), slice(min(cut, size), size)]
    split = [mix(pixels[p], targets[p], keys[p], num_classes=5, **MIXES[name]) for p in parts if p.stop > p.start]
    assert torch.equal(torch.cat([m for m, _ in split]), mixed)
    assert torch.equal(torch.cat([s for _, s in split]), soft)
    assert torch.equal(pixels, original)
    assert torch.allclose(soft.sum(1), torch.ones(size))
    paired = size // 2 * 2  # together a pair keeps what it had
    sums = [x[:paired].unflatten(0, (-1, 2)).sum(1) for x in (mixed, pixels)]
    assert torch.allclose(*sums, atol=1e-5)
    if size % 2:
        assert torch.equal(mixed[-1], pixels[-1])


def test_targets_follow_the_pixels():
    pixels = torch.stack([torch.full((3, 11, 7), float(i % 2)) for i in range(40)])  # ones only in the odd images
    targets, keys = torch.arange(40) % 2, torch.arange(40)
    for settings_ in MIXES.values():
        mixed, soft = mix(pixels, targets, keys, num_classes=2, **(settings_ | {"smoothing": 0.0}))
        assert torch.allclose(mixed.mean((1, 2, 3)), soft[:, 1], atol=1e-6)
        assert len(set(soft[::2, 1].tolist())) > 9
    shares = mix(pixels.repeat(50, 1, 1, 1), targets.repeat(50), torch.arange(2000), num_classes=2, mixup_alpha=1.0)[1]
    assert abs(shares[::2, 0].mean() - 0.5) < 0.03


def test_cutmix_exchanges_one_box():
    pixels, targets, keys = batch(8)
    mixed, _ = mix(pixels, targets, keys, num_classes=5, cutmix_alpha=1.0)
    for first in range(0, 8, 2):
        changed = (mixed[first] != pixels[first]).any(0)
        assert torch.equal(mixed[first][:, changed], pixels[first + 1][:, changed])
        rows, columns = changed.any(1), changed.any(0)
        assert torch.equal(changed, rows[:, None] & columns[None, :])


def test_smoothing_is_that_of_cross_entropy():
    pixels, targets, keys = batch(6)
    logits = torch.randn(6, 5)
    same, soft = mix(pixels, targets, keys, num_classes=5, smoothing=0.1)
    assert torch.equal(same, pixels)
    assert torch.allclose(cross_entropy(logits, soft), cross_entropy(logits, targets, label_smoothing=0.1))
    again = mix(pixels, one_hot(targets, 5).float(), keys, num_classes=5, smoothing=0.1)[1]
    assert torch.equal(again, soft)
    with pytest.raises(UserError, match="smoothing has to be from 0 to 1"):
        mix(pixels, targets, keys, num_classes=5, smoothing=1.5)
    with pytest.raises(UserError, match="mixup_alpha has to be at least 0"):
        mix(pixels, targets, keys, num_classes=5, mixup_alpha=-1.0)


def test_a_bound_augmentation_can_be_sent_to_a_process():
    import pickle

    bound = Augment(degrees=20.0, translate=0.1, erasing=0.5).bind(Preprocess(size=(12, 10)))
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    assert torch.equal(pickle.loads(pickle.dumps(bound))(image, 5), bound(image, 5))
