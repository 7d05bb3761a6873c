"""transformers: directories with `config.json`, and bare files, under the names that files on the hub have.

Releases 5 and newer call their parameters otherwise in memory, and translate when they read and write.
"""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from sightline.checkpoints.files import bare_file, safetensors_of
from sightline.checkpoints.library import Library, shapes_of
from sightline.checkpoints.rules import Found
from sightline.checkpoints.scheme import Bundle, Content, Reading, Request, Scheme, Stored
from sightline.errors import UserError, printable, suggest
from sightline.images.interchange import from_transformers, to_transformers
from sightline.images.preprocess import Preprocess
from sightline.layout import Layout, Rule, TransformersLayout
from sightline.network import Architecture
from sightline.schema import require
from sightline.texts.vocabularies import folder_files, load_vocabulary


class Transformers(Library):
    """Query, key and value apart, names in full, and before them that of the base model where there is a head."""

    name = "transformers"

    def recognises(self, stored: Stored) -> bool:
        if stored.config is not None:
            return "model_type" in stored.config
        return self._bare(stored) is not None

    def read(self, stored: Stored, request: Request) -> Reading:
        where = stored.where
        if stored.config is None:
            layout = self._bare(stored)
            assert layout is not None, "what nobody recognises comes to no scheme"
            found, told, size, config = _based(stored, layout), {}, None, {}
            notes = ("no config.json: what transformers takes without one is taken, such as its norm epsilon",)
        else:
            layout, config, notes = self._named(stored), stored.config, ()
            found = _based(stored, layout)
            refuse_odd(config, layout.defaults, layout.ignored, where)
            told = layout.told({**layout.defaults, **config}, shapes_of(found))
            size = told.pop("image_size", None)
            headless = _kind(config, layout, where) in (layout.bare, *layout.headless)
            if layout.task == "classify":
                told["num_classes"] = 0 if headless else _classes(config, _outputs(found, layout), where)

        def tell(architecture: Architecture) -> tuple[Preprocess, tuple[str, ...] | None]:
            side = architecture.backbone.image_size
            processor = stored.processor or {"size": {"height": side[0], "width": side[1]}}
            return from_transformers(processor).at(side), _labels(config, _count(architecture.head), where)

        reading = self.reading(found, layout, request, image_size=size, told=told, tell=tell, notes=notes)
        if (tokens := getattr(reading.architecture.head, "vocab_size", None)) is None:
            return reading
        return replace(reading, vocabulary=load_vocabulary(stored.folder, tokens))

    def rules(self, architecture: Architecture) -> list[Rule]:
        layout = self.layout(architecture)
        assert isinstance(layout, TransformersLayout)
        before = f"{layout.base}." if layout.kind(architecture.backbone, architecture.head) != layout.bare else ""
        return [
            Rule(
                rule.ours,
                tuple(name if name.startswith(layout.outside) else before + name for name in rule.theirs),
                rule.load,
                rule.save,
            )
            for rule in super().rules(architecture)
        ]

    def extras(self, architecture: Architecture) -> dict[str, Tensor]:
        layout = self.layout(architecture)
        assert isinstance(layout, TransformersLayout)
        before = f"{layout.base}." if layout.kind(architecture.backbone, architecture.head) != layout.bare else ""
        return {before + name: tensor for name, tensor in super().extras(architecture).items()}

    def files(self, bundle: Bundle, tensors: Mapping[str, Tensor], out: Path) -> dict[Path, Content]:
        if bare := bare_file(tensors, out):
            return bare
        files: dict[Path, Content] = {out / "model.safetensors": safetensors_of(tensors)}
        processor, _ = _processor(bundle.preprocess)
        if processor is not None:
            files[out / "preprocessor_config.json"] = json.dumps(processor, indent=2).encode()
        if bundle.vocabulary is not None:
            files |= {out / name: content for name, content in folder_files(bundle.vocabulary).items()}
        return {**files, out / "config.json": json.dumps(self._config(bundle), indent=2).encode()}

    def remarks(self, bundle: Bundle, out: Path) -> list[str]:
        _, refusal = _processor(bundle.preprocess)
        remarks = super().remarks(bundle, out)
        if refusal is not None:
            remarks.append(f"preprocessor_config.json left out: {refusal}")
        return remarks

    def reference(self, bundle: Bundle, out: Path) -> Callable[..., Any] | None:
        if out.suffix or find_spec("transformers") is None:
            return None
        import transformers

        architecture = bundle.architecture
        layout = self.layout(architecture)
        assert isinstance(layout, TransformersLayout)
        options = layout.opened(architecture.backbone, architecture.head)
        kind = getattr(transformers, layout.kind(architecture.backbone, architecture.head))
        model = kind.from_pretrained(out, **options).eval()
        return lambda *inputs: layout.output(layout.ask(model, *inputs), architecture.backbone, architecture.head)

    def _bare(self, stored: Stored) -> TransformersLayout | None:
        """The layout of a file without `config.json`, by the names in it."""
        for layout in self.layouts():
            assert isinstance(layout, TransformersLayout)
            if layout.recognises(shapes_of(_based(stored, layout))):
                return layout
        return None

    def _named(self, stored: Stored) -> TransformersLayout:
        """The layout that `model_type` names."""
        config, where = stored.config or {}, stored.where
        require("auto_map" not in config, f"{where}: 'auto_map' asks for code from the folder, and none is ever run")
        found = {layout.model_type: layout for layout in self.layouts() if isinstance(layout, TransformersLayout)}
        model_type = config["model_type"]
        known = isinstance(model_type, str) and model_type in found
        require(
            known, f"{where}: model_type '{printable(model_type)}' is not one that is read ({', '.join(sorted(found))})"
        )
        return found[model_type]

    def _config(self, bundle: Bundle) -> dict[str, Any]:
        backbone, head = bundle.architecture.backbone, bundle.architecture.head
        layout = self.layout(bundle.architecture)
        assert isinstance(layout, TransformersLayout)
        named = {  # numbers too, where there are no names: else transformers would make up others than we answer with
            "id2label": {str(i): label for i, label in enumerate(bundle.labels)},
            "label2id": {label: i for i, label in enumerate(bundle.labels)},
        }
        return {
            "architectures": [layout.kind(backbone, head)],
            "model_type": layout.model_type,
            **layout.config(backbone, head),
            **(named if _count(head) else {}),
            "dtype": "float32",
        }


