"""timm: directories with `config.json`, and bare `.safetensors` or `.pth` files."""

import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from sightline.checkpoints.files import bare_file, safetensors_of
from sightline.checkpoints.library import Library, said, unprefixed
from sightline.checkpoints.scheme import Bundle, Content, Reading, Request, Scheme, Stored
from sightline.errors import UserError, printable, suggest
from sightline.images.interchange import from_timm, to_timm
from sightline.images.preprocess import Preprocess
from sightline.layout import TimmLayout
from sightline.network import Architecture, describe
from sightline.registry import variants
from sightline.schema import require

_SECTIONS = {
    "architecture",
    "num_classes",
    "num_features",
    "global_pool",
    "model_args",
    "pretrained_cfg",
    "label_names",
}
_PUBLISHED = {  # what timm says of published weights
    *("architecture", "classifier", "crop_mode", "crop_pct", "custom_load", "description", "file", "first_conv"),
    *("fixed_input_size", "global_pool", "hf_hub_filename", "hf_hub_id", "input_size", "interpolation"),
    *("label_descriptions", "label_names", "label_offset", "labels", "license", "mean", "min_input_size", "notes"),
    *("num_classes", "num_features", "origin_url", "paper_ids", "paper_name", "pool_size", "pretrained", "source"),
    *("state_dict", "std", "tag", "test_crop_pct", "test_input_size", "test_pool_size", "url"),
}


class Timm(Library):
    """timm's directories name an architecture and the arguments of its model class."""

    name = "timm"

    def recognises(self, stored: Stored) -> bool:
        if stored.config is not None:
            return (
                "architecture" in stored.config and "model_type" not in stored.config and "format" not in stored.config
            )
        return super().recognises(stored)

    def read(self, stored: Stored, request: Request) -> Reading:
        if stored.config is None:
            return super().read(stored, request)
        where, config = stored.where, _sections(stored.config, stored.where)
        found = unprefixed(stored)
        layout = self.matching(found)
        if not isinstance(layout, TimmLayout):
            first = ", ".join(f"'{printable(name)}'" for name in list(stored.contents.tensors)[:5])
            raise UserError(f"{where} holds no network of timm that is read here; its tensors begin with {first}")
        arguments, size, count = _arguments(config, where)
        told = layout.told(arguments, where) | ({} if count is None else {"num_classes": count})

        def tell(architecture: Architecture) -> tuple[Preprocess, tuple[str, ...] | None]:
            pixels = from_timm(config["pretrained_cfg"]).at(architecture.backbone.image_size)
            return pixels, _labels(config, architecture)

        name = str(config["architecture"]).split(".")[0]
        beside = {"architecture": name, "image_size": size, "told": told, "tell": tell}
        return self.reading(found, layout, request, **beside, notes=said(found))

    def refusals(self, architecture: Architecture, out: Path) -> list[str]:
        layout, refused = self.layout_of(architecture)
        if not out.suffix and isinstance(layout, TimmLayout):
            refused = [*refused, *layout.unwritten(architecture.backbone, architecture.head)]
        return refused

    def files(self, bundle: Bundle, tensors: Mapping[str, Tensor], out: Path) -> dict[Path, Content]:
        return bare_file(tensors, out) or {
            out / "model.safetensors": safetensors_of(tensors),
            out / "config.json": json.dumps(self._config(bundle), indent=2).encode(),
        }

    def remarks(self, bundle: Bundle, out: Path) -> list[str]:
        remarks = super().remarks(bundle, out)
        if out.suffix:
            layout = self.layout(bundle.architecture)
            assert isinstance(layout, TimmLayout)
            return [*remarks, *layout.by_hand(bundle.architecture.backbone, bundle.architecture.head)]
        if bundle.preprocess.kernel != "pillow":
            remarks.append("timm resizes with Pillow, which rounds otherwise than torch: up to 2/255")
        return remarks

    def reference(self, bundle: Bundle, out: Path) -> Callable[[Tensor], Tensor] | None:
        if out.suffix or find_spec("timm") is None:
            return None
        import timm

        return timm.create_model(f"local-dir:{out}", pretrained=True).eval()

    def _config(self, bundle: Bundle) -> dict[str, Any]:
        """A `config.json` from which timm builds the network: every setting is named, whatever the name implies."""
        architecture, config, head = bundle.architecture, bundle.architecture.backbone, bundle.architecture.head
        layout = self.layout(architecture)
        assert isinstance(layout, TimmLayout)
        name, arguments = layout.arguments(config, head)
        row = variants().get(architecture.name)
        if row is not None and "timm" in row.sources:
            published = describe(architecture.name)
            if self.layout(published) is layout and layout.arguments(published.backbone, published.head)[0] == name:
                name = architecture.name
        pretrained = {
            **to_timm(bundle.preprocess),
            "input_size": [config.in_chans, *config.image_size],
            "fixed_input_size": layout.fixed_input_size,
            "num_classes": head.num_classes,
            "first_conv": layout.first_conv,
            "classifier": layout.classifier,
        }
        found = {
            "architecture": name,
            "num_classes": head.num_classes,
            "num_features": self._width(architecture),
            "global_pool": head.global_pool,
            "model_args": {name: value for name, value in arguments.items() if value is not None},
            "pretrained_cfg": pretrained,
        }
        return found if not bundle.named else {**found, "label_names": list(bundle.labels)}

    def _width(self, architecture: Architecture) -> int:
        return architecture.lay_out().backbone.width


