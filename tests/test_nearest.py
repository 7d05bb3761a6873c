"""A tensor by which a layout is known is named when it is missing, although nothing knows the file any more."""

import pytest
import timm
import torchvision
from safetensors.torch import save_file

from sightline.checkpoints.load import load_bundle
from sightline.errors import UserError

GONE = [
    ("vit_tiny_patch16_224", timm.create_model, "patch_embed.proj.weight"),
    ("vit_tiny_patch16_224", timm.create_model, "cls_token"),
    ("pit_ti_224", timm.create_model, "transformers.0.blocks.0.norm1.weight"),
    ("resnet18", timm.create_model, "conv1.weight"),
    ("swin_t", torchvision.models.get_model, "features.1.0.attn.qkv.bias"),
]


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(("name", "make", "tensor"), GONE)
def test_what_decides_the_layout_is_missed_by_name(name, make, tensor, named, tmp_path):
    state = make(name).state_dict()
    del state[tensor]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=tensor):
        load_bundle(tmp_path / "model.safetensors", architecture=name if named else None)
