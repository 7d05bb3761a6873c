"""What objectives that hide patches share: cutting images into patches, and putting other tokens in their place."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sightline.errors import UserError
from sightline.network import Network
from sightline.types import Tokens

Grid = tuple[int, int]


def cut(pixels: Float[Tensor, "b c h w"], grid: Grid, patch: tuple[int, int]) -> Float[Tensor, "b n values"]:
    """The pixels of each patch, patches row by row, values in the order row, column, channel.

    Where the grid reaches beyond the image, zeros are added below and to the right; where it ends before, the rest is
    left out.
    """
    height, width = grid[0] * patch[0], grid[1] * patch[1]
    pixels = F.pad(pixels, (0, max(width - pixels.shape[3], 0), 0, max(height - pixels.shape[2], 0)))
    return rearrange(pixels[..., :height, :width], "b c (r p) (s q) -> b (r s) (p q c)", p=patch[0], q=patch[1])


@contextmanager
def replaced(backbone: Any, change: Callable[[Float[Tensor, "b n d"]], Float[Tensor, "b n d"]]) -> Generator[None]:
    """Inside, `change` stands between the patch embedding of a backbone and all that follows."""
    hook = backbone.tokenizer.register_forward_hook(lambda _, __, made: made._replace(x=change(made.x)))
    try:
        yield
    finally:
        hook.remove()


def hidden_tokens(
    network: Network, pixels: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b n"], token: Float[Tensor, "1 1 d"]
) -> Tokens:
    """The tokens that a head reads of images in which `token` stands for the patches at which `mask` is True."""
    with replaced(network.backbone, lambda x: torch.where(mask[..., None], token.to(x.dtype), x)):
        return network.backbone(pixels)


def require_patches(network: Network, method: str) -> Grid:
    """The grid of patches at the network's own size.

    Raises UserError where the backbone has none that could be hidden: it must make each of its pixels alone.
    """
    backbone, family = network.backbone, network.architecture.family
    tokenizer = getattr(backbone, "tokenizer", None)
    if not isinstance(tokenizer, nn.Module) or not hasattr(tokenizer, "grid"):
        raise UserError(
            f"{method} hides patches, and the family '{family}' cuts no image into patches: take a Vision Transformer "
            "or a Swin Transformer (--model), or an objective without masks (dino, supervised)"
        )
    if not getattr(tokenizer, "local", True) or not getattr(backbone, "local", True):
        raise UserError(
            f"{method} hides patches, and this tokenizer reads each patch together with its neighbours, which would "
            "give away what is hidden: take --tokenizer patch, or an objective without masks (dino, supervised)"
        )
    return tokenizer.grid(network.architecture.backbone.image_size)


def require_one_token_each(network: Network, method: str) -> Grid:
    """The grid of patches of a backbone that keeps a token for each to the end. Raises UserError for another."""
    grid, size = require_patches(network, method), network.architecture.backbone.image_size
    if network.backbone.grid_of(size) != grid:
        raise UserError(
            f"{method} asks each patch's own token what was hidden there, and the family "
            f"'{network.architecture.family}' merges patches on the way: take simmim, which asks for areas of pixels"
        )
    return grid


def mask_token(width: int) -> nn.Parameter:
    """A learned token that stands for a hidden patch, normal with deviation 0.02."""
    token = nn.Parameter(torch.zeros(1, 1, width))
    nn.init.normal_(token, std=0.02)
    return token


def headless(network: Network) -> Network:
    """The network; its head, of which the objective makes no use, is left as it is."""
    network.head.requires_grad_(False)
    return network


def at(values: Float[Tensor, "b n d"], index: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
    """The rows of each image at the places `index`."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
