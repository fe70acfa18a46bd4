"""`meshloom export`."""

from __future__ import annotations

from pathlib import Path

import click

from meshloom.chakra.file import read_all
from meshloom.errors import FolderError, UsageError
from meshloom.hardware.cluster import load_cluster
from meshloom.simulate.export import export_astra_sim

_OF_MODELS = ("onnx", "hugging-face")


@click.command()
@click.argument("where", metavar="DIR")
@click.option(
    "--to", type=click.Choice(["astra-sim", *_OF_MODELS]), required=True, help="A simulator, or a format of models."
)
@click.option("--cluster", default="h100x8", show_default=True, help="For astra-sim: a shipped cluster or a TOML file.")
@click.option("--quantize", type=click.Choice(["int8"]), help="For hugging-face: weights of 8 bits, by torchao.")
@click.option("--out", required=True, type=click.Path(file_okay=False), help="A new folder.")
def command(where: str, to: str, cluster: str, quantize: str | None, out: str) -> None:
    """Write a folder that others run: of traces for another simulator, with network, system, memory and groups, or of
    the model of a checkpoint or run for others to serve.

    \b
    Examples:
      meshloom export runs/gpt2-tiny.dp2.20261121-120000 --to astra-sim --cluster h100x8 --out astra
      meshloom export runs/gpt2-tiny.dp2.20261121-120000/checkpoints/checkpoint-500 --to onnx --out model.onnx
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FolderError(f"{out}: expected a new or empty folder; choose another")
    if quantize is not None and to != "hugging-face":
        raise UsageError(f"--quantize {quantize}: expected --to hugging-face, whose folders can hold such weights")
    if to in _OF_MODELS:
        click.echo(str(_export_model(where, to, quantize, folder)))
        return
    files = export_astra_sim(read_all(where), load_cluster(cluster), folder)
    click.echo(f"{out}: {len(files)} files for {to}")


def _export_model(where: str, to: str, quantize: str | None, out: Path) -> Path:
    from meshloom.cli.generate import checkpoint_of
    from meshloom.model import export

    folder = Path(checkpoint_of(where))
    if not (folder / "config.json").is_file():
        raise FolderError(f"{where}: expected a checkpoint, a run with one, or a folder with config.json and weights")
    if to == "onnx":
        return export.export_onnx(folder, out)
    return export.export_int8(folder, out) if quantize == "int8" else export.export_folder(folder, out)
