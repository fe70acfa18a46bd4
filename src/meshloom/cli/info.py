"""`meshloom info`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import click
import msgspec

from meshloom.chakra.file import read_all
from meshloom.chakra.trace import Trace
from meshloom.view.graph import summary


@click.command()
@click.argument("where", metavar="TRACE|DIR")
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
def command(where: str, as_json: bool) -> None:
    """Say what a trace holds: nodes, FLOPs, bytes, phases, communication.

    \b
    Example:
      meshloom info runs/gpt2-tiny.dp2.20261121-120000/trace/rank0.et
    """
    facts = {rank: _facts(trace) for rank, trace in read_all(where).items()}
    if as_json:
        click.echo(msgspec.json.encode(facts).decode())
        return
    for rank, told in facts.items():
        click.echo(
            f"rank {rank}: " + ", ".join(f"{name} {value}" for name, value in told["file"].items() if name != "rank")
        )
        click.echo(f"  {told['num_nodes']:,} nodes, {told['flops']:,} FLOP, {told['bytes']:,} bytes moved")
        click.echo("  ops by phase: " + ", ".join(f"{phase} {count:,}" for phase, count in told["phases"].items()))
        for name, row in told["communication"].items():
            click.echo(f"  {name}: {row['count']:,} × {row['bytes'] // row['count']:,} bytes on average")


def _facts(trace: Trace) -> dict[str, Any]:
    work = [node for node in trace.nodes if not node.is_comm and node.get("op_class") != "host"]
    return {
        "file": {name: trace.get(name) for name in trace.attrs},
        "num_nodes": len(trace.nodes),
        "flops": sum(int(node.get("num_ops", 0)) for node in work),
        "bytes": sum(int(node.get("tensor_size", 0)) for node in work),
        "phases": dict(Counter(node.get("phase") or "other" for node in work)),
        "communication": summary(trace),
    }
