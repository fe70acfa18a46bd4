"""Documents say what the code does: attributes, commands, examples."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from meshloom.chakra.trace import ATTRIBUTES
from meshloom.cli.__main__ import COMMANDS
from meshloom.errors import MeshloomError

ROOT = Path(__file__).resolve().parents[1]


def test_every_attribute_is_documented_as_it_is_written() -> None:
    text = (ROOT / "docs" / "trace-format.md").read_text(encoding="utf-8")
    told = {
        match[1]: (match[2], match[3]) for match in re.finditer(r"^\| `(\w+)` \| ([\w ]+) \| ([^|]*) \|", text, re.M)
    }
    want = {
        name: (f"list of {known.kind}" if known.many else known.kind, known.unit) for name, known in ATTRIBUTES.items()
    }
    assert {name: (kind, unit.strip()) for name, (kind, unit) in told.items()} == want


@pytest.mark.parametrize("name", ["README.md", "README.ko.md"])
def test_readme_lists_every_command(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "make demo" in text
    assert "make test" in text
    assert set(re.findall(r"^\| `meshloom ([\w-]+)", text, re.M)) == set(COMMANDS)


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_run(script: Path) -> None:
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_the_error_tree_on_top_of_errors_py_is_whole() -> None:
    text = (ROOT / "src" / "meshloom" / "errors.py").read_text(encoding="utf-8")
    drawn = set(re.findall(r"[├└]── (\w+)", text))
    assert drawn == {kind.__name__ for kind in MeshloomError.__subclasses__()}
