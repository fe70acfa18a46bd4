"""`meshloom export`."""

from __future__ import annotations

from pathlib import Path

import click

from meshloom.chakra.file import read_all
from meshloom.errors import FolderError
from meshloom.hardware.cluster import load_cluster
from meshloom.simulate.export import export_astra_sim


@click.command()
@click.argument("where", metavar="DIR")
@click.option("--to", type=click.Choice(["astra-sim"]), required=True, help="For which simulator.")
@click.option("--cluster", default="h100x8", show_default=True, help="A shipped cluster or a TOML file.")
@click.option("--out", required=True, type=click.Path(file_okay=False), help="A new folder.")
def command(where: str, to: str, cluster: str, out: str) -> None:
    """Write a folder that another simulator runs: traces, network, system, memory, groups.

    \b
    Example:
      meshloom export runs/gpt2-tiny.dp2.20261121-120000 --to astra-sim --cluster h100x8 --out astra
    """
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise FolderError(f"{out}: expected a new or empty folder; choose another")
    files = export_astra_sim(read_all(where), load_cluster(cluster), folder)
    click.echo(f"{out}: {len(files)} files for {to}")
