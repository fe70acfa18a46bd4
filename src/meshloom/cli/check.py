"""`meshloom check`."""

from __future__ import annotations

import click
import msgspec

from meshloom.chakra.check import check
from meshloom.chakra.file import read_all


@click.command()
@click.argument("where", metavar="TRACE|DIR")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(where: str, as_json: bool) -> int:
    """Check one trace, or all ranks of a folder, for faults. Exit code 1 if there is one.

    \b
    Example:
      meshloom check runs/gpt2-tiny.dp2.20261121-120000
    """
    traces = read_all(where)
    findings = check(traces)
    if as_json:
        click.echo(msgspec.json.encode(findings).decode())
    else:
        for finding in findings:
            click.echo(str(finding))
        num_nodes = sum(len(trace.nodes) for trace in traces.values())
        num_comm = sum(node.is_comm for trace in traces.values() for node in trace.nodes)
        click.echo(
            f"{len(traces)} rank{'s' * (len(traces) > 1)}, {num_nodes:,} nodes, {num_comm:,} of them "
            f"communication: {len(findings) or 'no'} fault{'s' * (len(findings) != 1)}"
        )
    return 1 if any(finding.severity == "error" for finding in findings) else 0
