"""The gate on growth: sizes and names. Its numbers change only in a commit that says why."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "meshloom"
MODULES = sorted(path for path in SOURCE.rglob("*.py") if not path.name.endswith("_pb2.py"))

MAX_LINES = 500
MAX_FUNCTION_LINES = 60
BANNED = {"utils", "helpers", "common", "misc", "base", "core", "manager"}


def test_there_are_modules() -> None:
    assert len(MODULES) > 30


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_module(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert text.count("\n") <= MAX_LINES
    assert path.stem not in BANNED
    assert ast.get_docstring(tree), "a module's docstring says what it promises"
    tops = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    members = [node for top in tops if isinstance(top, ast.ClassDef) for node in top.body]
    for node in [*tops, *members]:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            told = ast.get_docstring(node) or node.name in ("forward", "backward")  # torch's own names
            assert told, f"{node.name} has no docstring"
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= MAX_FUNCTION_LINES, node.name


def test_only_launch_reads_the_environment() -> None:
    readers = {
        str(path.relative_to(SOURCE))
        for path in MODULES
        if any(word in path.read_text(encoding="utf-8") for word in ("os.environ[", "environ.get", "getenv"))
    }
    assert readers == {"parallel/launch.py"}
