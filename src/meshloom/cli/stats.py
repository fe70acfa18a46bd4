"""`meshloom stats`."""

from __future__ import annotations

import json
from typing import Any

import click

from meshloom.chakra.stacks import stacks
from meshloom.errors import UsageError
from meshloom.view.graph import si
from meshloom.view.path import critical_path, path_parts
from meshloom.view.scene import Scene, scene
from meshloom.view.stats import collectives, layers, ops, shares

_FILE_WIDTH = 120  # where no terminal tells how wide it is


@click.command()
@click.argument("where", metavar="TRACE|DIR")
@click.option("--times", type=click.Choice(["measured", "predicted"]), help="  [default: measured, else predicted]")
@click.option("--top", default=15, show_default=True, type=click.IntRange(1), help="Rows of each table.")
@click.option("--stacks", "as_stacks", is_flag=True, help="List phase > module > op > kernel of each rank instead.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(where: str, times: Any, top: int, as_stacks: bool, as_json: bool) -> None:
    """Say where a step's time went: top ops, layers, collectives, exposed communication, idle, the critical path.

    \b
    Example:
      meshloom stats runs/gpt2-tiny.dp2.20261121-120000
    """
    shown = scene(where)
    if times is not None and times not in shown.sources:
        raise UsageError(f"--times {times}: expected {' or '.join(shown.sources) or 'a trace with times'}")
    if as_stacks:
        for trace in shown.traces.values():
            click.echo(stacks(trace))
        return
    told = facts(shown, times)
    if as_json:
        click.echo(json.dumps(told))
    else:
        _print(told, top)


def facts(shown: Scene, times: Any = None) -> dict[str, Any]:
    """All tables as plain data."""
    events = shown.events(times)
    whole, rows, gaps = shares(events)
    path = critical_path(shown, events)
    return {
        "name": shown.name,
        "times": times or next(iter(shown.sources), None),
        "num_ranks": shown.num_ranks,
        "step_ns": whole,
        "ranks": [row._asdict() for row in rows],
        "gaps": [gap._asdict() for gap in gaps],
        "ops": [row._asdict() for row in ops(events)],
        "layers": [row._asdict() for row in layers(events)],
        "collectives": [row._asdict() for row in collectives(events)],
        "critical_path": {"num_events": len(path), **{f"{name}_ns": value for name, value in path_parts(path).items()}},
        "faults": len(shown.findings),
    }


def _print(told: dict[str, Any], top: int) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _FILE_WIDTH)
    head = f"{told['name']}: {told['num_ranks']} ranks"
    if told["step_ns"]:
        path = told["critical_path"]
        head += f", step {told['step_ns'] / 1e6:,.3f} ms {told['times']}; critical path "
        head += ", ".join(
            f"{name} {path[f'{name}_ns'] / 1e6:,.3f} ms" for name in ("compute", "communication", "waiting")
        )
    console.print(escape(head), highlight=False)
    if told["faults"]:
        console.print(f"check finds {told['faults']:,} faults", style="bold red")
    whole, parts = max(1, told["step_ns"]), ("compute_ns", "exposed_ns", "idle_ns")
    if told["step_ns"]:
        _table(console, "ranks", ("rank", "compute", "exposed communication", "idle", "gaps"), [
            (row["rank"], *(f"{row[part] / whole:.1%}" for part in parts), row["num_gaps"])
            for row in told["ranks"][:top]
        ])  # fmt: skip
        _table(console, "longest gaps", ("rank", "ms", "at ms", "before"), [
            (row["rank"], f"{row['duration_ns'] / 1e6:.3f}", f"{row['start_ns'] / 1e6:.3f}", row["before"] or "the end")
            for row in told["gaps"][: min(top, 5)]
        ])  # fmt: skip
    for name in ("ops", "layers"):
        total = max(1, sum(row["time_ns"] for row in told[name]))
        _table(console, name, ("name", "phase", "count", "ms", "share", "FLOP", "bytes"), [
            (row["name"], row["phase"], f"{row['num_events']:,}", f"{row['time_ns'] / 1e6:,.3f}",
             f"{row['time_ns'] / total:.1%}", si(row["flops"], "") if row["flops"] else "",
             si(row["num_bytes"], "B") if row["num_bytes"] else "")
            for row in told[name][:top]
        ])  # fmt: skip
    _table(console, "collectives and messages", ("kind", "axis", "ranks", "size", "count", "ms", "fastest ms", "bus"), [
        (row["kind"], row["axis"], row["group_size"], si(row["num_bytes"], "B"), f"{row['num_events']:,}",
         f"{row['time_ns'] / 1e6:,.3f}", f"{row['best_ns'] / 1e6:.3f}",
         si(row["bus_bytes_per_second"], "B/s") if row["best_ns"] else "")
        for row in told["collectives"][:top]
    ])  # fmt: skip


def _table(console: Any, title: str, head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    if not rows:
        return
    told = [place for place in range(len(head)) if any(row[place] != "" for row in rows)]
    head, rows = tuple(head[place] for place in told), [tuple(row[place] for place in told) for row in rows]
    table = Table(title=title, title_justify="left")
    for place, name in enumerate(head):
        first = next(row[place] for row in rows if row[place] != "")
        text = isinstance(first, str) and not first[:1].isdigit()
        table.add_column(name, justify="left" if text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row))
    console.print(table)
