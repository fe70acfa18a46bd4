"""`meshloom view`: graph, timeline."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import networkx as nx

from meshloom.chakra.check import check
from meshloom.chakra.trace import Trace
from meshloom.errors import UsageError
from meshloom.view.graph import Choice, step_graph
from meshloom.view.graph_files import read_source, write_graph, write_part


@click.group()
def command() -> None:
    """Draw a step as a graph, or as a timeline that Perfetto opens.

    \b
    Examples:
      meshloom view graph runs/gpt2-tiny.dp2.20261121-120000 --format png
      meshloom view timeline runs/gpt2-tiny.dp2.20261121-120000
    """


@command.command()
@click.argument("where", metavar="TRACE|DIR|GRAPH")
@click.option("--format", "form", type=click.Choice(["svg", "png", "json", "graphml", "dot", "chakra"]),
              help="  [default: as --out ends, else svg]")  # fmt: skip
@click.option("--out", help="The file.  [default: graph.<format>, beside the trace]")
@click.option("--rank", type=click.IntRange(0), help="Which rank of a folder.  [default: the first]")
@click.option("--comm", is_flag=True, help="Only communication, and what touches it.")
@click.option("--layers", help="Only these numbered layers: 3, or 0-1.")
@click.option("--phase", help="Only this phase: forward, backward, optimizer.")
@click.option("--collapse", type=click.Choice(["auto", "op", "module"]), default="auto", show_default=True,
              help="A box for each op, or for each module with counts; auto: what can be read.")  # fmt: skip
@click.option("--depth", default=3, show_default=True, type=click.IntRange(1), help="Parts of a module's path.")
def graph(where: str, form: str | None, out: str | None, rank: int | None, comm: bool, layers: str | None,
          phase: str | None, collapse: Any, depth: int) -> None:  # fmt: skip
    """Draw a step: tensors green, ops blue, communication red, what check finds fault with in orange.

    Layers are laid out by Graphviz where `dot` is installed. JSON is NetworkX node-link data, GraphML opens in Gephi
    and yEd; both can be given instead of a trace, to be drawn again or converted. chakra is the part as Chakra JSON.

    \b
    Examples:
      meshloom view graph synth.gpt2 --phase forward --layers 0-1 --collapse op --format svg
      meshloom view graph graph.json --format graphml
    """
    source = read_source(where)
    form = form or _ending(out) or "svg"
    path = Path(out) if out else _beside(Path(where), form)
    choice = Choice(phase=phase, layers=_layers(layers), comm=comm)
    if isinstance(source, dict):
        trace = _pick(source, rank)
        if form == "chakra":
            click.echo(str(write_part(trace, path, choice)))
            return
        drawn = step_graph(trace, choice=choice, collapse=collapse, depth=depth, findings=check(trace))
    else:
        if form == "chakra" or choice != Choice():
            raise UsageError(
                f"{where}: expected a trace with --format chakra, --comm, --layers and --phase, got a graph"
            )
        drawn = source
    click.echo(str(write_graph(drawn, path, form)))
    if drawn.graph["notes"]:
        click.echo(drawn.graph["notes"], err=True)


def draw_to(trace: Trace, path: Path) -> Path:
    """Draw the trace, by module, into the SVG file `path` and return it."""
    made: nx.DiGraph = step_graph(trace, collapse="module")
    return write_graph(made, path, "svg")


def _pick(traces: dict[int, Trace], rank: int | None) -> Trace:
    if rank is not None and rank not in traces:
        raise UsageError(f"--rank {rank}: expected one of {', '.join(map(str, traces))}")
    return traces[rank if rank is not None else min(traces)]


def _ending(out: str | None) -> str | None:
    ending = Path(out).suffix.removeprefix(".") if out else None
    return ending if ending in ("svg", "png", "json", "graphml", "dot") else None


def _beside(where: Path, form: str) -> Path:
    folder = where if where.is_dir() else where.parent
    return folder / ("graph.chakra.json" if form == "chakra" else f"graph.{form}")


def _layers(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None:
        raise UsageError(f"--layers {text}: expected a number or a range, such as 3 or 0-1")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise UsageError(f"--layers {text}: expected the smaller number first")
    return first, last


@command.command()
@click.argument("where", metavar="TRACE|DIR")
@click.option("--format", "form", type=click.Choice(["perfetto", "chrome"]), default="perfetto", show_default=True,
              help="perfetto: protobuf for ui.perfetto.dev; chrome: JSON for chrome://tracing.")  # fmt: skip
@click.option("--out", help="The file.  [default: timeline.perfetto-trace or timeline.chrome.json, beside the trace]")
def timeline(where: str, form: str, out: str | None) -> None:
    """Write all ranks of a step as one timeline: a track a stream, flows between collectives and messages that meet,
    measured beside predicted.

    \b
    Example:
      meshloom view timeline runs/gpt2-tiny.dp2.20261121-120000
    """
    from meshloom.view.perfetto import write_chrome, write_perfetto
    from meshloom.view.scene import scene

    shown = scene(where)
    if not shown.sources:
        raise UsageError(
            f"{where}: expected measured or predicted times, got none; run `meshloom simulate {where}` first"
        )
    folder = Path(where) if Path(where).is_dir() else Path(where).parent
    name = "timeline.perfetto-trace" if form == "perfetto" else "timeline.chrome.json"
    write = write_perfetto if form == "perfetto" else write_chrome
    path = write(shown.tracks, Path(out) if out else folder / name)
    click.echo(
        f"{path}: {shown.tracks.num_slices:,} slices, {len(shown.tracks.flows):,} flows, "
        f"{len(shown.tracks.ranks)} ranks"
    )
