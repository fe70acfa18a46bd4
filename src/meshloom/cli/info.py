"""`meshloom info`."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
import msgspec

from meshloom.chakra.file import stream, trace_files
from meshloom.chakra.summary import Summary, join, summarize
from meshloom.chakra.trace import Trace

_ALONE = 64 << 20  # bytes of a file that one process reads before others would have started


@click.command()
@click.argument("where", metavar="TRACE|DIR")
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
def command(where: str, as_json: bool) -> None:
    """Say what a trace holds: nodes, steps, time, FLOPs, bytes, phases, communication by kind and size.

    Files are read in parts, by all cores where they are large: their size does not matter.

    \b
    Example:
      meshloom info runs/gpt2-tiny.dp2.20261121-120000/trace/rank0.et
    """
    told = [_facts(file) for file in trace_files(where)]
    if as_json:
        by_rank = {str(facts["file"].get("rank", index)): facts for index, facts in enumerate(told)}
        click.echo(msgspec.json.encode(by_rank).decode())
        return
    for facts in told:
        _tell(facts["path"], facts["file"], facts["summary"])


def _facts(path: Path) -> dict[str, Any]:
    first: list[Trace] = []

    def parts() -> Iterator[Trace]:
        for part in stream(path):
            first[:1] = [part]
            yield part

    summary = _summary(parts(), path)
    return {
        "path": str(path),
        "file": {name: first[0].get(name) for name in first[0].attrs},
        "version": first[0].version,
        "summary": summary,
        "duration_ns": summary.duration_ns,
    }


def _summary(parts: Iterator[Trace], path: Path) -> Summary:
    if path.is_file() and path.stat().st_size < _ALONE:
        return join(summarize(part.nodes) for part in parts)
    workers = os.cpu_count() or 1
    done: list[Summary] = []
    waiting: deque[Future[Summary]] = deque()
    with ProcessPoolExecutor(workers) as pool:
        for part in parts:
            waiting.append(pool.submit(summarize, part.nodes))
            if len(waiting) > workers + 1:  # parts that wait stand in memory
                done.append(waiting.popleft().result())
        return join([*done, *(future.result() for future in waiting)])


def _tell(name: str, file: dict[str, Any], summary: Summary) -> None:
    click.echo(f"{name}: " + ", ".join(f"{key} {value}" for key, value in file.items()))
    types = ", ".join(f"{count:,} {kind}" for kind, count in summary.types.items())
    click.echo(f"  {summary.num_nodes:,} nodes ({types}), {file.get('num_steps', 1)} step(s)")
    click.echo(f"  {summary.flops:,} FLOP, {summary.num_bytes:,} bytes moved")
    if summary.phases:
        click.echo("  ops by phase: " + ", ".join(f"{phase} {count:,}" for phase, count in summary.phases.items()))
    if summary.first and summary.last:
        first, last = (f"node {place.node}, {_short(place.name)}" for place in (summary.first, summary.last))
        click.echo(f"  {summary.duration_ns / 1e6:,.3f} ms from the start of {first}, to the end of {last}")
    for item in summary.traffic:
        axis = f" ({item.axis})" if item.axis else ""
        click.echo(f"  {item.kind}{axis}: {item.count:,} × {item.num_bytes:,} bytes")


def _short(name: str) -> str:
    return name if len(name) <= 60 else name[:59] + "…"
