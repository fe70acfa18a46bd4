"""The tutorial and the quick start do what they say: their commands run, in order, and leave what is promised."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
_BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)
_FOLDERS = {"tutorial.md": "tutorial", "index.md": "."}


def _blocks(page: str) -> list[tuple[str, str, str]]:
    """Kind, file name and text of each fenced block that names its kind."""
    return _BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))


def _commands(page: str) -> list[str]:
    return [line for kind, _, text in _blocks(page) if kind == "bash" for line in text.splitlines()]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the tutorial writes out."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "tutorial").mkdir()
    for kind, title, text in _blocks("tutorial.md"):
        name = text.splitlines()[0].removeprefix("# ") if kind == "python" else title
        if name:
            (folder / name).write_text(text, encoding="utf-8")
    return folder


def _run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program, *rest = shlex.split(command)
    module = {"meshloom": "meshloom.cli", "torchrun": "torch.distributed.run"}[program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", module, *rest]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize("command", [*_commands("tutorial.md"), *_commands("index.md")])
def test_command(command: str, desk: Path) -> None:
    result = _run(command, desk)
    assert result.returncode == 0, result.stdout + result.stderr


def test_what_the_tutorial_leaves(desk: Path) -> None:
    for name in ("old/rank0.et", "old/rank1.et", "dp2/trace/rank1.et", "again/rank1.et", "dp2/report.html"):
        assert (desk / "tutorial" / name).is_file(), name
    assert (desk / "tutorial" / "synth" / "rank7.et").is_file()
    lines = (desk / "tutorial" / "tp2" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [told["step"] for told in map(json.loads, lines) if "loss" in told]
    assert steps == [6, 7], "it went on after the first six"


def test_both_languages_have_the_same_commands() -> None:
    def without_remarks(page: str) -> list[tuple[str, str, str]]:
        return [(kind, title, re.sub(r" *# \(?.*", "", text)) for kind, title, text in _blocks(page)]

    assert without_remarks("tutorial.ko.md") == without_remarks("tutorial.md")
    assert len(_commands("tutorial.md")) > 15
