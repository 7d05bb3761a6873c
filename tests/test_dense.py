"""Dense layers multiplied by oneDNN while a network learns: the same numbers, and no others touched."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sightline
from sightline.layers import dense as room
from sightline.layers.dense import Dense, DenseProduct, dense, fast_products, multiplies
from sightline.objectives.supervised import Supervised
from sightline.training.distributed import World
from sightline.training.settings import Settings
from sightline.training.update import Updater
from sightline.types import Batch


@pytest.fixture
def slow_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this were a processor on which the other library wins, whichever it is."""
    if not multiplies():
        pytest.skip("this torch does not multiply by oneDNN")
    monkeypatch.setattr(room, "halved_by_mkl", lambda: True)


@pytest.mark.parametrize(("i", "o"), [(7, 13), (13, 7), (1, 5), (5, 1)])
@pytest.mark.parametrize("shape", [(11,), (3, 5), (2, 3, 5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("slow_processor")
def test_same_numbers_as_the_layer(i: int, o: int, shape: tuple[int, ...], bias: bool) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, i, generator=random).requires_grad_()
    layer, slope = Dense(i, o, bias=bias), torch.randn(*shape, o, generator=random)
    wanted = layer(x)
    tensors = [x, *layer.parameters()]
    slopes = torch.autograd.grad(wanted, tensors, slope)
    with fast_products():
        found = layer(x)
    assert by_onednn(found)
    assert torch.allclose(found, wanted, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(found, tensors, slope), slopes, strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.usefixtures("slow_processor")
def test_lies_in_memory_as_it_likes() -> None:
    x, weight = torch.randn(5, 3, 7).transpose(0, 1), torch.randn(7, 2).t()
    found = DenseProduct.apply(x.requires_grad_(), weight.requires_grad_(), None)
    assert torch.allclose(found, F.linear(x, weight), atol=1e-5)
    found.sum().backward()  # a slope of ones that take no memory
    assert weight.grad is not None
    assert torch.allclose(weight.grad, x.detach().sum(dim=(0, 1)).expand(2, 7), atol=1e-5)


@pytest.mark.usefixtures("slow_processor")
def test_only_what_learns_is_given_a_gradient() -> None:
    frozen, x = Dense(3, 5).requires_grad_(False), torch.randn(2, 3, requires_grad=True)
    with fast_products():
        frozen(x).sum().backward()
        with torch.no_grad():
            assert not frozen(x).requires_grad
    assert frozen.weight.grad is None
    assert x.grad is not None


@pytest.mark.usefixtures("slow_processor")
def test_activations_are_recomputed_the_same_way() -> None:
    block, x = nn.Sequential(Dense(7, 13), nn.GELU(), Dense(13, 7)), torch.randn(3, 7)
    found = []
    for given in (lambda: block(x), lambda: checkpoint(block, x, use_reentrant=False)):
        block.zero_grad()
        with fast_products():
            given().square().sum().backward()
        found.append([p.grad.clone() for p in block.parameters() if p.grad is not None])
    assert len(found[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.usefixtures("slow_processor")
def test_leaves_alone_what_it_is_not_for() -> None:
    x, weight = torch.ones(2, 3, requires_grad=True), torch.ones(5, 3)
    with fast_products():
        assert dense(x.double(), weight.double(), None).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            assert dense(x, weight, None).dtype == torch.bfloat16
        assert dense(torch.ones(0, 3), weight, None).shape == (0, 5)
        assert dense(torch.ones(2, 0), torch.ones(5, 0), torch.ones(5)).tolist() == [[1.0] * 5] * 2
    with fast_products(False):
        assert not by_onednn(dense(x, weight, None))
    assert not by_onednn(dense(x, weight, None))


@pytest.mark.usefixtures("slow_processor")
def test_an_update_multiplies_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, product = [], room.product
    monkeypatch.setattr(room, "product", lambda x, *rest: (shapes.append(x.shape), product(x, *rest))[1])
    settings = {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3}
    network = sightline.create_model("vit_tiny_patch16_224", 5, 16, **settings)
    updater = Updater(Supervised(network), Settings(batch_size=2), World(0, 1, torch.device("cpu")), torch.float32)
    index = torch.arange(2)
    updater(Batch(torch.randn(2, 3, 16, 16), index, index, index), 0, 1e-3)
    assert len(shapes) == 3 * 5  # qkv, out, two of the MLP and the classifier, each with two gradients


def test_other_processors_keep_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "halved_by_mkl", lambda: False)
    with fast_products():
        assert not by_onednn(Dense(3, 5)(torch.ones(2, 3)))


def by_onednn(found: torch.Tensor) -> bool:
    return type(found.grad_fn).__name__ == "DenseProductBackward"