def _based(stored: Stored, layout: Layout) -> Found:
    """The names without that of the base model, where any has it; what lacks it then belongs to nothing."""
    assert isinstance(layout, TransformersLayout)
    tensors, base = stored.contents.tensors, f"{layout.base}."
    if not any(name.startswith(base) for name in tensors):
        return Found(stored.where, tensors)
    inside = {name: name.removeprefix(base) for name in tensors if name.startswith(base)}
    # A stranger gets a name that no rule has, so that it is refused instead of taken for the tensor it is named after.
    names = {name: inside.get(name, name if name.startswith(layout.outside) else f"?{name}") for name in tensors}
    disk = {short: name for name, short in names.items() if short.startswith("?")}
    renamed = {names[name]: tensor for name, tensor in tensors.items()}
    return Found(stored.where, renamed, base, disk, outside=layout.outside)


def _count(head: Any) -> int:
    """The classes of a head; none where it has no such thing."""
    return getattr(head, "num_classes", 0)


def _kind(config: Mapping[str, Any], layout: TransformersLayout, where: str) -> str:
    """The class that the weights belong to: it decides whether there is a classifier."""
    kinds = config.get("architectures") or []
    require(isinstance(kinds, list) and len(kinds) < 2, f"{where}: 'architectures' is not a list of one name")
    kind = kinds[0] if kinds else layout.with_head
    known = (layout.with_head, *layout.also, layout.bare)
    require(kind in known, f"{where}: architecture '{printable(kind)}' is not one of {', '.join(known)}")
    return kind


def _outputs(found: Found, layout: TransformersLayout) -> int:
    shapes = shapes_of(found)
    if layout.classes_of is not None:
        return shapes.outputs(layout.classes_of) - 1
    return max((shapes.outputs(name) for name in shapes if name.startswith(layout.outside)), default=0)


