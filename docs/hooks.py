"""The site's own steps: the results of the benchmarks are a page of it, and links to them lead there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


def on_files(files: Files, config: Any) -> Files:
    """Add `benchmarks/RESULTS.md` as a page."""
    source = Path(config["config_file_path"]).parent / "benchmarks" / "RESULTS.md"
    files.append(File.generated(config, "results.md", content=source.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links that lead out of docs/, for readers of the repository, lead to the site's page."""
    return markdown.replace("](../benchmarks/RESULTS.md", "](results.md")
