"""What holds for every set of tensors, every document and every layout of a checkpoint."""

import json

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from examples import JSON, altered, examples, tried
from sightline.checkpoints.atomic import write_atomic
from sightline.checkpoints.directory import write_model
from sightline.checkpoints.files import read_json, read_tensors, safetensors_of
from sightline.checkpoints.load import load_bundle
from sightline.checkpoints.rules import Found, as_float, load, save
from sightline.errors import UserError, WorkError
from sightline.images.preprocess import Preprocess
from sightline.network import Architecture, Network, create_model
from sightline.registry import table

LABELS = ("ant", "bee", "cat")
TINY = {"image_size": (8, 12), "patch_size": 4, "embed_dim": 4, "depth": 1, "num_heads": 2, "num_classes": 3}
WORDS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=9)
LIBRARIES = sorted(set(table("checkpoints", "SCHEMES")) - {"openai", "open_clip"})
"""Those that can store a Vision Transformer that tells classes apart."""

SHAPES = st.lists(st.integers(1, 4), max_size=3).map(tuple)


def tiny(**changes) -> Network:
    return create_model("vit_tiny_patch16_224", **{**TINY, **changes}).eval()


def filled(network: Network, seed: int) -> Network:
    """Every weight any finite float32, the smallest and the largest among them."""
    random = np.random.default_rng(seed)
    for parameter in network.parameters():
        bits = random.integers(0, 2**32, parameter.shape, dtype=np.uint32)
        values = torch.from_numpy(bits.view(np.float32)).nan_to_num(1.5, 3e38, -3e38)
        parameter.data.copy_(values)
    return network


def same_bits(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and one.numpy().tobytes() == two.numpy().tobytes()


# Files


@examples(30)
@given(st.dictionaries(WORDS.filter(lambda name: name != "__metadata__"), SHAPES, min_size=1, max_size=4), st.data())
def test_tensors_come_back_bit_for_bit(tmp_path_factory, shapes, data):
    kinds = st.sampled_from([np.float32, np.float64, np.int64, np.uint8])
    written = {n: torch.from_numpy(data.draw(arrays(data.draw(kinds), shape))) for n, shape in shapes.items()}
    file = tmp_path_factory.getbasetemp() / "x.safetensors"
    write_atomic(file, safetensors_of(written))
    found = read_tensors(file).tensors
    assert found.keys() == written.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in written.items())


@examples(60)
@given(st.binary(max_size=200), st.sampled_from(["x.safetensors", "x.npz", "x.pth"]), st.booleans())
def test_any_bytes_are_tensors_or_refused(tmp_path_factory, content, name, framed):
    file = tmp_path_factory.getbasetemp() / name
    if framed:  # a header of the right length, with anything in it
        content = len(content).to_bytes(8, "little") + content if name == "x.safetensors" else b"PK\3\4" + content
    file.write_bytes(content)
    with pytest.raises(UserError, match=name):
        read_tensors(file)


@examples(60)
@given(JSON, st.integers(0, 2**31), st.integers(-3, 3))
def test_any_header_of_tensors_is_read_or_refused(tmp_path_factory, value, size, longer):
    entry = {"dtype": "F32", "shape": value, "data_offsets": [0, size]}
    header = json.dumps({"w": entry if size % 3 else value}).encode()
    file = tmp_path_factory.getbasetemp() / "header.safetensors"
    file.write_bytes((len(header) + longer).to_bytes(8, "little") + header + bytes(8))
    found, refusal = tried(lambda: read_tensors(file).tensors)
    assert "header.safetensors" in refusal or sum(tensor.nbytes for tensor in found.values()) <= 8


