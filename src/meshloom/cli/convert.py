"""`meshloom convert`."""

from __future__ import annotations

from pathlib import Path

import click

from meshloom.chakra.file import write
from meshloom.chakra.formats import convert
from meshloom.chakra.text import read_workload, workload_trace
from meshloom.errors import UsageError
from meshloom.plan import Plan


@click.command()
@click.argument("source", metavar="A")
@click.argument("target", metavar="B")
@click.option("--plan", help="For a text workload: the ranks along tp and dp, such as tp2.dp4.")
@click.option("--passes", type=click.IntRange(1), default=1, show_default=True, help="For a text workload: steps.")
@click.option("--schema", type=click.Choice(["0.0.4", "1.0.0"]), help="The version of Chakra to name.  [default: A's]")
def command(source: str, target: str, plan: str | None, passes: int, schema: str | None) -> None:
    """Convert the trace A into B; each file's form follows from its name, and nothing is lost on the way.

    Names end in .et, .et.gz, .json (Chakra JSON), .node-link.json (NetworkX) or .graphml (Gephi, yEd, NetworkX).
    --schema changes the version that the file names: 1.0.0 differs from 0.0.4 in nothing else.
    Files of Chakra 0.0.1 to 0.0.3 and the JSON of Chakra's feeder are read too. A text workload of ASTRA-sim 1 (.txt)
    becomes a folder with the trace of each rank of --plan.

    \b
    Examples:
      meshloom convert rank0.et rank0.graphml
      meshloom convert resnet50.txt resnet50 --plan dp8
    """
    if source.endswith(".txt"):
        if plan is None:
            raise UsageError("convert: expected --plan with a text workload, such as --plan dp8")
        _workload(Path(source), Path(target), Plan.parse(plan), passes)
        return
    if plan is not None or passes != 1:
        raise UsageError(f"convert: --plan and --passes go with a text workload (.txt), got {source}")
    trace = convert(Path(source), Path(target), version=schema)
    click.echo(f"{target}: {len(trace.nodes):,} nodes")


def _workload(source: Path, target: Path, plan: Plan, passes: int) -> None:
    if plan.world_size != plan.tp * plan.dp:
        raise UsageError(f"convert: expected a plan of tp and dp for a text workload, got {plan}")
    workload = read_workload(source)
    for rank in range(plan.world_size):
        groups = {axis: plan.group(axis, rank) for axis in ("tp", "dp")}
        trace = workload_trace(workload, rank=rank, world_size=plan.world_size, groups=groups, num_passes=passes)
        write(trace, target / f"rank{rank}.et")
    click.echo(f"{target}: {plan.world_size} ranks, {len(trace.nodes):,} nodes each")
