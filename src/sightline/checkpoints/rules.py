"""A layout's table at work: the tensors of a checkpoint to our parameters, and back, with nothing left over."""

import ctypes
import mmap
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sightline.errors import UserError, printable
from sightline.layout import Rule


@dataclass(frozen=True)
class Found:
    """The tensors of a checkpoint under the names that a scheme's rules use.

    `where` is the file in messages. On disk each name has `prefix` before it, unless it begins with one of `outside`,
    and those in `disk` are called yet otherwise. `dropped` names, as on disk, what was left out knowingly. `mapped`
    says that tensors which own no memory lie in a mapped file that nobody has written to.
    """

    where: str
    tensors: Mapping[str, Tensor]
    prefix: str = ""
    disk: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    mapped: bool = False

    def on_disk(self, name: str) -> str:
        """A tensor as it is called on disk."""
        return self.disk.get(name, name if name.startswith(self.outside) else self.prefix + name)

    def named(self, name: str) -> str:
        """The same in quotes, for messages."""
        return f"'{printable(self.on_disk(name))}'"


def load(
    rules: Sequence[Rule], found: Found, shapes: Mapping[str, torch.Size], *, consume: bool = False
) -> dict[str, Tensor]:
    """Our parameters, float32, from the tensors of a checkpoint.

    `shapes` has an entry for every parameter of ours. With `consume` the memory of a tensor that became another is
    given back at once, so that no more than one of the two is held: only its shape is left. Raises UserError that
    names, as on disk, every tensor that is missing, superfluous, misshapen, or holds anything but finite
    floating-point numbers.
    """
    _assert_complete(rules, shapes)
    expected = {name: shape for rule in rules for name, shape in _on_disk(rule, shapes)}
    _refuse_misfits(found, expected)
    state: dict[str, Tensor] = {}
    reserve = _Reserve(found.tensors.values(), found.mapped)
    for rule in rules:
        may_be_zero = any(map(_AT_ZERO.search, rule.ours))
        given = [found.tensors[name] for name in rule.theirs]
        theirs = [as_float(found.tensors[n], found.named(n), found.where, may_be_zero) for n in rule.theirs]
        ours = [tensor.contiguous() for tensor in rule.load(*theirs)]
        state.update(zip(rule.ours, ours, strict=True))
        del theirs
        if consume:
            reserve.give_back(given, ours)
    return state


class _Reserve:
    """The memory of a checkpoint's tensors, to be given back when they have become ours."""

    def __init__(self, tensors: Iterable[Tensor], mapped: bool):
        self.mapped = mapped
        self.used = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors)
        self.kept: set[int] = set()

    def give_back(self, given: Iterable[Tensor], ours: Iterable[Tensor]) -> None:
        """Frees what nobody uses any more: storages of their own, and the pages of mapped files."""
        same = {tensor.untyped_storage().data_ptr() for tensor in ours}
        self.kept |= same
        for tensor in given:
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
            self.used[place] -= 1
            if storage.resizable() and not self.used[place] and place not in self.kept:
                storage.resize_(0)
            elif self.mapped and not storage.resizable() and place not in same and tensor.is_contiguous():
                _forget(tensor)


def _forget(tensor: Tensor) -> None:
    """Lets go of the pages within a tensor that lies in a mapped file; where they are needed, the file has them."""
    if hasattr(mmap, "MADV_DONTNEED"):
        begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - begin
        if length > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def save(rules: Sequence[Rule], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors from our parameters; every one of ours is written, each of theirs once."""
    _assert_complete(rules, state)
    return {
        name: tensor.contiguous() if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone().contiguous()
        for rule in rules
        for name, tensor in zip(rule.theirs, rule.save(*(state[name].detach() for name in rule.ours)), strict=True)
    }


def as_float(tensor: Tensor, named: str, where: str, may_be_zero: bool = True) -> Tensor:
    """The tensor in float32. Raises UserError where it is not of floating point, not finite, or zero throughout."""
    if not tensor.dtype.is_floating_point:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{where}: tensor {named} holds {kind}, not floating-point numbers")
    given, tensor = tensor, tensor.to(torch.float32)
    # One pass without a copy: a sum is finite only where every term is, and not zero where not every term is; the
    # second test settles an overflow or terms that cancel.
    total = tensor.sum()
    if not total.isfinite() and not tensor.isfinite().all():
        kind = "NaN" if tensor.isnan().any() else "an infinite number"
        if given.to(torch.float64).isfinite().all():
            kind = f"numbers too large for float32 (it is {str(given.dtype).removeprefix('torch.')})"
        raise UserError(f"{where}: tensor {named} holds {kind}; the file is damaged or its training diverged")
    if not may_be_zero and total == 0 and tensor.numel() and not tensor.any():
        raise UserError(f"{where}: tensor {named} is zero throughout; nothing would pass it, so the file is damaged")
    return tensor


_AT_ZERO = re.compile(
    r"^head\.(anchor|box\.fc3|(distillation_)?classifier)\.|\.(attention\.out|mlp\.fc2|last_norm)\.weight$|(?<!\.weight)$"
)
"""What is rightly zero: new classifiers, boxes that begin where their tokens stand, residual branches that start
closed, and whatever is no weight (biases …)."""


def _on_disk(rule: Rule, shapes: Mapping[str, torch.Size]) -> Iterable[tuple[str, torch.Size]]:
    ours = (torch.empty(shapes[name], device="meta") for name in rule.ours)
    return zip(rule.theirs, (tensor.shape for tensor in rule.save(*ours)), strict=True)


def _refuse_misfits(found: Found, expected: Mapping[str, torch.Size]) -> None:
    missing = [f"{found.named(name)} is missing" for name in expected if name not in found.tensors]
    spare = [f"{found.named(name)} belongs to nothing" for name in found.tensors if name not in expected]
    misshapen = [
        f"{found.named(name)} has shape {list(found.tensors[name].shape)} where {list(shape)} is needed"
        + " (it looks transposed)" * (found.tensors[name].shape == shape[::-1])
        for name, shape in expected.items()
        if name in found.tensors and found.tensors[name].shape != shape
    ]
    faults = misshapen + missing + spare
    if faults:
        rest = f" … and {len(faults) - 12} more" if len(faults) > 12 else ""
        shown = "; ".join(_mixed([misshapen, missing, spare], 12))
        raise UserError(f"{found.where} does not fit this architecture: {shown}{rest}")


def _mixed(kinds: Sequence[list[str]], limit: int) -> list[str]:
    """At most `limit` lines, some of each kind, so that a thousand of one do not hide another."""
    each = limit // max(sum(bool(kind) for kind in kinds), 1)
    return [line for kind in kinds for line in kind[:each]]


def _assert_complete(rules: Sequence[Rule], ours: Iterable[str]) -> None:
    uses = Counter(name for rule in rules for name in rule.ours)
    theirs = Counter(name for rule in rules for name in rule.theirs)
    assert uses == Counter(list(ours)), f"rules and parameters differ: {sorted(uses.keys() ^ set(ours))}"
    assert max(theirs.values(), default=1) == 1, "a tensor on disk is written twice"
