"""CLIP's two towers: transformers, open_clip, and OpenAI's flat names; the answer is the table of logits."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from parity import Case, Made, spread
from vit_references import SIZES, pixels_of

TEXT = {"hidden_size": 20, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 5}
VISION = {"hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 3}
SMALL = {"embed_dim": 24, "mlp_dim": 56, "depth": 2, "num_heads": 3, "patch_size": 8, "projection_dim": 14}
SMALL_TEXT = {"text_width": 20, "text_mlp_dim": 52, "text_depth": 3, "text_heads": 5, "vocab_size": 97}
WORDS, LENGTH = 97, 11


def ids_of(count: int) -> Tensor:
    """Texts of unlike lengths, each with its end, and anything behind it."""
    ids = torch.randint(1, WORDS - 1, (count, LENGTH), generator=torch.Generator().manual_seed(2))
    ids[torch.arange(count), torch.arange(count) % (LENGTH - 2) + 2] = WORDS - 1
    return ids


def reference(activation: str = "quick_gelu", eos: int = WORDS - 1, side: int = 32) -> CLIPModel:
    """transformers' network, small and of random weights."""
    text = {**TEXT, "vocab_size": WORDS, "max_position_embeddings": LENGTH, "hidden_act": activation}
    text |= {"eos_token_id": eos, "bos_token_id": WORDS - 2}
    vision = {**VISION, "image_size": side, "patch_size": 8, "hidden_act": activation}
    return spread(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=14)))


def flat(model: CLIPModel) -> dict[str, Tensor]:
    """The same weights as OpenAI's code names them."""
    stored, found = model.state_dict(), {}
    for name, tensor in stored.items():
        for theirs, ours in (
            ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
            ("text_model.encoder.layers.", "transformer.resblocks."),
            ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
            ("vision_model.embeddings.patch_embedding", "visual.conv1"),
            ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
            ("vision_model.pre_layrnorm", "visual.ln_pre"),
            ("vision_model.post_layernorm", "visual.ln_post"),
            ("text_model.embeddings.token_embedding", "token_embedding"),
            ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
            ("text_model.final_layer_norm", "ln_final"),
            ("layer_norm", "ln_"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            ("self_attn.out_proj", "attn.out_proj"),
        ):
            name = name.replace(theirs, ours)
        found[name] = tensor.detach().clone()
    found["visual.proj"] = found.pop("visual_projection.weight").T.contiguous()
    found["text_projection"] = found.pop("text_projection.weight").T.contiguous()
    for first in [name for name in found if "self_attn.q_proj" in name]:
        parts = [found.pop(first.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        kind = first.split(".")[-1]
        found[first.replace(f"self_attn.q_proj.{kind}", f"attn.in_proj_{kind}")] = torch.cat(parts)
    return {name: tensor for name, tensor in found.items() if "position_ids" not in name}


def _made(path: Path, options: dict[str, Any], model: CLIPModel, view: str) -> Made:
    size = SIZES[view]
    pixels, ids = pixels_of(size), ids_of(3)
    with torch.no_grad():
        answer = model(pixel_values=pixels, input_ids=ids, interpolate_pos_encoding=view != "square")
    more = {} if view == "square" else {"image_size": size}
    return Made(path, {**options, **more}, pixels, answer.logits_per_image, (ids,))


def _transformers(folder: Path, view: str, **settings: Any) -> Made:
    model = reference(**settings)
    model.save_pretrained(folder)
    return _made(folder, {}, model, view)


def _openai(folder: Path, numbers: bool) -> Made:
    model, path = reference(), folder / "clip.pt"
    beside = {"input_resolution": 32, "context_length": LENGTH, "vocab_size": WORDS} if numbers else {}
    torch.save(flat(model) | {name: torch.tensor(value) for name, value in beside.items()}, path)
    return _made(path, {"num_heads": 3, "text_heads": 5}, model, "square")


def _open_clip_file(folder: Path) -> Made:
    model, path = reference(activation="gelu"), folder / "open_clip.safetensors"
    save_file(flat(model), path)
    return _made(path, {"architecture": "ViT-B-32", **SMALL, **SMALL_TEXT}, model, "square")


def _open_clip_folder(folder: Path) -> Made:
    model = reference(activation="gelu")
    save_file(flat(model), folder / "open_clip_model.safetensors")
    vision = {"image_size": 32, "layers": 2, "width": 24, "head_width": 8, "patch_size": 8, "mlp_ratio": 56 / 24}
    text = {"context_length": LENGTH, "vocab_size": WORDS, "width": 20, "heads": 5, "layers": 3, "mlp_ratio": 2.6}
    config = {"model_cfg": {"embed_dim": 14, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {"size": 32}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return _made(folder, {}, model, "square")


CASES = [
    Case("clip", "transformers", "square", "transformers/clip", partial(_transformers, view="square")),
    Case("clip", "transformers", "non-square", "transformers/clip", partial(_transformers, view="non-square")),
    Case("clip", "transformers", "other size", "transformers/clip", partial(_transformers, view="other size")),
    Case("clip_old_end", "transformers", "square", "transformers/clip", partial(_transformers, view="square", eos=2)),
    Case(
        "clip_gelu",
        "transformers",
        "square",
        "transformers/clip",
        partial(_transformers, view="square", activation="gelu"),
    ),
    Case("clip", "openai", "square", "openai/clip", partial(_openai, numbers=True)),
    Case("clip_weights_alone", "openai", "square", "openai/clip", partial(_openai, numbers=False)),
    Case("clip", "open_clip", "square", "openai/clip", _open_clip_file),
    Case("clip_folder", "open_clip", "square", "openai/clip", _open_clip_folder),
]
