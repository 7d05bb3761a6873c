"""transformers' Trainer, a step at a time, so that it can take turns with others."""

import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sightline.network import count_parameters
from sightline.types import Batch


class Steps:
    """Each call lets a Trainer do one step, with its own loader, collation and optimiser; it works in a thread.

    Every step is on the same images, as often as there are calls. `close` ends it.
    """

    def __init__(self, network: nn.Module, given: Batch, device: torch.device, precision: torch.dtype, rate: float):
        self.turn, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.ended, self.fault, self.parameters = False, None, count_parameters(network)
        self.about = network, given, device, precision, rate
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()

    def __call__(self) -> None:
        self.turn.release()
        self.done.acquire()
        if self.fault is not None:
            raise self.fault

    def close(self) -> None:
        """Lets the Trainer come to its end."""
        self.ended = True
        self.turn.release()
        self.thread.join()

    def _train(self) -> None:
        try:
            self._steps()
        except BaseException as fault:  # whoever waits has to hear of it
            self.fault = fault
        self.done.release()

    def _steps(self) -> None:
        from transformers import Trainer, TrainerCallback, TrainingArguments
        from transformers.utils import logging

        network, given, device, precision, rate = self.about
        steps = self

        class Turns(TrainerCallback):
            """Waits before each step until somebody asks for it."""

            def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                steps.turn.acquire()
                if steps.ended:
                    raise _EndedError

            def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                steps.done.release()

        logging.set_verbosity_error()
        with tempfile.TemporaryDirectory(prefix="sightline-trainer-") as room:
            arguments = TrainingArguments(
                room,
                per_device_train_batch_size=len(given.index),
                max_steps=10**6,
                learning_rate=rate,
                lr_scheduler_type="constant",
                weight_decay=0.05,
                max_grad_norm=1.0,
                bf16=precision == torch.bfloat16,
                fp16=precision == torch.float16,
                use_cpu=device.type == "cpu",
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            )
            try:
                Trainer(network, arguments, train_dataset=_Images(given), callbacks=[Turns()]).train()
            except _EndedError:
                return


class _EndedError(Exception):
    """Nobody asks for another step."""


class _Images(torch.utils.data.IterableDataset):
    """The same images again and again, as transformers' networks name them."""

    def __init__(self, given: Batch):
        self.given = given

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            for pixels, label in zip(self.given.pixels, self.given.targets, strict=True):
                yield {"pixel_values": pixels, "labels": label}
