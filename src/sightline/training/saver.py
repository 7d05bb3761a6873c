"""Checkpoints written beside the training, which waits only while the tensors are copied."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from threading import Thread

from torch import Tensor

from sightline.errors import WorkError
from sightline.training.state import State, Store


class Saver:
    """Writes to a store in a thread of its own, one checkpoint at a time.

    The copy is bit-exact and lies in main memory, which holds the state twice while a checkpoint is being written.
    `first` is called before the writing, in the same thread.
    """

    def __init__(self, store: Store, first: Callable[[], None] = lambda: None):
        self.store, self.first = store, first
        self.thread: Thread | None = None
        self.fault: BaseException | None = None

    def start(self, state: State, tensors: Mapping[str, Tensor]) -> None:
        """Copies what is to be saved and returns while it is written; waits first where another one still is."""
        self.wait()
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        self.thread = Thread(target=self._write, args=(state.step, asdict(state), copies), name="saver", daemon=True)
        self.thread.start()

    def save(self, state: State, tensors: Mapping[str, Tensor]) -> None:
        """Does the same, and waits for it."""
        self.start(state, tensors)
        self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written. Raises WorkError where the last checkpoint could not be."""
        if self.thread is not None:
            self.thread.join()
        self.check()

    def check(self) -> None:
        """Raises WorkError where a checkpoint could not be written."""
        if self.thread is not None and not self.thread.is_alive():
            self.thread = None
        if self.fault is not None:
            fault, self.fault = self.fault, None
            if not isinstance(fault, WorkError):
                raise fault
            raise WorkError(
                f"the state of the run could not be saved: {fault}. Earlier checkpoints are intact: mend the disk, or "
                "free some space, and go on with --resume."
            ) from fault

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self.thread is not None and self.thread.is_alive()

    def _write(self, step: int, state: Mapping, copies: Mapping[str, Tensor]) -> None:
        try:
            self.first()
            self.store.write(step, state, copies)
        except BaseException as fault:  # it is raised where the training looks
            self.fault = fault
