"""The process that computes: it reads images, asks the network, and writes the answers down.

What is at work when such a process dies is lost with it, and nothing else: an image that brings a decoder down cannot
take the server with it. Images are read by threads while the network computes.
"""

import base64
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch

from sightline.errors import UserError, WorkError, printable
from sightline.explanation.maps import attention_layers
from sightline.inference.files import to_json
from sightline.inference.predictor import Answer, Predictor
from sightline.inference.reading import readers
from sightline.model import Model, load
from sightline.serving.explained import Explainer
from sightline.serving.lanes import Lanes, measured
from sightline.serving.rejection import Rejection
from sightline.serving.wire import receive, send


class Order(NamedTuple):
    """One request: what is asked (`kind`, `id`, `name`, `top`, …), and its images as they are read."""

    header: Mapping[str, Any]
    images: Sequence[bytes]
    read: Sequence[Future[Any]]


class Worker:
    """A model at work for one server, behind a socket."""

    def __init__(self, line: socket.socket, model: Model, predictor: Predictor, batch_size: int, lanes: Lanes):
        self.line, self.model, self.predictor, self.batch_size = line, model, predictor, batch_size
        self.lanes, self.busy, self.idle = lanes, 0, threading.Condition()
        self.taking, self.sending = threading.Lock(), threading.Lock()
        self.explainer = Explainer(model)
        self.pool = readers(predictor.threads)
        self.orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self.held: Order | None = None

    def work(self) -> None:
        """Takes orders until the server closes the line."""
        for _ in range(self.lanes.count):
            threading.Thread(target=self._compute, name="sightline-compute", daemon=True).start()
        while (message := receive(self.line)) is not None:
            header, images = message
            read = []
            if header["kind"] == "predict":
                pairs = zip(images, header["names"], strict=True)
                read = [self.pool.submit(self.predictor.prepare, data, name) for data, name in pairs]
            self.orders.put(Order(header, images, read))

    def _compute(self) -> None:
        try:
            while True:
                self._turn()
        except OSError:
            return  # the server has gone
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _turn(self) -> None:
        """Answers what is next: beside others where there are more like it, and with all cores where there are not."""
        with self.taking:
            orders = self._next()
            beside = self.lanes.count > 1 and _small(orders) and (self.busy > 0 or not self.orders.empty())
            if not beside:
                with self.idle:
                    self.idle.wait_for(lambda: self.busy == 0)
                torch.set_num_threads(self.lanes.threads)
                self._answer(orders)
                return
            self.busy += 1
        try:
            torch.set_num_threads(self.lanes.share)
            self._answer(orders)
        finally:
            with self.idle:
                self.busy -= 1
                self.idle.notify()

    def _next(self) -> list[Order]:
        """The next order, and those that can be computed together with it."""
        first, self.held = self.held or self.orders.get(), None
        orders, images = [first], len(first.images)
        while first.header["kind"] == "predict" and images < self.batch_size:
            try:
                more = self.orders.get_nowait()
            except queue.Empty:
                break
            if more.header["kind"] != "predict" or images + len(more.images) > self.batch_size:
                self.held = more
                break
            orders.append(more)
            images += len(more.images)
        return orders

    def _answer(self, orders: list[Order]) -> None:
        try:
            documents = self._predicted(orders) if orders[0].header["kind"] == "predict" else self._explained(orders[0])
        except Exception as fault:
            rejection = _rejection(fault)
            documents = [(rejection.status, rejection.body())] * len(orders)
        together = sum(len(order.images) for order in orders)
        for order, (status, body) in zip(orders, documents, strict=True):
            header = {"id": order.header["id"], "status": status, "batch": together if order is orders[0] else None}
            with self.sending:
                send(self.line, header, [body])

    def _predicted(self, orders: Sequence[Order]) -> list[tuple[int, bytes]]:
        items = [future.result() for order in orders for future in order.read]
        answers = self.predictor.answers(items, top=max(order.header["top"] for order in orders))
        documents = []
        for order in orders:
            own = [_fit(next(answers), order.header["top"]) for _ in order.read]
            documents.append(self._document(order, to_json(own, order.header["name"], self.model.task)))
        return documents

    def _explained(self, order: Order) -> list[tuple[int, bytes]]:
        answers = [
            self.predictor.prepare(image, name) for image, name in zip(order.images, order.header["names"], strict=True)
        ]
        top = order.header["top"]
        predicted = [_fit(answer, top) for answer in self.predictor.answers(answers, top=top)]
        if order.header["format"] == "npz":
            if predicted[0].error is not None:
                raise Rejection(422, "unreadable_image", f"{printable(predicted[0].path)}: {predicted[0].error}")
            return [(200, self.explainer.arrays(order.images[0], order.header["layers"]))]
        document = to_json(predicted, order.header["name"], self.model.task)
        for image, result in zip(order.images, document["results"], strict=True):
            if "error" not in result:
                result["explanation"] = self.explainer.compact(image, order.header["layers"])
        return [self._document(order, document)]

    def _document(self, order: Order, document: dict[str, Any]) -> tuple[int, bytes]:
        """The document as `predict --json` prints it; where no image could be read, what is wrong comes on top."""
        status, results = 200, document["results"]
        if all("error" in result for result in results):
            words = "; ".join(f"{printable(result['path'])}: {result['error']}" for result in results)
            document["error"] = {"code": "unreadable_image", "message": words}
            status = 422
        return status, json.dumps(document).encode() + b"\n"


