"""What computes an exported program: one interface over ONNX Runtime, OpenVINO and torch."""

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from sightline.errors import UserError


class Runtime(ABC):
    """An exported program that is loaded and ready: arrays in, arrays by name out.

    `needs` are the modules that it is made of, `extra` the extra of this project that brings them, `suffix` the ending
    of its files, `threads` the most that it computes with.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    suffix: ClassVar[str]

    @abstractmethod
    def __init__(self, path: str | os.PathLike[str], names: tuple[str, ...], *, threads: int | None = None):
        """Loads the program, whose outputs have these names."""

    @abstractmethod
    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs by name for the program's one input."""

    @classmethod
    def parts(cls) -> list[ModuleType]:
        """The modules that this runtime is made of. Raises UserError that says how to get one that is missing."""
        try:
            return [importlib.import_module(name) for name in cls.needs]
        except ImportError as fault:
            raise UserError(f'{fault.name} is not installed: pip install "sightline[{cls.extra}]"') from fault


class OnnxProgram(Runtime):
    """ONNX Runtime on the processor."""

    needs = ("onnxruntime", "onnx", "onnxscript")
    extra = "export"
    suffix = ".onnx"

    def __init__(self, path: str | os.PathLike[str], names: tuple[str, ...], *, threads: int | None = None):
        runtime: Any = self.parts()[0]
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        self.session = runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name
        self.names = list(names)

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(self.names, self.session.run(self.names, {self.input: image}), strict=True))


class OpenVinoProgram(Runtime):
    """OpenVINO on the processor, in fp32 unless told: by itself it would choose bf16 where the processor has it."""

    needs = ("openvino", "onnx", "onnxscript")
    extra = "export,openvino"
    suffix = ".xml"

    def __init__(
        self,
        path: str | os.PathLike[str],
        names: tuple[str, ...],
        *,
        threads: int | None = None,
        precision: Literal["f32", "bf16"] = "f32",
    ):
        openvino: Any = self.parts()[0]
        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads or torch.get_num_threads()}
        self.compiled = openvino.Core().compile_model(os.fspath(path), "CPU", settings)
        self.names = names

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        found = self.compiled(image)
        return {name: found[name] for name in self.names}


class TorchProgram(Runtime):
    """A program of `torch.export`, which needs torch and nothing else."""

    suffix = ".pt2"

    def __init__(self, path: str | os.PathLike[str], names: tuple[str, ...], *, threads: int | None = None):
        self.program = torch.export.load(Path(path)).module()
        self.names = names

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            found = self.program(torch.from_numpy(np.require(image, requirements=["C", "W"])))
        return {name: values.numpy() for name, values in zip(self.names, found, strict=True)}


RUNTIMES: Mapping[str, type[Runtime]] = {"onnx": OnnxProgram, "openvino": OpenVinoProgram, "torch": TorchProgram}
"""The runtime of each format."""
