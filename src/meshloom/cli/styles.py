"""The option `--styles` of what cuts models: a plan written by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def styles_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option to a command."""
    return click.option(
        "--styles",
        type=click.Path(exists=True, dir_okay=False),
        help="A TOML table [styles] of module = column, row, vocabulary or whole: overrules what is found.",
    )(command)


def take_styles(path: str | None) -> dict[str, str]:
    """The plan written by hand, empty without one; raises PlanError if the file is no such plan."""
    if path is None:
        return {}
    from meshloom.parallel.written import read_styles

    return read_styles(Path(path))