@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_an_object_or_refused(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_bytes(content)
    found, refusal = tried(lambda: read_json(file))
    assert "any.json" in refusal or isinstance(found, dict)


@given(st.binary(max_size=300), st.binary(max_size=300), st.none() | st.integers(0, 300))
def test_a_file_is_the_old_one_or_the_new_one(tmp_path_factory, old, new, stop):
    folder = tmp_path_factory.mktemp("atomic")
    file = folder / "x.bin"
    write_atomic(file, old)

    def write(path):
        path.write_bytes(new[:stop])
        if stop is not None:
            raise OSError(28, "No space left on device")

    if stop is None:
        write_atomic(file, write)
    else:
        with pytest.raises(WorkError, match="No space left"):
            write_atomic(file, write)
    assert file.read_bytes() == (new if stop is None else old)
    assert [path.name for path in folder.iterdir()] == ["x.bin"]


# Layouts


@examples(10)
@given(
    st.sampled_from(LIBRARIES),
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from([(2, 2), (4, 2), (6, 3)]),
    st.integers(0, 99),
)
def test_every_layout_holds_every_number(layout, depth, classes, width, seed):
    changes = {"activation": "gelu_tanh", "depth": depth, "num_classes": classes}
    network = filled(tiny(embed_dim=width[0], num_heads=width[1], **changes), seed)
    if layout == "big_vision":  # its class token carries the class row of the positions
        network.backbone.place.positions.table.data[:, :1] = 0
    rules = table("checkpoints", "SCHEMES")[layout].rules(network.architecture)
    theirs = save(rules, network.state_dict())
    ours = load(rules, Found("memory", theirs), network.architecture.shapes())
    assert ours.keys() == network.state_dict().keys()
    assert all(same_bits(ours[name], tensor) for name, tensor in network.state_dict().items())
    again = save(rules, ours)
    assert again.keys() == theirs.keys()
    assert all(same_bits(again[name].contiguous(), tensor.contiguous()) for name, tensor in theirs.items())


@examples(20)
@given(st.sampled_from(LIBRARIES), st.sampled_from(["gone", "extra", "bent"]), st.data())
def test_every_layout_names_what_does_not_fit(layout, fault, data):
    network = tiny(activation="gelu_tanh")
    rules = table("checkpoints", "SCHEMES")[layout].rules(network.architecture)
    theirs = save(rules, network.state_dict())
    name = data.draw(st.sampled_from(sorted(theirs)))
    if fault == "gone":
        del theirs[name]
    elif fault == "bent":
        theirs[name] = torch.zeros(*theirs[name].shape, 2)
    else:
        theirs[name := data.draw(WORDS.filter(lambda word: word not in theirs and word.isprintable()))] = torch.zeros(2)
    with pytest.raises(UserError) as caught:
        load(rules, Found("memory", theirs), network.architecture.shapes())
    assert f"'{name}'" in str(caught.value)


@given(arrays(np.float32, SHAPES, elements=st.floats(width=32)), st.sampled_from([torch.float32, torch.float64]))
def test_only_finite_numbers_are_weights(values, kind):
    tensor = torch.from_numpy(values).to(kind)
    if np.isfinite(values).all():
        assert torch.equal(as_float(tensor, "'w'", "here"), tensor.float())
    else:
        with pytest.raises(UserError, match="'w' holds"):
            as_float(tensor, "'w'", "here")


# Model directories


@examples(10)
@given(
    st.sampled_from(["learned", "sincos2d", "relative", "none"]),
    st.lists(WORDS, min_size=3, max_size=3, unique=True),
    st.integers(0, 99),
)
def test_a_model_comes_back_bit_for_bit(tmp_path_factory, positions, labels, seed):
    network = tiny(positions=positions)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    preprocess = Preprocess((8, 12), crop_pct=0.5 + seed / 200)
    folder = write_model(tmp_path_factory.getbasetemp() / "model", network, preprocess, labels)
    again = load_bundle(folder)
    assert again.architecture == network.architecture
    assert again.preprocess == preprocess
    assert list(again.labels) == labels
    assert all(same_bits(again.network.state_dict()[name], tensor) for name, tensor in network.state_dict().items())
    assert all(p.data_ptr() % 4 == 0 for p in again.network.parameters())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    network = tiny()
    folder = write_model(tmp_path_factory.mktemp("sealed"), network, Preprocess((8, 12)), LABELS)
    return folder, {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}


@examples(60)
@given(st.sampled_from(["config.json", "model.safetensors"]), st.data())
def test_every_change_of_a_model_directory_is_noticed(model, name, data):
    folder, whole = model
    content = bytearray(whole[name])
    match data.draw(st.sampled_from(["flip", "cut", "grow", "swap"])):
        case "flip":
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        case "grow":
            content += data.draw(st.binary(min_size=1, max_size=9))
        case "swap":
            size = data.draw(st.sampled_from([1, 16, 64]))
            a, b = (data.draw(st.integers(0, len(content) - size)) for _ in range(2))
            one, two = content[a : a + size], content[b : b + size]
            content[a : a + size], content[b : b + size] = two, one
    assume(content != whole[name])
    for file, bytes_ in whole.items():
        (folder / file).write_bytes(content if file == name else bytes_)
    with pytest.raises(UserError) as caught:
        load_bundle(folder)
    assert str(folder) in str(caught.value)


@given(altered(tiny().architecture.to_json()))
def test_any_json_is_an_architecture_or_refused(data):
    architecture, refusal = tried(lambda: Architecture.from_json(data))
    assert refusal or Architecture.from_json(json.loads(json.dumps(architecture.to_json()))) == architecture


@examples(30)
@given(data=st.data())
def test_any_configuration_is_a_model_or_refused(model, data):
    folder, whole = model
    config = json.loads(whole["config.json"])
    for key in ("seal", "weights"):  # as a directory of the first version, which carried no hashes
        config.pop(key, None)
    changed = data.draw(altered({**config, "version": 1}))
    (folder / "model.safetensors").write_bytes(whole["model.safetensors"])
    (folder / "config.json").write_text(json.dumps(changed))
    bundle, refusal = tried(lambda: load_bundle(folder))
    assert str(folder) in refusal or len(bundle.labels) == 3
