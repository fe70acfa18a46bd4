"""`meshloom calibrate`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click

from meshloom.chakra.file import read_all, whole_file
from meshloom.errors import RunFailed, UsageError
from meshloom.hardware.device import load_device
from meshloom.simulate.measured import device_from
from meshloom.simulate.recorded import Found, calibrate, device_toml

_LIMIT_S = 60.0  # two ranks that have not summed anything until then never will


@click.command()
@click.argument("where", metavar="[DIR]", required=False)
@click.option("--here", is_flag=True, help="Time products, copies, attention and all-reduces on this machine instead.")
@click.option("--device", help="With DIR: the data sheet to start from, a shipped device or a TOML file.  "
              "With --here: cpu or cuda.  [default: cuda if there is one]")  # fmt: skip
@click.option("--name", help="The name of the new device.  [default: the old one's, calibrated]")
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="The TOML file to write.")
def command(where: str | None, here: bool, device: str | None, name: str | None, out: str) -> None:
    """Write a device file whose speeds are those of recorded traces, or of kernels timed on this machine.

    \b
    Examples:
      meshloom calibrate runs/gpt2.dp8.20261121-120000 --device h100-sxm --out mine.toml
      meshloom calibrate --here --out mine.toml
    """
    if here == (where is not None):
        raise UsageError("calibrate: expected a folder of traces, or --here")
    if where is not None:
        if device is None:
            raise UsageError("--device: expected the data sheet to start from, such as h100-sxm")
        start = load_device(device)
        found = calibrate(read_all(where), start, name or f"{start.name}, calibrated")
    else:
        found = _here(device, name)
    with whole_file(Path(out)) as file:
        file.write(device_toml(found.device).encode())
    for note in found.notes:
        click.echo(note)
    click.echo(f"{out}: {found.device.name}")


def _here(device: str | None, name: str | None) -> Found:
    """The device of this machine. The ranks come first: a process that has used CUDA must not fork."""
    import psutil
    import torch

    from meshloom.capture.kernels import measure_kernels

    has_cuda = torch.cuda.device_count() > 0
    chosen = device or ("cuda" if has_cuda else "cpu")
    if chosen not in ("cpu", "cuda") or (chosen == "cuda" and not has_cuda):
        raise UsageError(f"--device {chosen}: expected cpu{' or cuda' if has_cuda else ', for no GPU is here'}")
    all_reduces = _all_reduces(chosen) if chosen == "cpu" or torch.cuda.device_count() > 1 else {}
    told = measure_kernels(chosen, int(psutil.virtual_memory().total))
    return device_from(
        name=name or told.name,
        dtype=told.dtype,
        memory_bytes=told.memory_bytes,
        num_multiprocessors=told.num_multiprocessors,
        products=[(each.shape, each.seconds) for each in told.products],
        copies=[(each.num_bytes, each.seconds) for each in told.copies],
        attentions=[(each.shape, each.seconds) for each in told.attentions],
        all_reduces=all_reduces,
    )


def _all_reduces(device: str) -> dict[int, float]:
    from meshloom.parallel.launch import run_ranks
    from meshloom.parallel.probe import RESULT, probe

    with tempfile.TemporaryDirectory() as folder:
        try:
            run_ranks(probe, folder, device, _LIMIT_S, num_ranks=2, log_dir=Path(folder) / "logs")
        except RunFailed as error:
            raise RunFailed(f"calibrate: two ranks could not sum anything: {error}; see `meshloom doctor`") from error
        told: dict[str, Any] = json.loads((Path(folder) / RESULT).read_text())
    return {int(size): float(seconds) for size, seconds in told["all_reduce_s"].items()}
