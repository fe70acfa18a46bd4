"""`meshloom synth`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from meshloom.chakra.file import read, write
from meshloom.errors import FolderError
from meshloom.plan import Plan


@click.command()
@click.option(
    "--model",
    required=True,
    help="A preset (gpt2, bert-base-uncased, koen-sllm, llama-3-8b, …), a config.json, a folder, or a hub id.",
)
@click.option("--plan", required=True, help="How the work is cut, such as tp2.dp4.")
@click.option("--micro-batch", default=4, show_default=True, type=click.IntRange(1), help="Sequences a micro-batch.")
@click.option(
    "--gradient-accumulation", default=1, show_default=True, type=click.IntRange(1), help="Micro-batches a step."
)
@click.option(
    "--schedule",
    type=click.Choice(["gpipe", "1f1b", "interleaved", "zero-bubble"]),
    default="1f1b",
    show_default=True,
    help="With pp: the order of a rank's passes.",
)
@click.option("--virtual-stages", default=1, show_default=True, type=click.IntRange(1), help="With pp: stages a rank.")
@click.option("--seq-length", default=128, show_default=True, type=click.IntRange(2), help="Tokens a sequence.")
@click.option("--objective", type=click.Choice(["causal", "masked"]), help="  [default: what the model is for]")
@click.option("--out", required=True, help="The folder for rank<r>.et, new or empty.")
@click.option("--visualize-trace", is_flag=True, help="Draw rank 0: tensor_trace_graph.png and .json, and two more.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(as_json: bool, visualize_trace: bool, **options: Any) -> None:
    """Synthesise the traces of a training step on ranks that you do not have: no processes, no memory, no GPU.

    \b
    Example:
      meshloom synth --model gpt2 --plan tp2.dp4 --seq-length 1024 --out synth.gpt2
    """
    files, num_nodes = synth(**options)
    result: dict[str, Any] = {"folder": options["out"], "num_ranks": len(files), "nodes_per_rank": num_nodes}
    if visualize_trace:
        from meshloom.view.graph_files import visualize_trace as draw

        result["pictures"] = [str(path) for path in draw(read(files[0]), Path(options["out"]))]
    click.echo(
        json.dumps(result)
        if as_json
        else f"{len(files)} traces of {num_nodes:,} nodes each: {files[0]} … {files[-1].name}"
    )
    for path in () if as_json else result.get("pictures", ()):
        click.echo(path)


def synth(
    *,
    model: str,
    plan: str,
    micro_batch: int,
    gradient_accumulation: int,
    seq_length: int,
    objective: str | None,
    out: str | Path,
    schedule: Any = "1f1b",
    virtual_stages: int = 1,
) -> tuple[list[Path], int]:
    """Write the traces as the command does; returns the files and the number of nodes of each."""
    cut = replace(
        Plan.parse(plan), num_micro_batches=gradient_accumulation, schedule=schedule, virtual_stages=virtual_stages
    )
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FolderError(f"{folder}: expected a new or empty folder; choose another --out")

    from meshloom.model.config import load_config, objective_of
    from meshloom.synth.roles import synthesise

    config = load_config(model)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and seq_length > limit:
        raise click.UsageError(f"--seq-length {seq_length}: expected at most {limit}, the positions that the model has")
    chosen: Any = objective or objective_of(config)
    traces = synthesise(config, chosen, plan=cut, micro_batch=micro_batch, seq_length=seq_length, model_name=model)
    files = [write(trace, folder / f"rank{rank}.et") for rank, trace in traces.items()]
    return files, len(traces[0].nodes)
