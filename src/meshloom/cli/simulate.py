"""`meshloom simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from meshloom.chakra import timeline as timeline_file
from meshloom.chakra.file import read_all
from meshloom.chakra.timeline import Timeline
from meshloom.hardware.cluster import load_cluster, load_plain
from meshloom.simulate.engine import simulate
from meshloom.simulate.program import Durations


@click.command()
@click.argument("where", metavar="TRACE|DIR")
@click.option("--cluster", default="h100x8", show_default=True, help="A shipped cluster or a TOML file.")
@click.option("--hw-config", type=click.Path(dir_okay=False), help="A plain JSON of devices instead of --cluster.")
@click.option("--compute", type=click.Choice(["model", "measured"]), default="model", show_default=True,
              help="Where durations come from: the cluster's model, or the traces themselves.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(where: str, cluster: str, hw_config: str | None, compute: Any, as_json: bool) -> None:
    """Predict when traces would run on a cluster; writes timeline.json beside them.

    \b
    Example:
      meshloom simulate runs/gpt2-tiny.dp2.20261121-120000 --cluster h100x8
    """
    timeline, path = predict(where, cluster, hw_config=hw_config, durations=compute)
    result = {**shares(timeline), "timeline": str(path)}
    if as_json:
        click.echo(msgspec.json.encode(result).decode())
    else:
        click.echo(sentence(timeline))
        click.echo(f"timeline: {path}")


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
