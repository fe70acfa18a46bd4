"""What a folder holds to look at: traces, timelines, what a run wrote, and the hardware of its prediction. No torch.

A file is read once, here; everything else in this room works on what this gives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from meshloom.chakra import timeline as timeline_file
from meshloom.chakra.check import Finding, check
from meshloom.chakra.clocks import offsets_ns
from meshloom.chakra.file import paused_collection, read_all
from meshloom.chakra.timeline import Timeline
from meshloom.chakra.trace import Node, Trace
from meshloom.errors import FolderError, TraceError
from meshloom.hardware.cluster import Cluster, load_cluster
from meshloom.hardware.table import shipped
from meshloom.view.graph import is_work
from meshloom.view.tracks import Source, Tracks, tracks_of


class Event(NamedTuple):
    """A node's work on a rank, and when it ran, in ns since the step began on any rank."""

    rank: int
    node: Node
    start_ns: int
    duration_ns: int

    @property
    def end_ns(self) -> int:
        """When it was over."""
        return self.start_ns + self.duration_ns


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Traces of one step by rank, with what was predicted of them; `name` says where they lie."""

    name: str
    traces: Mapping[int, Trace]
    predicted: Timeline | None = None
    cluster: Cluster | None = None

    @cached_property
    def nodes(self) -> dict[int, list[Node]]:
        """Every rank's nodes, decoded once."""
        with paused_collection():
            return {rank: list(trace.nodes) for rank, trace in self.traces.items()}

    @cached_property
    def findings(self) -> list[Finding]:
        """What `check` finds."""
        return check({rank: replace_nodes(trace, self.nodes[rank]) for rank, trace in self.traces.items()})

    @cached_property
    def tracks(self) -> Tracks:
        """What ran when."""
        return tracks_of(self.nodes, self.predicted)

    @cached_property
    def sources(self) -> list[Source]:
        """Which times there are: measured, predicted, both or none."""
        timed = any(node.duration_ns > 0 for each in self.nodes.values() for node in each)
        found: list[Source] = ["measured"] if timed else []
        return [*found, "predicted"] if self.predicted is not None else found

    @cached_property
    def num_ranks(self) -> int:
        """How many ranks are there."""
        return len(self.traces)

    def fact(self, name: str) -> Any:
        """A fact that the first rank's file tells, None if it does not."""
        return next(iter(self.traces.values())).get(name) if self.traces else None

    def events(self, source: Source | None = None) -> list[Event]:
        """The work of all ranks by start; from `source`, or the measured times where there are any, else predicted.

        Without any times all events are at 0.
        """
        source = source or next(iter(self.sources), "measured")
        found: list[Event] = []
        with paused_collection():
            if source == "predicted" and self.predicted is not None:
                known = {(rank, node.id): node for rank, each in self.nodes.items() for node in each}
                for span in self.predicted.spans:
                    node = known.get((span.rank, span.node))
                    if node is not None:
                        found.append(Event(span.rank, node, span.start_ns, span.duration_ns))
            else:
                shift = offsets_ns(self.nodes)
                work = {rank: [node for node in each if is_work(node)] for rank, each in self.nodes.items()}
                # the same beginning as that of the tracks: also the host's
                starts = [
                    node.start_ns + shift[rank]
                    for rank, each in self.nodes.items()
                    for node in each
                    if node.duration_ns
                ]
                begin = min(starts, default=0)
                for rank, each in work.items():
                    found += [
                        Event(
                            rank, node, node.start_ns + shift[rank] - begin if node.duration_ns else 0, node.duration_ns
                        )
                        for node in each
                    ]
        found.sort(key=lambda event: event.start_ns)
        return found


def replace_nodes(trace: Trace, nodes: list[Node]) -> Trace:
    """The trace with its nodes decoded."""
    return Trace(nodes=nodes, attrs=trace.attrs, version=trace.version)


