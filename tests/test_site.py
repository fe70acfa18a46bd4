"""The site builds without a warning, its reference names everything public, and links lead somewhere."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import meshloom

ROOT = Path(__file__).resolve().parents[1]


def _parts() -> list[str]:
    return re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)


def test_the_reference_names_everything_public() -> None:
    assert {f"{home}.{name}" for name, home in meshloom._HOME.items()} <= set(_parts())


@pytest.mark.parametrize("part", _parts())
def test_what_the_reference_names_has_a_docstring(part: str) -> None:
    try:
        found = importlib.import_module(part)
    except ImportError:
        home, _, name = part.rpartition(".")
        found = getattr(importlib.import_module(home), name)
    assert found.__doc__


def test_links_between_pages_lead_somewhere() -> None:
    """For readers of the repository, without the site."""
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "README.ko.md"]:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            assert target.startswith("https://") or (page.parent / target).is_file(), f"{page.name}: {target}"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("needs the docs extra: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    reference = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    assert all(f'id="{part}"' in reference for part in _parts())
    assert 'href="results.html"' in (tmp_path / "site" / "measuring.html").read_text(encoding="utf-8")
