"""`meshloom serve`."""

from __future__ import annotations

from pathlib import Path

import click

from meshloom.view.serve import make_server


@click.command()
@click.argument("folder", metavar="DIR", default="runs")
@click.option("--port", default=8642, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--open", "show", is_flag=True, help="Open it in the browser.")
def command(folder: str, port: int, show: bool) -> None:
    """Show all runs of a folder in the browser, on this machine only: reports, loss curves as they grow, comparison.

    Nothing is written, and nothing outside the folder is read.

    \b
    Example:
      meshloom serve runs --open
    """
    server = make_server(Path(folder), port)
    address = f"http://127.0.0.1:{server.server_address[1]}/"
    click.echo(f"{address} shows {folder}; end with Ctrl-C")
    if show:
        click.launch(address)
    try:
        server.serve_forever()
    finally:
        server.server_close()
