"""`meshloom capture`."""

from __future__ import annotations

from pathlib import Path

import click

from meshloom.capture.convert import convert_rank
from meshloom.errors import TraceError


@click.command()
@click.argument("folder", metavar="DIR")
def command(folder: str) -> None:
    """Make rank<r>.et again from the host, device and notes files that a recorded step left in DIR.

    \b
    Example:
      meshloom capture runs/gpt2-tiny.dp2.20261121-120000/trace
    """
    where = Path(folder)
    hosts = sorted(where.glob("rank*.host.json")) or sorted((where / "trace").glob("rank*.host.json"))
    if not hosts:
        raise TraceError(f"{where}: expected a folder with rank<r>.host.json, as `meshloom train --trace` leaves it")
    for host in hosts:
        name = host.name.removesuffix(".host.json")
        out = convert_rank(
            host,
            host.with_name(f"{name}.device.json"),
            host.with_name(f"{name}.notes.json"),
            host.with_name(f"{name}.et"),
        )
        click.echo(str(out))