def _small(orders: Sequence[Order]) -> bool:
    """Whether it is one image to be predicted: explanations look into the network, which they need for themselves."""
    return len(orders) == 1 and orders[0].header["kind"] == "predict" and len(orders[0].images) == 1


def _fit(answer: Answer, top: int) -> Answer:
    """An answer as a document has it: as many classes as were asked for, and pictures (masks) inside of it."""
    if answer.prediction is None:
        return answer
    return Answer(answer.path, answer.prediction.cut(top).save(_inside))


def _inside(ending: str, data: bytes) -> str:
    return f"data:image/{ending.removeprefix('.')};base64,{base64.b64encode(data).decode()}"


def _rejection(fault: Exception) -> Rejection:
    """A fault as the client may see it; what was not foreseen goes to the log alone."""
    if isinstance(fault, Rejection):
        return fault
    if isinstance(fault, UserError):
        return Rejection(422, "not_possible", str(fault))
    if isinstance(fault, WorkError):
        return Rejection(500, "work_failed", str(fault))
    if isinstance(fault, MemoryError):
        return Rejection(503, "memory", "memory does not suffice for this request now", retry_after=5)
    traceback.print_exception(fault)
    return Rejection(500, "unforeseen", "the request could not be answered; the server's log has the reason")


def work(line: socket.socket, source: str, options: Mapping[str, Any]) -> None:
    """The whole life of the process: loads a model, says so, and takes orders until the server has gone."""
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # for the server alone, which still has answers due
        signal.signal(number, signal.SIG_IGN)
    try:
        began = time.monotonic()
        model = load(source, architecture=options["architecture"])
        # `predict` asks 32 images at a time: the same here, or a request's answers would differ in their last digits.
        predictor = model.predictor(device=options["device"], precision=options["precision"], batch_size=32, top=1)
        if not model.labels:
            raise UserError(f"{printable(source)} has no classifier: there is nothing to answer with")
        apart = predictor.device.type == "cpu"
        batch_size = options["batch_size"] or (1 if apart else 32)
        alike = predictor.preprocess.resize != "native"  # which alone tells what holds for all images
        lanes = measured(predictor, apart=apart and batch_size == 1 and alike)
    except (UserError, WorkError) as fault:
        send(line, {"failed": str(fault), "status": fault.status})
        return
    except Exception as fault:
        traceback.print_exc()
        send(line, {"failed": f"{printable(source)} could not be loaded ({type(fault).__name__})", "status": 1})
        return
    ready = {
        "ready": True,
        "task": model.task,
        "labels": len(model.labels),
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "layers": attention_layers(model.network.backbone),
        "size": list(model.preprocess.size),
        "pixels": model.preprocess.describe(),
        "device": str(predictor.device),
        "batch_size": batch_size,
        "look_ahead": 2 * batch_size * lanes.count + predictor.threads,
        "lanes": lanes.count,
        "seconds": lanes.seconds,
        "loading": time.monotonic() - began,
    }
    send(line, ready)
    Worker(line, model, predictor, batch_size, lanes).work()
    sys.stderr.flush()
    os._exit(0)  # the thread that computes may be in the middle of an answer that nobody waits for
