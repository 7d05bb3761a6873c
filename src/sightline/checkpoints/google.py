"""Google's `.npz` files: those of the original JAX code (vision_transformer, AugReg) and those of big_vision.

Names and shapes are flax's: kernels [in, out], convolutions [height, width, in, out], heads on an axis of their own.
Such files compute with the tanh form of GELU and a norm epsilon of 1e-6, and stretch positions with aligned corners.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from sightline.checkpoints.measure import Facts, divides, stored_architecture
from sightline.checkpoints.rules import Found
from sightline.checkpoints.scheme import Bundle, Content, Reading, Request, Scheme, Stored
from sightline.errors import UserError, printable
from sightline.images.preprocess import Preprocess
from sightline.layout import Rule, transposed
from sightline.network import Architecture
from sightline.registry import variants

_PREFIXES = ("params/img/", "opt/target/", "params/", "")
_STATE = ("opt/", "extra/", "params/t", "params/b")  # optimiser state, and big_vision's text tower and temperature
_HALF = (0.5, 0.5, 0.5)


def _image_kernel(kernel: Tensor) -> tuple[Tensor]:
    return (rearrange(kernel, "h w i o -> o i h w"),)


def _kernel_image(weight: Tensor) -> tuple[Tensor]:
    return (rearrange(weight, "o i h w -> h w i o"),)


def _fuse(*kernels: Tensor) -> tuple[Tensor]:
    return (torch.cat([rearrange(kernel, "d h k -> (h k) d") for kernel in kernels]),)


def _fuse_bias(*biases: Tensor) -> tuple[Tensor]:
    return (torch.cat([rearrange(bias, "h k -> (h k)") for bias in biases]),)


def _split(heads: int) -> Callable[..., tuple[Tensor, ...]]:
    return lambda weight: tuple(rearrange(part, "(h k) d -> d h k", h=heads) for part in weight.chunk(3))


def _split_bias(heads: int) -> Callable[..., tuple[Tensor, ...]]:
    return lambda bias: tuple(rearrange(part, "(h k) -> h k", h=heads) for part in bias.chunk(3))


def _out(kernel: Tensor) -> tuple[Tensor]:
    return (rearrange(kernel, "h k d -> d (h k)"),)


def _out_of(heads: int) -> Callable[..., tuple[Tensor, ...]]:
    return lambda weight: (rearrange(weight, "d (h k) -> h k d", h=heads),)


def _without_class_row(cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
    return cls, torch.cat([torch.zeros_like(cls), patches], dim=1)


def _into_class(cls: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """What stands in the class row of the table moves into the token itself: their sum is what the encoder sees."""
    return cls + table[:, :1], table[:, 1:]


class Google(Scheme):
    """The layout of the original code: positions inside the encoder with a row for the class token.

    `modules` are the names of the parts of a block, which flax numbers: all parts of a block in turn in the original,
    each kind apart in big_vision.
    """

    modules = ("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
    positions = "Transformer/posembed_input/pos_embedding"
    class_row = True

    def recognises(self, stored: Stored) -> bool:
        kernels = any(name.endswith("embedding/kernel") for name in stored.contents.tensors)
        return stored.config is None and kernels and self._mine(stored.contents.tensors)

    def _mine(self, tensors: Mapping[str, Tensor]) -> bool:
        return not any(name.endswith("/MlpBlock_0/Dense_0/kernel") for name in tensors)

    def read(self, stored: Stored, request: Request) -> Reading:
        found = _unstacked(_unprefixed(stored))
        _refuse_strangers(found)
        facts = self._facts(found)
        architecture = stored_architecture(facts, request)
        size = architecture.backbone.image_size
        # The original evaluates on a plain square resize; published rows of that name say what timm's users expect.
        row = variants().get(request.architecture or "")
        preprocess = Preprocess(size, resize="squash", interpolation="bilinear", mean=_HALF, std=_HALF)
        if row is not None and row.preprocess:
            preprocess = Preprocess.from_json({"size": size, **row.preprocess})
        return Reading(architecture, self.rules(architecture), found, preprocess)

    def _facts(self, found: Found) -> Facts:
        shapes = {name: tuple(tensor.shape) for name, tensor in found.tensors.items()}
        kernel = _shape(shapes, "embedding/kernel", 4, found)
        blocks = {int(m[1]) for name in shapes if (m := re.match(r"Transformer/encoderblock_(\d{1,6})/", name))}
        _, attention, _, mlp = self.modules
        query = _shape(shapes, f"Transformer/encoderblock_0/{attention}/query/kernel", 3, found)
        hidden = _shape(shapes, f"Transformer/encoderblock_0/{mlp}/Dense_0/kernel", 2, found)
        positions = _shape(shapes, self.positions, 3, found)
        token = "cls" in shapes
        settings = {
            "embed_dim": kernel[3],
            "in_chans": kernel[2],
            "patch_size": kernel[:2],
            "depth": len(blocks),
            "num_heads": query[1],
            "mlp_dim": hidden[1],
            "class_token": token,
            "global_pool": "token" if token else "avg",
            "num_classes": shapes["head/bias"][0] if len(shapes.get("head/bias", ())) == 1 else 0,
            "pre_logits": shapes["pre_logits/bias"][0] if len(shapes.get("pre_logits/bias", ())) == 1 else None,
            "activation": "gelu_tanh",
            "norm_eps": 1e-6,
            "position_resample": "bilinear_corners",
            "partial_patches": "drop",
        }
        return Facts(found.where, len(shapes), settings, positions[1] - int(token and self.class_row))

    def rules(self, architecture: Architecture) -> list[Rule]:
        config, head = architecture.backbone, architecture.head
        rules = [
            Rule(("backbone.tokenizer.projection.weight",), ("embedding/kernel",), _image_kernel, _kernel_image),
            Rule(("backbone.tokenizer.projection.bias",), ("embedding/bias",)),
            *self._place(config.class_token),
        ]
        for i in range(config.depth):
            rules += self._block(f"backbone.encoder.blocks.{i}", f"Transformer/encoderblock_{i}", config.num_heads)
        rules += _norm("backbone.norm", "Transformer/encoder_norm")
        if head.pre_logits is not None:
            rules += _dense("head.pre_logits", "pre_logits")
        if head.num_classes:
            rules += _dense("head.classifier", "head")
        return rules

    def _place(self, class_token: bool) -> list[Rule]:
        token, table = "backbone.place.class_token", "backbone.place.positions.table"
        if class_token and not self.class_row:
            return [Rule((token, table), ("cls", self.positions), _without_class_row, _into_class)]
        return [Rule((token,), ("cls",))] * class_token + [Rule((table,), (self.positions,))]

    def _block(self, ours: str, theirs: str, heads: int) -> list[Rule]:
        norm1, attention, norm2, mlp = (f"{theirs}/{module}" for module in self.modules)
        parts = [f"{attention}/{part}" for part in ("query", "key", "value")]
        kernels, biases = (tuple(f"{part}/{kind}" for part in parts) for kind in ("kernel", "bias"))
        return [
            *_norm(f"{ours}.norm1", norm1),
            Rule((f"{ours}.attention.qkv.weight",), kernels, _fuse, _split(heads)),
            Rule((f"{ours}.attention.qkv.bias",), biases, _fuse_bias, _split_bias(heads)),
            Rule((f"{ours}.attention.out.weight",), (f"{attention}/out/kernel",), _out, _out_of(heads)),
            Rule((f"{ours}.attention.out.bias",), (f"{attention}/out/bias",)),
            *_norm(f"{ours}.norm2", norm2),
            *_dense(f"{ours}.mlp.fc1", f"{mlp}/Dense_0"),
            *_dense(f"{ours}.mlp.fc2", f"{mlp}/Dense_1"),
        ]

    def refusals(self, architecture: Architecture, out: Path) -> list[str]:
        config, head = architecture.backbone, architecture.head
        wanted: dict[str, tuple[Any, Any]] = {
            "tokenizer": (config.tokenizer, "patch"),
            "norm": (config.norm, "pre"),
            "activation": (config.activation, "gelu_tanh"),
            "norm_eps": (config.norm_eps, 1e-6),
            "qkv_bias": (config.qkv_bias, True),
            "init_values": (config.init_values, None),
            "positions": (config.positions, "learned"),
            "final_norm": (config.final_norm, True),
            "fc_norm": (head.fc_norm, False),
            "global_pool": (head.global_pool, "token" if config.class_token else "avg"),
        }
        if not divides(config):
            wanted["partial_patches"] = config.partial_patches, "drop"
        return [f"{name}={value!r} (only {only!r})" for name, (value, only) in wanted.items() if value != only]

    def files(self, bundle: Bundle, tensors: Mapping[str, Tensor], out: Path) -> dict[Path, Content]:
        if out.suffix.lower() != ".npz":
            raise UserError(f"{printable(out)}: Google's weights are one file that ends in .npz")
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)

        return {out: write}

    def remarks(self, bundle: Bundle, out: Path) -> list[str]:
        return [
            *super().remarks(bundle, out),
            "a .npz holds weights alone: class names and the pixel contract are not in it",
        ]


class BigVision(Google):
    """The layout of big_vision: positions beside the encoder, added before the class token joins."""

    modules = ("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")
    positions = "pos_embedding"
    class_row = False

    def _mine(self, tensors: Mapping[str, Tensor]) -> bool:
        return not super()._mine(tensors)

    def files(self, bundle: Bundle, tensors: Mapping[str, Tensor], out: Path) -> dict[Path, Content]:
        return super().files(bundle, {f"params/{name}": tensor for name, tensor in tensors.items()}, out)


def _norm(ours: str, theirs: str) -> list[Rule]:
    return [Rule((f"{ours}.weight",), (f"{theirs}/scale",)), Rule((f"{ours}.bias",), (f"{theirs}/bias",))]


def _dense(ours: str, theirs: str) -> list[Rule]:
    return [
        Rule((f"{ours}.weight",), (f"{theirs}/kernel",), transposed, transposed),
        Rule((f"{ours}.bias",), (f"{theirs}/bias",)),
    ]


def _unprefixed(stored: Stored) -> Found:
    """The parameters alone, without the name of the tree that they hang on."""
    tensors = stored.contents.tensors
    prefix = next(p for p in _PREFIXES if f"{p}embedding/kernel" in tensors or p == "")
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    outside = [name for name in tensors if not name.startswith(prefix)]
    dropped = tuple(name for name in outside if name.startswith(_STATE))
    strays = {name: tensors[name] for name in outside if name not in dropped}
    return Found(stored.where, {**inside, **strays}, prefix, {name: name for name in strays}, dropped)


def _unstacked(found: Found) -> Found:
    """A tree whose blocks are stacked on a first axis, as big_vision's scan does it, taken apart."""
    stack = "Transformer/encoderblock/"
    stacked = {name: tensor for name, tensor in found.tensors.items() if name.startswith(stack)}
    if not stacked:
        return found
    depths = {tensor.shape[0] if tensor.ndim else 0 for tensor in stacked.values()}
    if len(depths) != 1 or max(depths) == 0:
        raise UserError(f"{found.where}: the stacked blocks '{found.prefix}{stack}…' differ in their number of layers")
    tensors = {name: tensor for name, tensor in found.tensors.items() if name not in stacked}
    disk = dict(found.disk)
    for name, tensor in stacked.items():
        for i, layer in enumerate(tensor):
            own = f"Transformer/encoderblock_{i}/{name.removeprefix(stack)}"
            tensors[own], disk[own] = layer, f"{found.prefix}{name}[{i}]"
    return Found(found.where, tensors, found.prefix, disk, found.dropped)


def _refuse_strangers(found: Found) -> None:
    """Refuses, by its name, what is a model of its own."""
    for sign, what in (("MAPHead_0/", "an attention pooling head (MAP)"), ("conv_root/", "a convolutional stem")):
        names = [name for name in found.tensors if name.startswith(sign)]
        if names:
            raise UserError(f"{found.where} has {what}, which this Vision Transformer lacks: {found.named(names[0])}")


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, axes: int, found: Found) -> tuple[int, ...]:
    if name not in shapes:
        raise UserError(f"{found.where}: tensor {found.named(name)} is missing")
    if len(shapes[name]) != axes:
        raise UserError(f"{found.where}: tensor {found.named(name)} has {len(shapes[name])} axes instead of {axes}")
    return shapes[name]


SCHEMES: Mapping[str, Scheme] = {"google": Google(), "big_vision": BigVision()}
