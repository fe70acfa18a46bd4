"""`meshloom check`."""

from __future__ import annotations

from collections import Counter

import click
import msgspec

from meshloom.chakra.check import check
from meshloom.chakra.formats import read_any

_SHOWN = 50  # findings printed one by one


@click.command()
@click.argument("where", metavar="TRACE|DIR")
@click.option("--strict", is_flag=True, help="Exit with 1 for warnings too.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(where: str, strict: bool, as_json: bool) -> int:
    """Check one trace, or all ranks of a folder, for faults. Exit code 1 if there is one.

    A trace may also be Chakra JSON, node-link JSON or GraphML, as its name says.

    \b
    Example:
      meshloom check runs/gpt2-tiny.dp2.20261121-120000
    """
    traces = read_any(where)
    findings = check(traces)
    if as_json:
        click.echo(msgspec.json.encode(findings).decode())
    else:
        for finding in findings[:_SHOWN]:
            click.echo(str(finding))
        if len(findings) > _SHOWN:
            click.echo(
                f"… and {len(findings) - _SHOWN:,} more: "
                + ", ".join(
                    f"{code} {count:,}" for code, count in Counter(finding.code for finding in findings).items()
                )
            )
        num_nodes = sum(len(trace.nodes) for trace in traces.values())
        num_comm = sum(node.is_comm for trace in traces.values() for node in trace.nodes)
        click.echo(
            f"{len(traces)} rank{'s' * (len(traces) > 1)}, {num_nodes:,} nodes, {num_comm:,} of them "
            f"communication: {len(findings) or 'no'} fault{'s' * (len(findings) != 1)}"
        )
    return 1 if any(strict or finding.severity == "error" for finding in findings) else 0
