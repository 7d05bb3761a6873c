"""CLIP: transformers' `CLIPModel`, and the flat names of OpenAI and open_clip; logits of both towers together."""
