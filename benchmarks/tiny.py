"""How `builtin:tiny` was made: the project's own recipe on formula-driven images, stored in half precision.

    python benchmarks/tiny.py RUN [--out src/sightline/checkpoints/weights/tiny] [--card TEXT.md]

RUN is what `sightline train` left of

    sightline train builtin:fractals:classes=400,instances=1000,kind=mixed,size=64 --weights none \
      --model vit_pico_patch4_32 --tokenizer convolution --patch-size 8 --image-size 64 --minutes 20 --out RUN

Its classifier is left out, for whoever uses the weights has other classes.
"""

import argparse
import json
from pathlib import Path

from sightline.checkpoints.directory import write_model
from sightline.model import load
from sightline.network import count_parameters

CARD = """---
library_name: sightline
pipeline_tag: image-feature-extraction
tags: [vision-transformer, formula-driven]
license: apache-2.0
---
# builtin:tiny

A small Vision Transformer that has seen no photograph: it was taught to tell classes of fractals and contours apart,
which are drawn from formulas. It comes with Sightline and needs no download.

| | |
|---|---|
| network | `{name}`: width {width}, {depth} layers, {heads} heads, patches of {patch} pixels read by convolutions |
| parameters | {parameters:,}, without a classifier; stored as float16, {size:,} bytes |
| pixels | {pixels}×{pixels}; any other size by resampling its positions |
| images | `{source}`, seed {seed}: {train:,} pictures by formula, nothing downloaded |
| recipe | `{recipe}`: {optimizer}, learning rate {lr:g}, batches of {batch} |
| cost | {seconds:.0f} s on one core of a shared CPU, {steps:,} updates, {views:,} pictures seen |
| on its own task | {top1:.1%} of held-out pictures of {classes} classes (chance {chance:.2%}) |

## Use

```sh
sightline train photos --weights builtin:tiny
sightline evaluate builtin:tiny photos --protocol knn
```

```python
model = sightline.load("builtin:tiny")
vectors = model.embed(["cat.jpg"])
```

## Transfer

{transfer}

## Limits

It knows edges, strokes and textures, and no things of the world. It has no classes, so `predict` refuses it.
"""


def main() -> None:
    """Writes the model directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("src/sightline/checkpoints/weights/tiny"))
    parser.add_argument("--card", type=Path, help="what is known of its transfer, in Markdown")
    request = parser.parse_args()
    model = load(request.run, num_classes=0)
    network, preprocess = model.network.half(), model.preprocess
    write_model(request.out, network, preprocess, ())
    record = json.loads((request.run / "run.json").read_text())
    backbone, settings = network.architecture.backbone, record["recipe"]["settings"]
    card = CARD.format(
        name=network.architecture.name,
        width=backbone.embed_dim,
        depth=backbone.depth,
        heads=backbone.num_heads,
        patch=backbone.patch_size[0],
        parameters=count_parameters(network),
        size=(request.out / "model.safetensors").stat().st_size,
        pixels=preprocess.size[0],
        source=record["data"]["source"],
        seed=record["seed"],
        train=record["data"]["train"],
        recipe=record["recipe"]["name"],
        optimizer=settings["optimizer"],
        lr=settings["lr"],
        batch=settings["batch_size"],
        seconds=record["seconds"]["train"],
        steps=record["steps"],
        views=record["steps"] * settings["batch_size"],
        top1=record["metrics"]["top1"],
        classes=record["data"]["classes"],
        chance=1 / record["data"]["classes"],
        transfer=request.card.read_text().strip() if request.card else "Not measured.",
    )
    (request.out / "README.md").write_text(card)
    print(f"{request.out}: {sum(file.stat().st_size for file in request.out.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
