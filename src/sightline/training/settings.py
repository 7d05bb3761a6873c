"""What a training run may be told: plain data without heavy imports, for Python, JSON and the command line alike."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from sightline.schema import require


def option(default: Any, words: str) -> Any:
    """A field with its explanation, which the command line prints."""
    return field(default=default, metadata={"help": words})


@dataclass(frozen=True)
class Settings:
    """How a network is taught. Raises UserError for values out of range."""

    epochs: float = option(100.0, "passes over the training images")
    minutes: float | None = option(None, "train for this many minutes instead of --epochs; shapes the whole schedule")
    batch_size: int = option(64, "images per update, over all processes")
    micro_batch: int | None = option(None, "images per forward pass and process; smaller ones need less memory")
    optimizer: Literal["adamw", "muon", "sgd"] = option("adamw", "AdamW; Muon, which learns from fewer images; or SGD")
    lr: float = option(1e-3, "learning rate at its height")
    momentum: float = option(0.9, "momentum of SGD, first beta of AdamW")
    beta2: float = option(0.999, "second beta of AdamW")
    weight_decay: float = option(0.05, "decoupled weight decay of dense and convolution kernels, with every optimizer")
    weight_decay_end: float | None = option(None, "weight decay at the end, where a cosine leads; None leaves it")
    layer_decay: float = option(1.0, "factor of the learning rate per layer towards the input")
    clip_grad: float | None = option(1.0, "largest norm of the gradient")
    clip_each: bool = option(False, "clip the gradient of each tensor alone, not of all together")
    sched: Literal["cosine", "linear", "inverse_sqrt", "constant"] = option("cosine", "fall of the learning rate")
    warmup: float = option(0.05, "share of the run in which the learning rate rises")
    min_lr: float = option(0.0, "learning rate at the end, as a share of its height")
    smoothing: float = option(0.0, "label smoothing")
    mixup: float = option(0.0, "alpha of mixup; 0 leaves it out")
    cutmix: float = option(0.0, "alpha of CutMix; 0 leaves it out")
    switch_prob: float = option(0.5, "share of CutMix where mixup is on too")
    repeats: int = option(1, "repeated augmentation: views of each image per batch")
    ema: float | None = option(None, "decay of the average of weights that is evaluated and kept")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option("auto", "arithmetic of the forward pass")
    checkpointing: bool = option(False, "recompute activations instead of keeping them")
    memory: float | None = option(None, "gigabytes that the run may take, as foreseen; None leaves it what is free")
    compile: bool = option(False, "compile the training step with torch.compile")
    patience: int | None = option(None, "stop after this many evaluations without gain and keep the best weights")
    evaluations: int = option(20, "evaluations spread over the run, at ends of epochs")
    save_seconds: float = option(60.0, "seconds between checkpoints")
    refused_limit: float = option(0.01, "share of the training images that may be unreadable before the run stops")
    workers: int = option(1, "processes that decode and augment images")
    threads: int | None = option(None, "threads of each process that computes; chosen by the network's size")
    seed: int = option(0, "the number that every random choice of the run follows from")

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "lr", "repeats", "evaluations", "save_seconds", "layer_decay")
        for name in (*positive, "minutes", "micro_batch", "memory", "clip_grad", "patience", "threads"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be positive, not {value}")
        for name in ("weight_decay", "mixup", "cutmix", "workers", "seed"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, and is {getattr(self, name)}")
        for name in ("momentum", "beta2", "smoothing", "warmup"):
            require(0 <= getattr(self, name) < 1, f"{name} must lie in [0, 1), not {getattr(self, name)}")
        for name in ("min_lr", "switch_prob", "layer_decay", "refused_limit"):
            require(0 <= getattr(self, name) <= 1, f"{name} must lie in [0, 1], not {getattr(self, name)}")
        decay = self.weight_decay_end
        require(decay is None or decay >= 0, f"weight_decay_end must not be negative, and is {decay}")
        for name in ("epochs", "minutes", "lr", "weight_decay", "weight_decay_end", "memory"):
            value = getattr(self, name)
            require(value is None or math.isfinite(value), f"{name} must be finite, not {value}")
        require(self.seed < 2**31, f"seed must be less than 2147483648, not {self.seed}")
        require(self.ema is None or 0 < self.ema < 1, f"ema must lie in (0, 1), not {self.ema}")