def scene(where: str | Path, *, cluster: str | None = None) -> Scene:
    """The scene of a trace, a trace folder or a run folder, with the timeline.json beside it; raises TraceError, or
    HardwareError if `cluster` names none."""
    path = Path(where)
    if path.is_dir() and not any(path.glob("*.et*")) and not any(path.glob("trace/*.et*")):
        raise TraceError(
            f"{path}: expected rank<r>.et (or .et.gz) here or in trace/, found none; "
            "record with `train --trace`, or `synth`"
        )
    traces = read_all(path)
    file = (path if path.is_dir() else path.parent) / "timeline.json"
    predicted = timeline_file.read(file) if file.is_file() else None
    if predicted is not None and not path.is_dir():  # of one file: only its own ranks
        predicted = replace_spans(predicted, set(traces))
    folder = path if path.is_dir() else path.parent
    hardware = load_cluster(cluster) if cluster else _cluster_of(folder, predicted)
    return Scene(name=path.name, traces=traces, predicted=predicted, cluster=hardware)


def replace_spans(timeline: Timeline, ranks: set[int]) -> Timeline:
    """The timeline of some of its ranks."""
    spans = [span for span in timeline.spans if span.rank in ranks]
    return Timeline(spans=spans, source=timeline.source, world_size=timeline.world_size,
                    makespan_ns=timeline.makespan_ns, cluster=timeline.cluster)  # fmt: skip


def _cluster_of(folder: Path, predicted: Timeline | None) -> Cluster | None:
    """The cluster that a folder was predicted on: its own cluster.toml, or the shipped one of the timeline's name."""
    if (folder / "cluster.toml").is_file():
        return load_cluster(folder / "cluster.toml")
    for name in shipped("cluster") if predicted is not None and predicted.cluster else ():
        cluster = load_cluster(name)
        if predicted is not None and cluster.name == predicted.cluster:
            return cluster
    return None


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A run folder to look at: what ran (`run`, `steps`: run.json, metrics.jsonl) and its scenes, captured first."""

    name: str
    run: dict[str, Any]
    steps: list[dict[str, Any]]
    scenes: list[Scene]


def folder(where: str | Path, *, cluster: str | None = None) -> Folder:
    """What lies in a run folder, a trace folder, or one file; raises FolderError if there is nothing to tell."""
    path = Path(where)
    if path.is_file():
        return Folder(name=path.name, run={}, steps=[], scenes=[scene(path, cluster=cluster)])
    if not path.is_dir():
        raise FolderError(f"{path}: expected a run folder, there is none")
    run, steps = read_json(path / "run.json"), read_steps(path / "metrics.jsonl")
    scenes = []
    for place, title in ((path, "Captured"), *((sub, "Synthesised") for sub in sorted(path.glob("synth.*")))):
        if any(place.glob("*.et*")) or any((place / "trace").glob("*.et*")):
            found = scene(place, cluster=cluster)
            plan = found.fact("plan") or place.name
            kind = {"synth": "Synthesised", "capture": "Captured"}.get(str(found.fact("source")), title)
            scenes.append(replace(found, name=f"{kind}: {plan}"))
    if not scenes and not steps:
        raise FolderError(f"{path}: expected trace/rank<r>.et or metrics.jsonl, found neither")
    return Folder(name=path.resolve().name, run=run, steps=steps, scenes=scenes)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, {} where there is none; raises FolderError."""
    try:
        return dict(_loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise FolderError(f"{path}: expected JSON, got '{error}'") from error


def _loads(text: str) -> Any:
    """JSON with null for what is no finite number, which a browser's JSON cannot hold."""
    return json.loads(text, parse_constant=lambda name: None, parse_float=_finite)


def _finite(text: str) -> float | None:
    value = float(text)
    return value if isfinite(value) else None


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file, of a run that may still write; raises FolderError."""
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        lines = text.split("\n")
        return [dict(_loads(line)) for line in lines[:-1] + ([lines[-1]] if lines[-1].endswith("}") else []) if line]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise FolderError(f"{path}: expected one JSON object a line, got '{error}'") from error
