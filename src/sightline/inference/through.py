"""A predictor whose network another runtime computes."""

import tempfile
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sightline.errors import UserError
from sightline.inference.export import Format, export
from sightline.inference.outputs import outputs_of
from sightline.inference.predictor import Predictor
from sightline.inference.runtimes import RUNTIMES, Runtime
from sightline.network import Network
from sightline.types import each


class RuntimeNetwork(nn.Module):
    """The network of a predictor, its numbers from a program: batches of prepared pixels to what its head reads."""

    def __init__(self, network: Network, runtime: Runtime, names: tuple[str, ...], size: tuple[int, int]):
        super().__init__()
        self.architecture, self.head = network.architecture, network.head
        self.runtime, self.names = runtime, names
        with torch.inference_mode():
            self.form = network.eval()(torch.zeros(1, 3, *size))

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Any:
        found = self.runtime.run(pixels.numpy())
        parts = iter([torch.from_numpy(found[name]) for name in self.names])
        return each(self.form, lambda _: next(parts))

    def embed(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Refused: the program has the answers only. Raises UserError."""
        raise UserError("features are computed by torch alone: use --runtime torch")


def through(predictor: Predictor, format: Format) -> Predictor:
    """The same predictor with its network as a program for the runtime of `format`, which has passed the gate.

    Raises UserError where it cannot be exported or a package is missing, WorkError where the answers would differ.
    """
    with tempfile.TemporaryDirectory(prefix="sightline-runtime-") as room:
        done = export(predictor, room, format=format, input="pixels")
        runtime = RUNTIMES[format](done.files[0], done.outputs)
    names = outputs_of(predictor.network.architecture.task).plain
    network: Any = RuntimeNetwork(predictor.network, runtime, names, predictor.preprocess.size)
    return predictor.altered(network=network, pack=False)
