"""Every layout of every kind: the other library's answers, its tensors to the bit, and nothing missing or left over.

python tests/test_parity.py        prints the table: kind × source × view, the error, and what sabotage did to it
"""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from parity import Case, Made, cases
from sightline.checkpoints.convert import convert
from sightline.checkpoints.files import read_tensors
from sightline.checkpoints.load import load_bundle
from sightline.checkpoints.scheme import Bundle
from sightline.errors import UserError
from sightline.layers.windows import APART, Windows
from sightline.registry import layouts, table

pytestmark = [  # what timm's own stretching of BEiT's tables says
    pytest.mark.filterwarnings("ignore:torch.searchsorted"),
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence"),
]

TOLERANCE = 1e-5
"""Of the largest logit."""

CASES = {f"{case.kind} {case.source} {case.view} {number}": case for number, case in enumerate(cases())}
SQUARE = {name: case for name, case in CASES.items() if case.view == "square"}
ONE_EACH = {case.layout: case for case in reversed(SQUARE.values())}
"""The first square case of each layout."""
FORMER = ("dino original", "mae original", "mae_with_decoder transformers", "torchvision_vit_old_names torchvision")
"""What is read and not written again: training checkpoints, and names that a library has given up."""


def apart(ours: Tensor, theirs: Tensor) -> float:
    """max|ours - theirs| in units of the largest of theirs."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def answer(bundle: Bundle, pixels: Tensor, beside: tuple[Tensor, ...] = ()) -> Tensor:
    with torch.no_grad():
        return plain(bundle.network(pixels, *beside))


def plain(output: Any) -> Tensor:
    """Of an output of several parts, the first."""
    return output[0] if isinstance(output, tuple) else output


def file_of(path: Path) -> Path:
    """The one file with weights that a case has written."""
    names = ("model.safetensors", "open_clip_model.safetensors")
    return path if path.is_file() else next(path / name for name in names if (path / name).exists())


def rewrite(path: Path, tensors: dict[str, Tensor]) -> None:
    """Other tensors in a file of the same kind."""
    if path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif path.suffix == ".safetensors":
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, {"format": "pt"})
    else:
        torch.save({name: tensor.clone() for name, tensor in tensors.items()}, path)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_answer_is_the_other_library_s(case: Case, tmp_path: Path) -> None:
    made = case.make(tmp_path)
    bundle = load_bundle(made.path, **made.options)
    assert apart(answer(bundle, made.pixels, made.beside), made.expected) <= TOLERANCE
    if case.view == "square":
        errors = sabotage(bundle, made)
        assert errors
        assert all(error > TOLERANCE for error in errors.values()), errors


@pytest.mark.parametrize("case", ONE_EACH.values(), ids=ONE_EACH)
def test_every_parameter_is_felt(case: Case, tmp_path: Path) -> None:
    made = case.make(tmp_path)
    bundle = load_bundle(made.path, **made.options)
    # How far the answers move, to first order, when a parameter moves by 0.1 in a random direction.
    answers = plain(bundle.network.requires_grad_()(made.pixels, *made.beside))
    (answers * torch.randn(answers.shape)).sum().backward()
    scale = TOLERANCE * float(made.expected.abs().max()) / 0.1
    named = bundle.network.named_parameters()
    unfelt = [name for name, p in named if p.grad is None or not float(p.grad.norm()) > scale]
    aside = ("mask_token", "attention.before.bias")  # no patch is hidden; what shifts all logits alike changes no map
    assert not [name for name in unfelt if not name.endswith(aside)]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if ONE_EACH[case.layout] is case else pytest.mark.slow) for case in SQUARE.values()],
    ids=SQUARE,
)
def test_there_and_back_to_the_bit(case: Case, tmp_path: Path) -> None:
    made = case.make(tmp_path)
    bundle = load_bundle(made.path, **made.options)
    source = file_of(made.path)
    out = tmp_path / "again" if made.path.is_dir() else tmp_path / f"again{_plain(source)}"
    report = convert(bundle, case.source if case.source == "open_clip" else case.layout.split("/")[0], out)
    assert report.parity is None or report.parity <= TOLERANCE
    again = load_bundle(out, **made.options).network.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in bundle.network.state_dict().items())
    if f"{case.kind} {case.source}" in FORMER:
        return
    before, after = read_tensors(source).tensors, read_tensors(file_of(out)).tensors
    dropped = set(bundle.coverage.dropped)
    left = {name.removeprefix(_common(before)): tensor for name, tensor in before.items() if name not in dropped}
    now = {name.removeprefix(_common(after)): tensor for name, tensor in after.items()}
    assert left.keys() <= now.keys()
    assert now.keys() - left.keys() <= {name.removeprefix(_common(before)) for name in dropped}
    assert all(torch.equal(left[name].float(), now[name].float()) for name in left)


def _plain(path: Path) -> str:
    return path.suffix if path.suffix in (".npz", ".safetensors") else ".pth"


def _common(names: Any) -> str:
    """What wrappers put before all names."""
    prefix = ""
    while outer := next((p for p in _WRAPPERS if all(n.startswith(prefix + p) for n in names)), None):
        prefix += outer
    return prefix


_WRAPPERS = ("module.", "params/", "opt/target/")


@pytest.mark.parametrize("case", ONE_EACH.values(), ids=ONE_EACH)
def test_every_misfit_is_refused_by_its_name(case: Case, tmp_path: Path) -> None:
    made = case.make(tmp_path)
    bundle = load_bundle(made.path, **made.options)
    if tmp_path not in made.path.parents and made.path != tmp_path:  # a golden stays as it is
        made = made._replace(path=Path(shutil.copy(made.path, tmp_path)))
    source = file_of(made.path)
    tensors = {name: tensor.clone() for name, tensor in read_tensors(source).tensors.items()}
    used = [name for name in tensors if name not in bundle.coverage.dropped and tensors[name].is_floating_point()]
    draw = np.random.default_rng(len(used))
    for damage in ("missing", "misshapen", "not a number"):
        victim = used[draw.integers(len(used))]
        hurt = tensors[victim].float()
        damages = {
            "missing": {name: tensor for name, tensor in tensors.items() if name != victim},
            "misshapen": {**tensors, victim: torch.cat([hurt.flatten(), hurt.flatten()[:1]])},
            "not a number": {**tensors, victim: torch.where(torch.ones_like(hurt).cumsum(-1) == 1, torch.nan, hurt)},
        }
        rewrite(source, damages[damage])
        with pytest.raises(UserError) as refusal:
            load_bundle(made.path, **made.options)
        assert _says(victim, str(refusal.value)), (damage, victim, str(refusal.value))
    rewrite(source, {**tensors, f"{used[0]}.stranger": torch.zeros(3)})
    with pytest.raises(UserError, match="stranger"):
        load_bundle(made.path, **made.options)


def _says(name: str, message: str) -> bool:
    """Whether a message names a tensor, or says that what decides the kind of network is gone."""
    current = name.removeprefix("backbone.").replace("mlp.linear_1", "mlp.0").replace("mlp.linear_2", "mlp.3")
    return name in message or current in message or "is of no known layout" in message


def sabotage(bundle: Bundle, made: Made) -> dict[str, float]:
    """The error after one thing was made otherwise than it should be."""
    found = {}
    pixels, expected, beside = made.pixels, made.expected, made.beside
    network = bundle.network
    if pixels.shape[2] == pixels.shape[3]:
        found["axes swapped"] = apart(answer(bundle, pixels.transpose(2, 3).contiguous(), beside), expected)
    weight = next(p for p in network.parameters() if p.ndim > 1 and p.shape[-1] == p.shape[-2] > 1)
    with swapped(weight):
        found["one weight"] = apart(answer(bundle, pixels, beside), expected)
    with flipped_mask() as masks:
        error = apart(answer(bundle, pixels, beside), expected)
    if masks:
        found["one mask"] = error
    for module in network.modules():
        if isinstance(getattr(module, "eps", None), float):
            before, module.eps = module.eps, module.eps + 1e-3
            found["one eps"] = max(found.get("one eps", 0.0), apart(answer(bundle, pixels, beside), expected))
            module.eps = before
    return found


@contextmanager
def swapped(weight: Tensor) -> Iterator[None]:
    """A weight with its last two axes exchanged."""
    weight.data = weight.data.mT.contiguous()
    yield
    weight.data = weight.data.mT.contiguous()


@contextmanager
def flipped_mask() -> Iterator[list[Tensor]]:
    """The first mask of windows that is asked for allows what it forbids, and forbids the rest; gives it."""
    plain, seen = Windows.mask, []

    def mask(self: Windows, device: torch.device) -> Tensor | None:
        right = plain(self, device)
        if right is None or seen:
            return right
        seen.append(right)
        return torch.where(right < 0, torch.zeros(()), APART)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Windows, "mask", mask)
        yield seen


def test_every_layout_has_its_cases() -> None:
    libraries = {layout for case in CASES.values() for layout in [case.layout]}
    elsewhere = ("detect", "segment")  # in the tests of those tasks, whose outputs are no logits for one class
    known = {
        key
        for name in table("checkpoints", "SCHEMES")
        if name != "sightline"
        for key, layout in layouts(name).items()
        if layout.task not in elsewhere
    }
    assert libraries == known


def main() -> int:
    """Prints the table."""
    bad = 0
    print(f"{'kind':<20} {'source':<13} {'view':<11} {'error':>8}   after sabotage")
    for case in sorted(CASES.values(), key=lambda case: (case.kind, case.source)):
        with tempfile.TemporaryDirectory() as folder:
            made = case.make(Path(folder))
            bundle = load_bundle(made.path, **made.options)
            error = apart(answer(bundle, made.pixels, made.beside), made.expected)
            harmed = sabotage(bundle, made) if case.view == "square" else {}
        shown = ", ".join(f"{what} {value:.0e}" for what, value in harmed.items())
        bad += not error <= TOLERANCE or any(not value > TOLERANCE for value in harmed.values())
        print(f"{case.kind:<20} {case.source:<13} {case.view:<11} {error:>8.1e}   {shown}", flush=True)
    print(f"{len(CASES)} cases, {bad} not as they should be")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
