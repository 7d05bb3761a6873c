"""Requests side by side: the same answers as one after the other, and only where that is so and is faster."""

import json
import socket
import threading
import time
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from served import saved
from sightline.images.preprocess import Preprocess
from sightline.inference.predictor import Predictor
from sightline.model import load
from sightline.network import create_model
from sightline.serving import worker
from sightline.serving.lanes import Lanes, measured
from sightline.serving.wire import receive, send


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Slow(nn.Module):
    """A network that takes `alone` seconds on all threads and `beside` on one, and may tell how many it has."""

    def __init__(self, alone: float, beside: float, tells: bool):
        super().__init__()
        self.alone, self.beside, self.tells = alone, beside, tells

    def forward(self, pixels):
        threads = torch.get_num_threads()
        time.sleep(self.alone if threads == 2 else self.beside)
        return pixels.mean(dim=(1, 2, 3))[:, None] + torch.tensor([[0.0, 1e-6 * threads * self.tells]])


@pytest.mark.parametrize(
    ("alone", "beside", "tells", "apart", "count"),
    [
        (0.06, 0.03, False, True, 2),
        (0.01, 0.08, False, True, 1),
        (0.06, 0.03, True, True, 1),  # faster, and other digits
        (0.06, 0.03, False, False, 1),
    ],
)
@pytest.mark.usefixtures("two_threads")
def test_lanes_are_taken_where_they_are_faster_and_change_no_bit(alone, beside, tells, apart, count):
    network = create_model("vit_tiny_patch16_224", 2, image_size=16, embed_dim=12, depth=1, num_heads=3)
    network.forward = Slow(alone, beside, tells).forward
    found = measured(Predictor(network, Preprocess(size=(16, 16)), ["a", "b"]), apart=apart)
    assert (found.count, found.share, found.threads) == (count, 2 // count, 2)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_orders_in_lanes_are_answered_as_they_are_alone(tmp_path, monkeypatch):
    model = load(saved(tmp_path / "model"))
    predictor = model.predictor(batch_size=32, top=1)
    together, most, calls, explained = 0, 0, 0, []
    count = threading.Lock()
    compute, explain = predictor.compute, worker.Worker._explained

    def computed(images, *, features):
        nonlocal together, most, calls
        with count:
            together, calls = together + 1, calls + 1
            long = calls % 2
            most = max(most, together)
        time.sleep(0.04 if long else 0.01)  # so that those beside each other do not end together
        found = compute(images, features=features)
        with count:
            together -= 1
        return found

    def alone(self, order):
        explained.append(together)
        found = explain(self, order)
        explained.append(together)
        return found

    monkeypatch.setattr(predictor, "compute", computed)
    monkeypatch.setattr(worker.Worker, "_explained", alone)
    random = np.random.default_rng(0)
    images = [_png(random.integers(0, 256, (23, 29, 3), dtype=np.uint8)) for _ in range(5)]

    def asked(lanes: Lanes, orders: list[dict], parts: list[list[bytes]]) -> dict:
        answers = {}
        ours, theirs = socket.socketpair()
        with ours, theirs:
            at_work = worker.Worker(theirs, model, predictor, 1, lanes)
            thread = threading.Thread(target=at_work.work)
            thread.start()
            for order, part in zip(orders, parts, strict=True):
                send(ours, order, part)
            for _ in orders:
                header, (body,) = receive(ours)
                answers[header["id"]] = (header["status"], json.loads(body))
            ours.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            at_work.pool.shutdown()
        return answers

    orders, parts = [], []
    for number in range(17):
        part = images[:3] if number == 5 else [b"no image"] if number == 7 else [images[number % 5]]
        kind = "explain" if number in (3, 11) else "predict"
        names = [f"{number}-{i}.png" for i in range(len(part))]
        orders.append({"kind": kind, "id": number, "name": "m", "names": names, "top": 1 + number % 2} | _EXPLAINED)
        parts.append(part)
    one = asked(Lanes(1, 2, 2, 0.1), orders, parts)
    assert most == 1
    two = asked(Lanes(2, 1, 2, 0.1), orders, parts)
    assert most == 2
    assert one == two
    assert [status for status, _ in one.values()].count(422) == 1
    assert explained == [0] * 8  # nobody computes while the network is looked into


_EXPLAINED = {"format": "json", "layers": None}


def _png(pixels: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
