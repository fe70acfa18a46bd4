"""`meshloom graph`."""

from __future__ import annotations

from pathlib import Path

import click

from meshloom.chakra.file import read_all, whole_file
from meshloom.chakra.trace import Trace
from meshloom.view.graph import draw, module_graph


@click.command()
@click.argument("where", metavar="TRACE|DIR")
@click.option("--rank", default=0, show_default=True, type=click.IntRange(0), help="Which rank of a folder.")
@click.option("--depth", default=3, show_default=True, type=click.IntRange(1), help="Parts of a module's path.")
@click.option("--out", default="graph.svg", show_default=True, help="The picture.")
def command(where: str, rank: int, depth: int, out: str) -> None:
    """Draw a step as a graph of its modules: forward down, backward up, communication red.

    \b
    Example:
      meshloom graph runs/gpt2-tiny.dp2.20261121-120000 --out graph.svg
    """
    traces = read_all(where)
    if rank not in traces:
        raise click.UsageError(f"--rank {rank}: expected one of {', '.join(map(str, traces))}")
    click.echo(str(draw_to(traces[rank], Path(out), depth=depth)))


def draw_to(trace: Trace, path: Path, *, depth: int = 3) -> Path:
    """Draw the trace into the SVG file `path` and return it."""
    title = f"{trace.get('model', 'one step')}, plan {trace.get('plan', 'unknown')}, rank {trace.rank}"
    with whole_file(path) as file:
        file.write(draw(module_graph(trace, depth=depth), title=title).encode())
    return path
