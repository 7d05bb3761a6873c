"""DALL-E's encoder, whose answer here is the mean of its logits over the image."""

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

from parity import Case, Made

GOLDEN = Path(__file__).parents[1] / "data" / "goldens" / "dvae"
LABELS = {"square": "square", "non-square": "wide"}


def _golden(view: str) -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        io = load_file(GOLDEN / "io.safetensors")
        pixels, logits = io[f"input.pixels_{LABELS[view]}"], io[f"output.logits_{LABELS[view]}"]
        size = (pixels.shape[-2], pixels.shape[-1])
        return Made(GOLDEN / "encoder.safetensors", {"image_size": size}, 0.8 * pixels + 0.1, logits.mean(dim=(2, 3)))

    return make


CASES = [Case("dvae", "original", view, "original/dvae", _golden(view)) for view in LABELS]
