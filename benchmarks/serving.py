"""The server beside the predictor that it serves: throughput, waiting, overload, memory, and an end under load.

    python benchmarks/serving.py [--model vit_small_patch16_224] [--rounds 3] [--seconds 20] [--requests 10000]
                                 [--overload]

Everything happens on loopback, with weights drawn at random. Throughput is measured in turns, the predictor in this
process and the server in its own, as ratios. Every answer of the server is compared with what it said when asked alone.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image

from sightline.images.preprocess import Preprocess
from sightline.model import Model, load
from sightline.network import create_model


@dataclass
class Outcome:
    """What came of many requests."""

    seconds: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    wrong: int = 0
    lost: int = 0
    without_retry: int = 0
    closed: int = 0
    spent: float = 0.0

    @property
    def answered(self) -> int:
        return len(self.seconds)

    @property
    def sent(self) -> int:
        return self.answered + len(self.refused) + self.lost

    def told(self, capacity: float) -> str:
        """One line, beside the answers a second that are the most."""
        waits, refusals = (np.quantile(times or [np.nan], (0.5, 0.99)) for times in (self.seconds, self.refused))
        return (
            f"{self.answered} answered, {self.answered / self.spent / capacity:.0%} of capacity; p50 {waits[0]:.2f} s, "
            f"p99 {waits[1]:.2f} s; {len(self.refused)} refused, p50 {refusals[0] * 1000:.1f} ms, p99 "
            f"{refusals[1] * 1000:.1f} ms, {self.without_retry} without Retry-After; {self.wrong} wrong, "
            f"{self.lost} lost, "
            f"{self.closed} asked again because their idle line had been closed"
        )


class Client:
    """Requests on loopback, as cheap as they can be made."""

    def __init__(self, port: int, images: list[bytes]):
        self.port = port
        head = "POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\nContent-Length: {}\r\n\r\n"
        self.requests = [head.format(len(image)).encode() + image for image in images]
        self.expected: dict[int, bytes] = {}

    async def learn(self) -> None:
        """Asks each image alone; whatever comes later has to be the same."""
        for i in range(len(self.requests)):
            _, status, _, body = await self.ask(i, None)
            assert status == 200, body
            self.expected[i] = body

    async def ask(self, i: int, line: tuple | None) -> tuple:
        line = line or await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = line
        writer.write(self.requests[i])
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        headers = dict(row.split(": ", 1) for row in head.split("\r\n")[1:] if row)
        body = await reader.readexactly(int(headers["content-length"]))
        if headers.get("connection") == "close":
            writer.close()
            line = None
        return line, int(head.split(" ", 2)[1]), headers, body

    async def one(self, i: int, line: tuple | None, outcome: Outcome) -> tuple | None:
        began = time.perf_counter()
        line, status, headers, body = await self.ask(i, line)
        spent = time.perf_counter() - began
        if status == 503:
            outcome.refused.append(spent)
            outcome.without_retry += not headers.get("retry-after", "").isdecimal()
        else:
            outcome.seconds.append(spent)
            outcome.wrong += status != 200 or body != self.expected[i]
        return line

    async def closed(self, count: int, clients: int, ended: asyncio.Event | None = None) -> Outcome:
        """`count` requests from clients of which each waits for its answer; fewer where `ended` comes first."""
        outcome, numbers = Outcome(), iter(range(count))

        async def run() -> None:
            line = None
            for number in numbers:
                if ended is not None and ended.is_set():
                    break
                try:
                    line = await self.one(number % len(self.requests), line, outcome)
                except ConnectionRefusedError:
                    break  # it no longer listens: this request was never accepted
                except (OSError, asyncio.IncompleteReadError):
                    outcome.lost += 1
                    line = None
            if line is not None:
                line[1].close()

        began = time.perf_counter()
        await asyncio.gather(*(run() for _ in range(clients)))
        outcome.spent = time.perf_counter() - began
        return outcome

    async def open(self, rate: float, seconds: float) -> Outcome:
        """Requests that come at a rate, whatever becomes of those before."""
        outcome, tasks = Outcome(), []
        rng = np.random.default_rng(0)
        began = time.perf_counter()
        at = 0.0
        idle: list[tuple] = []

        async def run(i: int) -> None:
            line = idle.pop() if idle else None
            try:
                line = await self.one(i, line, outcome)
            except (OSError, asyncio.IncompleteReadError) as fault:
                if line is None or getattr(fault, "partial", b""):
                    outcome.lost += 1
                    return
                # The server had closed a line that stood idle, as any may: clients then ask on a new one.
                outcome.closed += 1
                try:
                    line = await self.one(i, None, outcome)
                except (OSError, asyncio.IncompleteReadError):
                    outcome.lost += 1
                    return
            if line is not None:
                idle.append(line)

        while at < seconds:
            await asyncio.sleep(max(at - (time.perf_counter() - began), 0))
            tasks.append(asyncio.create_task(run(len(tasks) % len(self.requests))))
            at += rng.exponential(1 / rate)
        await asyncio.gather(*tasks)
        outcome.spent = time.perf_counter() - began
        return outcome


@contextmanager
def serving(*words: str) -> Iterator[tuple[subprocess.Popen, int]]:
    command = [sys.executable, "-m", "sightline", "serve", *words, "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, urlsplit(json.loads(process.stdout.readline())["url"]).port or 0
    finally:
        process.terminate()
        process.wait(60)


def resident(process: int) -> float:
    """Megabytes of a process and of all below it."""
    total, wanted = 0.0, [process]
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(entry.parent.name)] = int(entry.read_bytes().rpartition(b")")[2].split()[1])
        except OSError:
            continue
    while wanted:
        pid = wanted.pop()
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        total += pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        wanted += [child for child, parent in parents.items() if parent == pid]
    return total


def pictures(count: int, height: int = 375, width: int = 500) -> list[bytes]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        file = BytesIO()
        small.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def model_at(folder: Path, name: str, **settings: int) -> Path:
    torch.manual_seed(0)
    network = create_model(name, num_classes=10, **settings)
    torch.nn.init.normal_(network.head.classifier.weight, std=0.2)
    size = network.backbone.config.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    return Model(network, Preprocess(size=size), [f"class {i}" for i in range(10)]).save(folder)


async def measure(request: argparse.Namespace, folder: Path) -> None:
    images = pictures(16)
    path = model_at(folder / "model", request.model)
    predictor = load(path).predictor()
    list(predictor.predict(images[:2]))
    with serving(str(path)) as (process, port):
        client = Client(port, images)
        await client.learn()
        ratios, best = [], 0.0
        for _ in range(request.rounds):
            began = time.perf_counter()
            list(predictor.predict(images * 2))
            direct = 2 * len(images) / (time.perf_counter() - began)
            served = await client.closed(2 * len(images), 4)
            assert (served.wrong, served.lost) == (0, 0)
            rate = served.answered / served.spent
            ratios.append(rate / direct)
            best = max(best, rate)
            print(f"direct {direct:6.2f} images/s   served {rate:6.2f}   ratio {ratios[-1]:.3f}", flush=True)
        print(f"ratio: median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")
        for share in (0.5, 2.0):
            said = await client.open(share * best, request.seconds)
            print(f"{share:g} × capacity: {said.told(best)}", flush=True)
        ended = asyncio.Event()
        running = asyncio.create_task(client.closed(10**9, 16, ended))
        await asyncio.sleep(2)
        process.send_signal(signal.SIGTERM)
        while process.poll() is None:
            await asyncio.sleep(0.05)
        ended.set()
        said = await running
        print(
            f"SIGTERM under load: {said.answered} answered, {len(said.refused)} refused, {said.wrong} wrong, "
            f"{said.lost} lost; exit {process.returncode}",
            flush=True,
        )
    small = model_at(folder / "small", "vit_tiny_patch16_224", image_size=32, embed_dim=48, depth=2, num_heads=3)
    with serving(str(small)) as (process, port):
        client = Client(port, [*pictures(7, 48, 64)])
        await client.learn()
        first = await client.closed(min(1000, request.requests), 8)
        before = resident(process.pid)
        said = await client.closed(request.requests, 8)
        after = resident(process.pid)
        print(
            f"small model: {said.answered / said.spent:.0f} requests/s, {said.wrong + first.wrong} wrong, "
            f"{said.lost + first.lost} lost; memory {before:.1f} MB after {first.answered}, {after:.1f} MB after "
            f"{said.answered} more"
        )


async def overload(request: argparse.Namespace, folder: Path) -> None:
    """Four times what the server can do, asked whether or not it answers; and its counters afterwards."""
    path = model_at(folder / "model", request.model)
    with serving(str(path), "--max-wait", "1") as (process, port):
        client = Client(port, pictures(16))
        await client.learn()
        ended = asyncio.Event()
        asyncio.get_running_loop().call_later(request.seconds / 3, ended.set)
        most = await client.closed(10**9, 4, ended)
        capacity, before = most.answered / most.spent, resident(process.pid)
        said = await client.open(4 * capacity, request.seconds)
        print(f"capacity {capacity:.1f}/s; 4 × for {request.seconds:g} s: {said.told(capacity)}")
        print(f"memory {before:.1f} MB before, {resident(process.pid):.1f} MB after")
        with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            rows = [row.rpartition(" ") for row in answer.read().decode().splitlines()]
        counted = {
            name.partition('outcome="')[2].partition('"')[0]: int(float(value))
            for name, _, value in rows
            if name.startswith("sightline_requests_total") and "/v1/predict" in name
        }
        sent = len(client.requests) + most.sent + said.sent
        print(f"sent {sent}, counted {sum(counted.values())}: {counted}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--overload", action="store_true", help="only four times the capacity, and the counters")
    request = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run((overload if request.overload else measure)(request, Path(folder)))


if __name__ == "__main__":
    main()
