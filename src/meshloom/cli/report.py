"""`meshloom report`."""

from __future__ import annotations

import click

from meshloom.view.report import report


@click.command()
@click.argument("folder", metavar="DIR")
def command(folder: str) -> None:
    """Write report.html, one page without network about a run folder: loss, traces, timelines, faults.

    \b
    Example:
      meshloom report runs/gpt2-tiny.dp2.20261121-120000
    """
    click.echo(str(report(folder)))
