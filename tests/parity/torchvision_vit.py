"""torchvision's Vision Transformers."""

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from parity import VIEWS, Case, Made, spread
from vit_references import SIZES, pixels_of


def _model(size: int, pre_logits: int | None) -> VisionTransformer:
    return VisionTransformer(size, 8, 2, 3, 24, 40, num_classes=5, representation_size=pre_logits)


def _unequal(model: VisionTransformer, pixels: Tensor, table: Tensor) -> Tensor:
    """The model's own parts where it asserts a square image: positions stretched as `interpolate_embeddings` does."""
    grid = (pixels.shape[-2] // 8, pixels.shape[-1] // 8)
    plane = rearrange(table[:, 1:], "1 (r c) d -> 1 d r c", r=4)
    plane = F.interpolate(plane, size=grid, mode="bicubic", align_corners=True)
    model.encoder.pos_embedding.data = torch.cat([table[:, :1], rearrange(plane, "1 d r c -> 1 (r c) d")], dim=1)
    patches = rearrange(model.conv_proj(pixels), "b d r c -> b (r c) d")
    tokens = model.encoder(torch.cat([model.class_token.expand(len(pixels), -1, -1), patches], dim=1))
    return model.heads(tokens[:, 0])


def _case(kind: str, view: str, pre_logits: int | None, *, old: bool = False) -> Case:
    def make(folder: Path) -> Made:
        model, size = spread(_model(32, pre_logits)), {**SIZES, "other size": (48, 48)}[view]
        path = folder / "vit.pth"
        former = {"mlp.0.": "mlp.linear_1.", "mlp.3.": "mlp.linear_2."} if old else {}
        state = dict(model.state_dict())
        for now, before in former.items():
            state = {name.replace(now, before): tensor for name, tensor in state.items()}
        torch.save(state, path)
        pixels = pixels_of(size)
        with torch.no_grad():
            if view == "other size":
                larger = _model(48, pre_logits).eval()
                larger.load_state_dict(interpolate_embeddings(48, 8, model.state_dict()))
                expected = larger(pixels)
            elif view == "non-square":
                expected = _unequal(model, pixels, model.encoder.pos_embedding.detach().clone())
            else:
                expected = model(pixels)
        return Made(path, {"image_size": size, "source_size": 32, "num_heads": 3}, pixels, expected)

    return Case(kind, "torchvision", view, "torchvision/vit", make)


CASES = [
    *(_case("torchvision_vit", view, None) for view in VIEWS),
    *(_case("torchvision_vit_pre_logits", view, 13) for view in VIEWS),
    _case("torchvision_vit_old_names", "square", None, old=True),
]
