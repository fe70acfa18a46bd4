"""`meshloom report`."""

from __future__ import annotations

import click

from meshloom.view.report import report


@click.command()
@click.argument("folder", metavar="DIR|TRACE")
@click.option("--out", help="The page.  [default: report.html in the folder]")
@click.option("--cluster", help="Whose peaks and memory to draw.  [default: what it was predicted on]")
@click.option("--open", "show", is_flag=True, help="Open it in the browser.")
def command(folder: str, out: str | None, cluster: str | None, show: bool) -> None:
    """Write one HTML page, without network, about a run or a trace: timeline, tables, communication, memory, roofline,
    critical path, measured beside predicted, faults.

    \b
    Example:
      meshloom report runs/gpt2-tiny.dp2.20261121-120000 --open
    """
    path = report(folder, out=out, cluster=cluster)
    click.echo(str(path))
    if show:
        click.launch(str(path))
