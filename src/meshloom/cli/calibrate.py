"""`meshloom calibrate`."""

from __future__ import annotations

from pathlib import Path

import click

from meshloom.chakra.file import read_all, whole_file
from meshloom.hardware.device import load_device
from meshloom.simulate.recorded import calibrate, device_toml


@click.command()
@click.argument("where", metavar="DIR")
@click.option("--device", required=True, help="The data sheet to start from: a shipped device or a TOML file.")
@click.option("--name", help="The name of the new device.  [default: the old one's, calibrated]")
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="The TOML file to write.")
def command(where: str, device: str, name: str | None, out: str) -> None:
    """Write a device file whose speeds are those of recorded traces.

    \b
    Example:
      meshloom calibrate runs/gpt2.dp8.20261121-120000 --device h100-sxm --out mine.toml
    """
    start = load_device(device)
    found = calibrate(read_all(where), start, name or f"{start.name}, calibrated")
    with whole_file(Path(out)) as file:
        file.write(device_toml(found.device).encode())
    for note in found.notes:
        click.echo(note)
    click.echo(f"{out}: {found.device.name}")
