"""Documents say what the code does: attributes, commands, examples."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from meshloom.chakra.trace import ATTRIBUTES
from meshloom.cli.__main__ import COMMANDS, cli
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


def _commands(path: Path) -> list[list[str]]:
    """The commands of ours in a document's fenced blocks, without what a shell does with them."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        match = re.match(
            r"^\s*(?:\$ )?(?:torchrun .*--no-python |srun |docker (?:compose )?run .*? )?meshloom (.*)", line
        )
        if match:
            words = shlex.split(match[1], comments=True)
            end = next((place for place, word in enumerate(words) if word in ("|", ">", ">>", "&", "&&", ";")), None)
            found.append(words[:end])
    return found


DOCUMENTS = [ROOT / "README.md", ROOT / "README.ko.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_of_a_document_is_one_that_the_command_line_takes(path: Path) -> None:
    """Commands, options and their values as they stand; that they do what is said is for the tests of each."""
    for words in _commands(path):
        command: click.Command = cli
        context = click.Context(cli)
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            name, *words = words
            found = command.get_command(context, name)
            assert found is not None, f"{path.name}: meshloom {name}"
            command = found
        if set(words) & {"--help", "-h", "--version"}:
            continue
        try:
            command.make_context(command.name, list(words))
        except click.ClickException as error:
            raise AssertionError(
                f"{path.name}: {command.name} {shlex.join(words)}: {error.format_message()}"
            ) from error


def test_documents_hold_commands() -> None:
    """Else the test above would say nothing."""
    assert sum(len(_commands(path)) for path in DOCUMENTS) > 60
