"""`meshloom simulate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import msgspec

from meshloom.chakra import timeline as timeline_file
from meshloom.chakra.file import read_all
from meshloom.chakra.timeline import Timeline
from meshloom.cli.estimate import estimate, lines_of, shape_of_config
from meshloom.errors import UsageError
from meshloom.hardware.cluster import Cluster, load_cluster, load_plain
from meshloom.plan import Plan
from meshloom.simulate.engine import simulate
from meshloom.simulate.program import Durations


@click.command()
@click.argument("where", metavar="[TRACE|DIR]", required=False)
@click.option("--model", help="A preset, a config.json, a folder or a hub id in the place of traces: in closed form.")
@click.option("--plan", help="With --model: how the work is cut.  [default: dp1]")
@click.option("--micro-batch", type=click.IntRange(1), help="With --model: sequences a micro-batch.  [default: 1]")
@click.option("--gradient-accumulation", type=click.IntRange(1), help="With --model: micro-batches.  [default: 1]")
@click.option("--seq-length", type=click.IntRange(1), help="With --model.  [default: what the model allows, ≤ 8192]")
@click.option("--cluster", default="h100x8", show_default=True, help="A shipped cluster or a TOML file.")
@click.option("--hw-config", type=click.Path(dir_okay=False), help="A plain JSON of devices instead of --cluster.")
@click.option("--compute", type=click.Choice(["model", "measured"]), default="model", show_default=True,
              help="Where durations come from: the cluster's model, or the traces themselves.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    where: str | None, cluster: str, hw_config: str | None, compute: Any, as_json: bool, model: str | None,
    **sizes: Any,
) -> None:  # fmt: skip
    """Predict when traces would run on a cluster; writes timeline.json beside them. Or how long a model's step takes.

    \b
    Examples:
      meshloom simulate runs/gpt2-tiny.dp2.20261121-120000 --cluster h100x8
      meshloom simulate --model gpt3-175b --plan tp8.pp8.dp2 --gradient-accumulation 64 --cluster a100x1024
    """
    if (where is None) == (model is None):
        raise UsageError("simulate: expected a trace, a folder of them, or --model")
    if model is not None:
        _of_model(model, load_plain(hw_config) if hw_config else load_cluster(cluster), as_json=as_json, **sizes)
        return
    given = [f"--{name.replace('_', '-')}" for name, value in sizes.items() if value is not None]
    if given:
        raise UsageError(f"{given[0]}: expected --model with it; traces have sizes of their own")
    timeline, path = predict(str(where), cluster, hw_config=hw_config, durations=compute)
    result = {**shares(timeline), "timeline": str(path)}
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
    else:
        click.echo(sentence(timeline))
        click.echo(f"timeline: {path}")


def _of_model(
    model: str, on: Cluster, *, as_json: bool, plan: str | None, micro_batch: int | None,
    gradient_accumulation: int | None, seq_length: int | None,
) -> None:  # fmt: skip
    from meshloom.model.config import load_config

    config = load_config(model)
    _, longest = shape_of_config(config, model)
    cut = replace(Plan.parse(plan or "dp1"), num_micro_batches=gradient_accumulation or 1)
    told = estimate(
        config, model, cut, on, batch_size=micro_batch or 1, seq_length=seq_length or min(longest, 8192),
        precision="bf16", stack="megatron-core",
    )  # fmt: skip
    if as_json:
        click.echo(msgspec.json.encode({"model": model, "plan": str(cut), **told}).decode())
        return
    click.echo(f"{model}, plan {cut} on {cut.world_size} ranks, as {told['stack']} would run it")
    for line in lines_of(told):
        click.echo(line)


def predict(
    where: str | Path, cluster: str, *, hw_config: str | None = None, durations: Durations = "model"
) -> tuple[Timeline, Path]:
    """The predicted timeline of the traces at `where`, and the file beside them into which it was written."""
    where = Path(where)
    on = load_plain(hw_config) if hw_config else load_cluster(cluster)
    timeline = simulate(read_all(where), on, durations=durations)
    folder = where if where.is_dir() else where.parent
    return timeline, timeline_file.write(timeline, folder / "timeline.json")


def shares(timeline: Timeline) -> dict[str, Any]:
    """Step time, and the mean shares over all ranks."""
    ranks = timeline.shares()
    whole = max(1, timeline.makespan_ns * len(ranks))
    return {
        "cluster": timeline.cluster,
        "world_size": timeline.world_size,
        "step_time_ns": timeline.makespan_ns,
        "compute_share": sum(rank.compute_ns for rank in ranks) / whole,
        "exposed_communication_share": sum(rank.exposed_communication_ns for rank in ranks) / whole,
        "idle_share": sum(rank.idle_ns for rank in ranks) / whole,
        "communication_share": sum(rank.communication_ns for rank in ranks) / whole,
    }


def sentence(timeline: Timeline) -> str:
    """Step time and shares in one line."""
    told = shares(timeline)
    return (
        f"predicted on {told['cluster']}: step {told['step_time_ns'] / 1e6:.3f} ms on {told['world_size']} "
        f"rank{'s' * (told['world_size'] > 1)}; compute {told['compute_share']:.1%}, exposed communication "
        f"{told['exposed_communication_share']:.1%}, idle {told['idle_share']:.1%}"
    )
