"""`meshloom diff`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from meshloom.view.diff import diff
from meshloom.view.report import diff_page
from meshloom.view.scene import scene

_STYLES = {"added": "green", "removed": "red", "slower": "yellow", "faster": "cyan", "changed": "magenta"}
_FILE_WIDTH = 120  # where no terminal tells how wide it is


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="[B]", required=False)
@click.option("--top", default=20, show_default=True, type=click.IntRange(1), help="Rows of each table.")
@click.option("--html", type=click.Path(dir_okay=False), help="Write a page of it, too.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(a: str, b: str | None, top: int, html: str | None, as_json: bool) -> None:
    """Compare two traces or folders; of A alone, what was measured with what was predicted.

    Counts and times are those of a rank, on average. Slower and faster mean by more than 5 %.

    \b
    Examples:
      meshloom diff runs/before runs/after
      meshloom diff runs/gpt2-tiny.dp2.20261121-120000 --html diff.html
    """
    told = diff(scene(a), scene(b) if b is not None else None)
    if html is not None:
        diff_page(told, Path(html))
    if as_json:
        click.echo(json.dumps(told))
    else:
        _print(told, top)
        if html is not None:
            click.echo(html)


def _print(told: dict[str, Any], top: int) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _FILE_WIDTH)
    for side in ("a", "b"):
        facts = told[side]
        step = f", step {facts['step_ns'] / 1e6:,.3f} ms {facts['times']}" if facts.get("step_ns") else ""
        ranks = f"{facts['num_ranks']} rank{'s' * (facts['num_ranks'] != 1)}"
        console.print(escape(f"{side.upper()}: {facts['name']}, {ranks}{step}"), highlight=False)
    for name in ("ops", "collectives"):
        rows = [row for row in told[name] if row["change"] != "same"]
        same = len(told[name]) - len(rows)
        table = Table(title=f"{name}: {len(rows)} differ, {same} the same", title_justify="left")
        for head in ("", "name", "module" if name == "ops" else "axis", "phase"):
            table.add_column(head, overflow="fold")
        for head in ("A ×", "B ×", "A ms", "B ms", "B − A ms"):
            table.add_column(head, justify="right")
        for row in rows[:top]:
            times = (row["time_a_ns"], row["time_b_ns"], row["time_b_ns"] - row["time_a_ns"])
            words = (row["change"], row["name"], row["module"], row["phase"])
            numbers = (f"{row['count_a']:g}", f"{row['count_b']:g}", *(f"{time / 1e6:,.3f}" for time in times))
            table.add_row(*map(escape, words), *numbers, style=_STYLES.get(row["change"]))
        if rows:
            console.print(table)
        else:
            console.print(f"{name}: all {same} the same")
        if len(rows) > top:
            console.print(f"… and {len(rows) - top} more; --top {len(rows)} or --json shows them")