def _sections(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A configuration in its present form: older ones are one flat dictionary."""
    found = dict(config) if "pretrained_cfg" in config else {**config, "pretrained_cfg": dict(config)}
    for key in ("pretrained_cfg", "model_args"):
        found.setdefault(key, {})
        require(isinstance(found[key], dict), f"{where}: '{key}' in config.json is not an object")
    for key in (*config, *found["pretrained_cfg"]):
        # Nothing unknown is passed over: it might say that the network computes otherwise, or ask for code.
        known = key in _SECTIONS or key in _PUBLISHED
        require(known, f"{where}: '{printable(key)}' in config.json is unknown.{suggest(key, _PUBLISHED)}")
    require(isinstance(found["architecture"], str), f"{where}: 'architecture' in config.json is not text")
    return found


def _arguments(config: Mapping[str, Any], where: str) -> tuple[dict[str, Any], tuple[int, int] | None, int | None]:
    """The arguments of the model class, the image size, and the number of classes where it is told."""
    pretrained, arguments = config["pretrained_cfg"], dict(config["model_args"])
    counts = [count for count in (arguments.pop("num_classes", None), config.get("num_classes")) if count is not None]
    # What the network was published with (pretrained_cfg) may differ from what it was then given.
    count = counts[0] if counts else pretrained.get("num_classes")
    contradiction = (
        f"{printable(repr(counts[0]))} in model_args and {printable(repr(counts[-1]))} beside" if counts else ""
    )
    require(all(c == count for c in counts), f"{where}: num_classes in config.json is {contradiction}")
    size = arguments.pop("img_size", None) or _behind_channels(pretrained.get("input_size"))
    size = [size, size] if isinstance(size, int) else size
    whole = isinstance(size, list) and (not size or (len(size) == 2 and all(isinstance(n, int) for n in size)))
    require(whole, f"{where}: the image size in config.json is not two whole numbers")
    pool = arguments.get("global_pool") or pretrained.get("global_pool")
    return arguments | ({"global_pool": pool} if pool else {}), tuple(size) or None, count


def _behind_channels(size: Any) -> Any:
    """The sides of an `input_size`; whatever is none stays as it is."""
    return size[1:] if isinstance(size, list) else size or []


def _labels(config: Mapping[str, Any], architecture: Architecture) -> tuple[str, ...] | None:
    names = config.get("label_names") or config["pretrained_cfg"].get("label_names")
    if isinstance(names, Mapping):
        ordered = [names.get(str(i)) for i in range(len(names))]
    else:
        ordered = list(names) if isinstance(names, list | tuple) else []
    count = architecture.head.num_classes
    complete = len(ordered) == count > 0 and all(isinstance(name, str) for name in ordered)
    return tuple(ordered) if complete else None


SCHEMES: Mapping[str, Scheme] = {"timm": Timm()}