_GENERIC = {  # what every configuration of transformers may carry and what changes no output here
    *("_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "_num_labels"),
    *("architectures", "chunk_size_feed_forward", "dtype", "encoder_stride", "finetuning_task", "id2label"),
    *("initializer_range", "is_encoder_decoder", "label2id", "license", "model_type", "num_labels"),
    *("output_attentions", "output_hidden_states", "problem_type", "return_dict", "torch_dtype", "torchscript"),
    *("transformers_version", "use_cache", "use_bfloat16", "use_mask_token"),
}
_TEXTUAL = {  # settings of text generation, which older releases wrote into every file
    *("add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "cross_attention_hidden_size"),
    *("decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size"),
    *("eos_token_id", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "is_decoder"),
    *("length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams"),
    *("num_return_sequences", "output_scores", "pad_token_id", "prefix", "remove_invalid_values", "repetition_penalty"),
    *("return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature"),
    *(
        "tie_encoder_decoder",
        "tie_word_embeddings",
        "tokenizer_class",
        "top_k",
        "top_p",
        "typical_p",
        "gradient_checkpointing",
    ),
}
_EMPTY = {"pruned_heads": ({}, [], None), "tf_legacy_loss": (False, None)}  # known, and harmless where they say nothing


LARGE = 2**40
"""What no number in a configuration reaches; as one that is none (NaN) never lies below it."""


def refuse_odd(config: Mapping[str, Any], defaults: Mapping[str, Any], ignored: Collection[str], where: str) -> None:
    """Nothing unknown is passed over: it might say that the network computes otherwise, or ask for code.

    Nor is a value of another kind than the usual one.
    """
    for key, value in config.items():
        if key in _EMPTY:
            require(value in _EMPTY[key], f"{where}: '{key}' in config.json has no counterpart here")
        elif key not in defaults and key not in ignored and key not in _GENERIC and key not in _TEXTUAL:
            raise UserError(f"{where}: '{printable(key)}' in config.json is unknown.{suggest(key, defaults)}")
        elif key in defaults and not _alike(key, value, defaults[key]):
            raise UserError(
                f"{where}: '{printable(key)}' in config.json is {printable(repr(value), 60)}, and should be like "
                f"{defaults[key]!r}"
            )


def _alike(key: str, value: Any, usual: Any) -> bool:
    """Whether a value is of the kind of the usual one: layouts compute with it before any schema sees it."""
    if isinstance(usual, bool | str) or usual is None:
        return usual is None or isinstance(value, type(usual))
    size, several = key.endswith("_size"), isinstance(value, list | tuple)
    if several != isinstance(usual, list | tuple) and not (several and size and len(value) == 2):
        return False
    numbers = value if several else [value]
    plain = all(isinstance(n, int | float) and not isinstance(n, bool) and -LARGE < n < LARGE for n in numbers)
    return plain and (not size or all(isinstance(n, int) and n > 0 for n in numbers))


def _classes(config: Mapping[str, Any], stored: int, where: str) -> int:
    """The number of classes that a configuration names, if it does."""
    labels = config.get("id2label")
    require(
        labels is None or isinstance(labels, Mapping),
        f"{where}: 'id2label' in config.json is no object of class numbers to names",
    )
    return len(labels) if isinstance(labels, Mapping) else config.get("num_labels", stored)


def _labels(config: Mapping[str, Any], count: int, where: str) -> tuple[str, ...] | None:
    """The class names in order, unless they are the ones that transformers makes up."""
    labels = config.get("id2label")
    if not count or not isinstance(labels, Mapping):
        return None
    for i in range(count):
        name = labels.get(str(i))
        require(isinstance(name, str), f"{where}: 'id2label' in config.json has no name for class {i} of {count}")
    names = tuple(labels[str(i)] for i in range(count))
    return None if names == tuple(f"LABEL_{i}" for i in range(count)) else names


def _processor(preprocess: Preprocess) -> tuple[dict[str, Any] | None, str | None]:
    """The pixel contract as transformers writes it, or why it cannot: other pixels are never written in its place."""
    try:
        return to_transformers(preprocess), None
    except UserError as fault:
        return None, str(fault)


SCHEMES: Mapping[str, Scheme] = {"transformers": Transformers()}
