"""Sightline: Vision Transformers, from a folder of images to a model its owner can trust.

The names below are loaded when first used, so that `import sightline` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sightline.errors import UserError, WorkError
    from sightline.images.preprocess import Preprocess
    from sightline.model import Model, load
    from sightline.network import create_model, list_models
    from sightline.recipes.train import train
    from sightline.types import Prediction, Tokens

__version__ = "0.1.0"

_HOMES = {
    "Model": "sightline.model",
    "Prediction": "sightline.types",
    "Preprocess": "sightline.images.preprocess",
    "Tokens": "sightline.types",
    "UserError": "sightline.errors",
    "WorkError": "sightline.errors",
    "create_model": "sightline.network",
    "list_models": "sightline.network",
    "load": "sightline.model",
    "train": "sightline.recipes.train",
}

__all__ = [
    "Model",
    "Prediction",
    "Preprocess",
    "Tokens",
    "UserError",
    "WorkError",
    "__version__",
    "create_model",
    "list_models",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sightline' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
