"""The same architectures as other packages have them, with weights drawn at random: installed, or left out.

A peer is a row of `PEERS`: the package, and what makes its network of one of ours, or None where it has none like it.
"""

import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from sightline.errors import UserError
from sightline.network import Architecture, describe
from sightline.objectives.mae import MAEConfig


class Peer(NamedTuple):
    """A package, and its network for an architecture of ours and a number of classes."""

    package: str
    network: Callable[[Architecture, int], nn.Module | None]

    @property
    def version(self) -> str | None:
        """Which is installed; None where none is."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


def _timm(architecture: Architecture, classes: int) -> nn.Module | None:
    import timm

    if not timm.is_model(architecture.name):
        return None
    changes = _changes(architecture)
    try:
        return timm.create_model(architecture.name, pretrained=False, num_classes=classes, **changes)
    except TypeError:  # convolutions take images of every size, and have no patches
        return None if "patch_size" in changes else timm.create_model(architecture.name, num_classes=classes)


def _changes(architecture: Architecture) -> dict[str, Any]:
    """Image and patch size as timm calls them, where they are not those of the name."""
    usual, own = describe(architecture.name).backbone, architecture.backbone
    names = {"img_size": "image_size", "patch_size": "patch_size"}
    wanted = {theirs: getattr(own, name, None) for theirs, name in names.items()}
    return {theirs: value for theirs, value in wanted.items() if value != getattr(usual, names[theirs], None)}


class _Logits(nn.Module):
    """A network of transformers, which answers with an object, as one that answers with logits."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(pixel_values=pixels).logits


def _transformers(architecture: Architecture, classes: int) -> nn.Module | None:
    import transformers

    backbone = architecture.backbone
    make = {"vit": _vit, "swin": _swin}.get(architecture.family)
    settings = None if make is None else make(backbone)
    if settings is None or backbone.image_size[0] != backbone.image_size[1]:
        return None
    kind = {"vit": "ViT", "swin": "Swin"}[architecture.family]
    config = getattr(transformers, f"{kind}Config")(
        image_size=backbone.image_size[0], num_labels=classes, num_channels=backbone.in_chans, **settings
    )
    return _Logits(getattr(transformers, f"{kind}ForImageClassification")(config))


def _vit(backbone: Any) -> Mapping[str, Any] | None:
    plain = backbone.tokenizer == "patch" and backbone.class_token and not backbone.reg_tokens
    if not plain or backbone.norm != "pre" or backbone.patch_size[0] != backbone.patch_size[1]:
        return None
    return {
        "hidden_size": backbone.embed_dim,
        "num_hidden_layers": backbone.depth,
        "num_attention_heads": backbone.num_heads,
        "intermediate_size": backbone.mlp_dim or int(backbone.embed_dim * backbone.mlp_ratio),
        "patch_size": backbone.patch_size[0],
    }


def _swin(backbone: Any) -> Mapping[str, Any] | None:
    return {
        "embed_dim": backbone.embed_dim,
        "depths": list(backbone.depths),
        "num_heads": list(backbone.num_heads),
        "window_size": backbone.window_size[0] if isinstance(backbone.window_size, tuple) else backbone.window_size,
    }


def _torchvision(architecture: Architecture, classes: int) -> nn.Module | None:
    from torchvision import models

    name = TORCHVISION.get(architecture.name)
    return None if name is None or _changes(architecture) else getattr(models, name)(num_classes=classes)


def masked_autoencoder(architecture: Architecture, config: MAEConfig) -> nn.Module:
    """A masked autoencoder of transformers with this encoder and decoder, whose answer has a `loss`.

    Raises UserError where it has none like this.
    """
    import transformers

    backbone = architecture.backbone
    settings = _vit(backbone) if architecture.family == "vit" else None
    if settings is None or backbone.image_size[0] != backbone.image_size[1]:
        raise UserError(f"version {transformers.__version__} has no masked autoencoder like this")
    return transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            image_size=backbone.image_size[0],
            num_channels=backbone.in_chans,
            mask_ratio=config.mask_ratio,
            norm_pix_loss=config.norm_pix,
            decoder_hidden_size=config.decoder_dim,
            decoder_num_hidden_layers=config.decoder_depth,
            decoder_num_attention_heads=config.decoder_heads,
            decoder_intermediate_size=4 * config.decoder_dim,
            **settings,
        )
    )


TORCHVISION = {
    "vit_base_patch16_224": "vit_b_16",
    "vit_base_patch32_224": "vit_b_32",
    "vit_large_patch16_224": "vit_l_16",
    "vit_large_patch32_224": "vit_l_32",
    "vit_huge_patch14_224": "vit_h_14",
    "swin_tiny_patch4_window7_224": "swin_t",
    "swin_small_patch4_window7_224": "swin_s",
    "swin_base_patch4_window7_224": "swin_b",
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "resnet101": "resnet101",
    "resnet152": "resnet152",
}
"""What torchvision calls an architecture."""

PEERS = {
    "timm": Peer("timm", _timm),
    "transformers": Peer("transformers", _transformers),
    "torchvision": Peer("torchvision", _torchvision),
}


def network_of(name: str, architecture: Architecture, classes: int) -> nn.Module:
    """A peer's network. Raises UserError where it has none like this."""
    network = PEERS[name].network(architecture, classes)
    if network is None:
        raise UserError(f"version {PEERS[name].version} has no {architecture.name} like this")
    return network
