"""What a frozen network makes of the images of a set: computed once, and kept for the next time it is asked."""

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sightline.datasets.image_set import ImageSet, Samples
from sightline.datasets.loader import OrderedLoader
from sightline.evaluation.cache import Cache
from sightline.evaluation.measure import computed
from sightline.images.decode import ImageError, read
from sightline.images.preprocess import Preprocess
from sightline.network import Network
from sightline.types import Batch

VERSION = 1
"""Of how features are computed and kept."""


@dataclass(frozen=True)
class Features:
    """The feature vectors of the images of a set that could be read, in order.

    `rows` says which samples these are, and `refused` names the others with the reason. `cached` tells that nothing was
    computed.
    """

    vectors: Float[Tensor, "n d"]
    rows: Int64[np.ndarray, " n"]
    refused: Mapping[int, str]
    cached: bool = False


@torch.inference_mode()
def embedded(
    network: Network, batch: Batch, device: torch.device, precision: torch.dtype, most: int
) -> tuple[Float[Tensor, "b d"], int]:
    """The feature vectors of a batch, float32 on the CPU, and how many images at a time memory bore (`computed`)."""
    with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
        parts, most = computed(network.embed, batch, device, most)
    return torch.cat([part.float().cpu() for _, part in parts]), most


def weights_digest(network: Network) -> str:
    """SHA-256 of a network's architecture and of the SHA-256 of every one of its weights, taken side by side."""

    def digest(tensor: Tensor) -> str:
        return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()).hexdigest()

    tensors = network.state_dict()
    with ThreadPoolExecutor() as pool:
        digests = pool.map(digest, tensors.values())
        rows = [(name, str(t.dtype), list(t.shape), d) for (name, t), d in zip(tensors.items(), digests, strict=True)]
    return hashlib.sha256(json.dumps([network.architecture.to_json(), rows]).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Embedding:
    """A network with its pixel contract, as a function from an image set to its features.

    The vectors are what the classifier would read (`Network.embed`), float32 on the CPU, whatever the task. `precision`
    is that of the matrix products. Of files and shards every byte counts for the cache, of archives size and checksum:
    no changed image gets the features of another. Raises WorkError where memory does not suffice for one image.
    """

    network: Network
    preprocess: Preprocess
    device: torch.device
    precision: torch.dtype = torch.float32
    batch_size: int = 64
    workers: int = 1
    cache: Cache | None = None

    def __call__(self, images: ImageSet, progress: Callable[[int], None] = lambda done: None) -> Features:
        """The features of a set; `progress` is told how many images are done."""
        key = self._key(images.samples) if self.cache is not None else ""
        if self.cache is not None and (kept := self.cache.get(key)) is not None:
            tensors, text = kept
            refused = {int(row): reason for row, reason in json.loads(text).items()}
            progress(len(images))
            return Features(tensors["vectors"], tensors["rows"].numpy(), refused, cached=True)
        found = self._computed(images, progress)
        if self.cache is not None:
            tensors = {"vectors": found.vectors, "rows": torch.from_numpy(found.rows)}
            self.cache.put(key, tensors, json.dumps(found.refused))
        return found

    def _computed(self, images: ImageSet, progress: Callable[[int], None]) -> Features:
        loader = OrderedLoader(
            images,
            self.preprocess,
            batch_size=self.batch_size,
            workers=self.workers if images.samples.arrays is None else 0,
        )
        network, training = self.network.to(self.device), self.network.training
        network.eval()
        vectors, rows, reasons, most = list[Tensor](), list[Tensor](), list[str](), 2**62
        for step, batch, refused in loader:
            reasons += [reason for _, reason in refused]
            if batch is not None:
                found, most = embedded(network, batch, self.device, self.precision, most)
                vectors.append(found)
                rows.append(batch.index)
            progress(min((step + 1) * self.batch_size, len(images)))
        network.train(training)
        readable = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
        missing = np.setdiff1d(np.arange(len(images)), readable.numpy()).tolist()
        matrix = torch.cat(vectors) if vectors else torch.zeros(0, 0)
        return Features(matrix, readable.numpy(), dict(zip(missing, reasons, strict=True)))

    def _key(self, samples: Samples) -> str:
        """What the features follow from: weights and settings, pixels, arithmetic, and the content of every image."""
        digest = hashlib.sha256()
        for i, name in enumerate(samples.names):
            digest.update(b"\0" + _content(samples, i, name))
        how = [VERSION, self._weights, self.preprocess.fingerprint, str(self.precision), self.device.type]
        return json.dumps([*how, digest.hexdigest()])

    @cached_property
    def _weights(self) -> str:
        return weights_digest(self.network)


def _content(samples: Samples, i: int, name: str) -> bytes:
    if samples.arrays is not None or (samples.stored is not None and samples.stored[name].whole):
        return samples.content(i, name)
    try:
        return hashlib.blake2b(read(samples[i].image), digest_size=16).digest()
    except ImageError as error:
        return error.reason.encode()
