"""The notebooks run from beginning to end, in one process, on what is built in; each cell shows what it would show."""

import ast
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def cells(name: str, kind: str) -> list[str]:
    """The sources of a notebook's cells of one kind."""
    notebook = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def run(source: str, names: dict[str, Any], where: str) -> Any:
    """Runs a cell as a notebook does, and gives the value of its last line if that is an expression."""
    tree = ast.parse(source, where)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, where, "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), where, "eval"), names)


def shown(value: Any) -> str:
    """What a notebook would show of a value: its richest form."""
    for form in ("_repr_html_", "_repr_png_"):
        rich = getattr(value, form, None)
        if rich is not None and (drawn := rich()):
            return str(drawn)
    return repr(value)


def test_there_are_three():
    assert NOTEBOOKS == [
        "fine-tune-your-own-folder.ipynb",
        "reading-attention-honestly.ipynb",
        "vision-transformer-step-by-step.ipynb",
    ]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    names: dict[str, Any] = {"__name__": "__main__"}
    rich = 0
    for number, source in enumerate(cells(name, "code")):
        value = run(source, names, f"{name}, code cell {number + 1}")
        rich += value is not None and "data:image/png" in shown(value)
    assert rich, "a notebook that explains shows a picture"
    assert len(capsys.readouterr().out.splitlines()) > 5


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_committed_without_results_and_names_things_that_are_there(name):
    notebook = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    assert all(
        not cell["outputs"] and cell["execution_count"] is None for cell in notebook["cells"] if "outputs" in cell
    )
    text = "\n".join(cells(name, "markdown"))
    titles = {cells(other, "markdown")[0].splitlines()[0].removeprefix("# ") for other in NOTEBOOKS}
    for title in re.findall(r"\*(Reading [^*]+|The Vision Transformer, [^*]+|Fine-tuning [^*]+)\*", text):
        assert title in titles
    assert os.linesep == "\n" or "\r" not in text
