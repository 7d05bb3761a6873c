"""The encoder of a masked autoencoder, in the original repository and in transformers; timm's is a plain ViT."""

from collections.abc import Mapping
from typing import Any, ClassVar

from sightline.checkpoints.vit_kinds import PLAIN, OriginalViT, TransformersKind
from sightline.layout import Shapes

_WANTED = {**PLAIN, "positions": "sincos2d", "num_classes": 0}


class OriginalMae(OriginalViT):
    """facebookresearch/mae's pre-training network: the encoder is read, the decoder and its mask token left out."""

    wanted: ClassVar[Mapping[str, Any]] = {**_WANTED, "activation": "gelu"}
    resample = "bicubic"
    dropped = r"mask_token|decoder_.*"

    def recognises(self, shapes: Shapes) -> bool:
        return "decoder_embed.weight" in shapes


class TransformersMae(TransformersKind):
    """`ViTMAEModel`, and `ViTMAEForPreTraining` without its decoder."""

    model_type = "vit_mae"
    base = "vit"
    outside = ("decoder.",)
    with_head = "ViTMAEForPreTraining"
    bare = "ViTMAEModel"
    headless = ("ViTMAEForPreTraining",)
    dropped = r"decoder\..*"
    wanted: ClassVar[Mapping[str, Any]] = _WANTED
    defaults: ClassVar[Mapping[str, Any]] = {**TransformersKind.defaults, "mask_ratio": 0.75}
    ignored = (
        *("decoder_num_attention_heads", "decoder_hidden_size", "decoder_num_hidden_layers"),
        *("decoder_intermediate_size", "norm_pix_loss"),
    )

    def recognises(self, shapes: Shapes) -> bool:
        return "decoder.decoder_embed.weight" in shapes

    def measure(self, shapes: Shapes, image_size: tuple[int, int] | None) -> dict[str, Any]:
        patches = shapes.of("embeddings.position_embeddings", 3)[1] - 1
        return super().measure(shapes, image_size) | {"patches": patches}

    def config(self, backbone: Any, head: Any) -> dict[str, Any]:
        return super().config(backbone, head) | {"mask_ratio": 0.0}

    def remarks(self, backbone: Any, head: Any) -> list[str]:
        return ["mask_ratio=0, so that every patch is seen; pre-training takes 0.75"]


LAYOUTS = {"original/mae": OriginalMae(), "transformers/vit_mae": TransformersMae()}
