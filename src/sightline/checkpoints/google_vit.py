"""The Vision Transformer in Google's files: flax's names and shapes.

Kernels are [in, out], convolutions [height, width, in, out], heads stand on an axis of their own. Such files compute
with the tanh form of GELU and a norm epsilon of 1e-6, and stretch positions with aligned corners.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from sightline.checkpoints.measure import divides
from sightline.checkpoints.timm_vit import into_class, rows_of_class
from sightline.layout import Layout, Rule, Shapes, transposed


def image_kernel(kernel: Tensor) -> tuple[Tensor]:
    """A convolution of theirs as one of ours."""
    return (rearrange(kernel, "h w i o -> o i h w"),)


def kernel_image(weight: Tensor) -> tuple[Tensor]:
    """A convolution of ours as one of theirs."""
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


class GoogleViT(Layout):
    """The layout of the original code: positions inside the encoder with a row for the class token.

    `modules` are the names of the parts of a block, which flax numbers: all parts of a block in turn in the original,
    each kind apart in big_vision.
    """

    libraries = ("google",)
    family = "vit"
    tokenizer: ClassVar[str] = "patch"
    modules: ClassVar[tuple[str, str, str, str]] = (
        "LayerNorm_0",
        "MultiHeadDotProductAttention_1",
        "LayerNorm_2",
        "MlpBlock_3",
    )
    positions: ClassVar[str] = "Transformer/posembed_input/pos_embedding"
    class_row: ClassVar[bool] = True

    def recognises(self, shapes: Shapes) -> bool:
        own = "embedding/kernel" in shapes and "conv_root/kernel" not in shapes
        return own and not any(name.endswith("/MlpBlock_0/Dense_0/kernel") for name in shapes)

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        kernel = shapes.of("embedding/kernel", 4)
        _, attention, _, mlp = self.modules
        query = shapes.of(f"Transformer/encoderblock_0/{attention}/query/kernel", 3)
        hidden = shapes.of(f"Transformer/encoderblock_0/{mlp}/Dense_0/kernel", 2)
        positions = shapes.of(self.positions, 3)
        grid = None if image_size is None else (image_size[0] // kernel[0]) * (image_size[1] // kernel[1])
        token = "cls" in shapes or (self.class_row and rows_of_class(positions[1], grid))
        return {
            "embed_dim": kernel[3],
            "in_chans": kernel[2],
            "patch_size": kernel[:2],
            "depth": shapes.count(r"Transformer/encoderblock_(\d+)/"),
            "num_heads": query[1],
            "mlp_dim": hidden[1],
            "class_token": token,
            "global_pool": "token" if token else "avg",
            "num_classes": shapes.outputs("head/bias"),
            "pre_logits": shapes.outputs("pre_logits/bias") or None,
            "activation": "gelu_tanh",
            "norm_eps": 1e-6,
            "position_resample": "bilinear_corners",
            "partial_patches": "drop",
            "patches": positions[1] - int(token and self.class_row),
        }

    def rules(self, backbone: Any, head: Any) -> list[Rule]:
        rules = [*self.stem(backbone), *self._place(backbone.class_token)]
        for i in range(backbone.depth):
            rules += self._block(f"backbone.encoder.blocks.{i}", f"Transformer/encoderblock_{i}", backbone.num_heads)
        rules += norm("backbone.norm", "Transformer/encoder_norm")
        if head.pre_logits is not None:
            rules += dense("head.pre_logits", "pre_logits")
        if head.num_classes:
            rules += dense("head.classifier", "head")
        return rules

    def stem(self, backbone: Any) -> list[Rule]:
        """The rules of what makes tokens of pixels."""
        return [
            Rule(("backbone.tokenizer.projection.weight",), ("embedding/kernel",), image_kernel, kernel_image),
            Rule(("backbone.tokenizer.projection.bias",), ("embedding/bias",)),
        ]

    def _place(self, class_token: bool) -> list[Rule]:
        token, table = "backbone.place.class_token", "backbone.place.positions.table"
        if class_token and not self.class_row:
            return [Rule((token, table), ("cls", self.positions), _without_class_row, into_class)]
        return [Rule((token,), ("cls",))] * class_token + [Rule((table,), (self.positions,))]

    def _block(self, ours: str, theirs: str, heads: int) -> list[Rule]:
        norm1, attention, norm2, mlp = (f"{theirs}/{module}" for module in self.modules)
        parts = [f"{attention}/{part}" for part in ("query", "key", "value")]
        kernels, biases = (tuple(f"{part}/{kind}" for part in parts) for kind in ("kernel", "bias"))
        return [
            *norm(f"{ours}.norm1", norm1),
            Rule((f"{ours}.attention.qkv.weight",), kernels, _fuse, _split(heads)),
            Rule((f"{ours}.attention.qkv.bias",), biases, _fuse_bias, _split_bias(heads)),
            Rule((f"{ours}.attention.out.weight",), (f"{attention}/out/kernel",), _out, _out_of(heads)),
            Rule((f"{ours}.attention.out.bias",), (f"{attention}/out/bias",)),
            *norm(f"{ours}.norm2", norm2),
            *dense(f"{ours}.mlp.fc1", f"{mlp}/Dense_0"),
            *dense(f"{ours}.mlp.fc2", f"{mlp}/Dense_1"),
        ]

    def refusals(self, backbone: Any, head: Any) -> list[str]:
        wanted: dict[str, tuple[Any, Any]] = {
            "tokenizer": (backbone.tokenizer, self.tokenizer),
            "norm": (backbone.norm, "pre"),
            "pre_norm": (backbone.pre_norm, False),
            "mlp": (backbone.mlp, "mlp"),
            "activation": (backbone.activation, "gelu_tanh"),
            "norm_eps": (backbone.norm_eps, 1e-6),
            "patch_bias": (backbone.patch_bias, True),
            "qkv_bias": (backbone.qkv_bias, True),
            "key_bias": (backbone.key_bias, True),
            "init_values": (backbone.init_values, None),
            "positions": (backbone.positions, "learned"),
            "class_position": (backbone.class_position, True),
            "position_grid": (backbone.position_grid, None),
            "distillation_token": (backbone.distillation_token, False),
            "reg_tokens": (backbone.reg_tokens, 0),
            "mask_token": (backbone.mask_token, False),
            "final_norm": (backbone.final_norm, True),
            "fc_norm": (head.fc_norm, False),
            "distilled": (head.distilled, False),
            "global_pool": (head.global_pool, "token" if backbone.class_token else "avg"),
        }
        if self.tokenizer == "patch" and not divides(backbone):
            wanted["partial_patches"] = backbone.partial_patches, "drop"
        return [f"{name}={value!r} (only {only!r})" for name, (value, only) in wanted.items() if value != only]


class BigVisionViT(GoogleViT):
    """The layout of big_vision: positions beside the encoder, added before the class token joins."""

    libraries = ("big_vision",)
    modules = ("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")
    positions = "pos_embedding"
    class_row = False

    def recognises(self, shapes: Shapes) -> bool:
        return "embedding/kernel" in shapes and any(name.endswith("/MlpBlock_0/Dense_0/kernel") for name in shapes)


def norm(ours: str, theirs: str) -> list[Rule]:
    """A layer norm or group norm."""
    return [Rule((f"{ours}.weight",), (f"{theirs}/scale",)), Rule((f"{ours}.bias",), (f"{theirs}/bias",))]


def dense(ours: str, theirs: str) -> list[Rule]:
    """A dense layer, whose kernel is transposed there."""
    return [
        Rule((f"{ours}.weight",), (f"{theirs}/kernel",), transposed, transposed),
        Rule((f"{ours}.bias",), (f"{theirs}/bias",)),
    ]


LAYOUTS: Mapping[str, Layout] = {"google/vit": GoogleViT(), "big_vision/vit": BigVisionViT()}
