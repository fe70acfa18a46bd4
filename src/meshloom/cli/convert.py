"""`meshloom convert`."""

from __future__ import annotations

from pathlib import Path

import click

from meshloom.chakra.formats import convert


@click.command()
@click.argument("source", metavar="A")
@click.argument("target", metavar="B")
def command(source: str, target: str) -> None:
    """Convert the trace A into B; each file's form follows from its name, and nothing is lost on the way.

    Names end in .et, .et.gz, .json (Chakra JSON), .node-link.json (NetworkX) or .graphml (Gephi, yEd, NetworkX).

    \b
    Example:
      meshloom convert rank0.et rank0.graphml
    """
    trace = convert(Path(source), Path(target))
    click.echo(f"{target}: {len(trace.nodes):,} nodes")
