"""The table of `proofs/mutations.py` speaks of the code as it is; the run itself takes minutes and is no test."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_SPEC = importlib.util.spec_from_file_location("mutations", ROOT / "proofs/mutations.py")
mutations = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(mutations)
TABLE = mutations.table()


def test_there_are_many_guards():
    assert len(TABLE) >= 60


def test_each_guard_stands_once_in_its_file():
    for mutation in TABLE:
        assert mutation.applied(ROOT)


def test_the_tests_that_should_notice_exist():
    named = (ast.FunctionDef, ast.ClassDef)
    functions = {
        file: {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, named)}
        for file in (ROOT / "tests").glob("test_*.py")
    }
    for mutation in TABLE:
        for test in mutation.tests:
            file, *names = test.split("[")[0].split("::")
            assert not names or names[-1] in functions[ROOT / file], f"'{mutation.name}' names {test}"


def test_a_guard_that_is_not_there_is_an_error():
    gone = mutations.Mutation("gone", "errors.py", "no such text", "", ("tests/test_teeth.py",))
    with pytest.raises(ValueError, match=r"stands 0 times in errors\.py"):
        gone.applied(ROOT)
