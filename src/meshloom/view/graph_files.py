"""Graphs of steps as files: SVG, PNG, NetworkX node-link JSON, GraphML, Graphviz's dot, Chakra JSON; two are read back.

No torch.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from xml.etree.ElementTree import ParseError

import networkx as nx

from meshloom.chakra.check import Finding, check
from meshloom.chakra.file import read_all, whole_file
from meshloom.chakra.formats import FORMS, form_of
from meshloom.chakra.trace import Trace
from meshloom.errors import TraceError, UsageError
from meshloom.view.draw import png, svg
from meshloom.view.graph import Choice, part_of, step_graph
from meshloom.view.place import dot_source

Format = Literal["svg", "png", "json", "graphml", "dot", "chakra"]

FORMATS: dict[str, Callable[[nx.DiGraph], bytes]] = {
    "svg": lambda graph: svg(graph).encode(),
    "png": png,
    "json": lambda graph: json.dumps(nx.node_link_data(graph, edges="edges"), ensure_ascii=False, indent=1).encode(),
    "graphml": lambda graph: _graphml(graph),
    "dot": lambda graph: dot_source(graph).encode(),
}
_NODE = {"kind": str, "label": str, "name": str, "module": str, "phase": str, "num_ops": int, "flops": int,
         "bytes": int, "fault": str}  # fmt: skip


def write_graph(graph: nx.DiGraph, path: Path, form: str) -> Path:
    """Write a graph that `step_graph` made as one of `FORMATS` and return the path; raises FolderError."""
    body = FORMATS[form](graph)
    with whole_file(path, num_bytes=len(body)) as file:
        file.write(body)
    return path


def _graphml(graph: nx.DiGraph) -> bytes:
    file = io.BytesIO()
    nx.write_graphml(graph, file, named_key_ids=True)
    return file.getvalue()


def read_source(where: str | Path) -> nx.DiGraph | dict[int, Trace]:
    """What `where` holds: a graph that was written before (.json, .graphml), or the traces of a file or folder.

    Raises TraceError where it is neither.
    """
    path = Path(where)
    if path.is_dir() or not path.name.endswith((".json", ".graphml")):
        return read_all(path)
    graph = _read_json(path) if path.name.endswith(".json") else _read_graphml(path)
    if graph is not None:
        return checked(graph, path)
    trace = form_of(path).read(path)
    return {trace.rank: trace}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: expected a graph or a trace as text, got '{error}'") from error


def _read_json(path: Path) -> nx.DiGraph | None:
    """The graph, None where the JSON is something else: a trace."""
    try:
        table = json.loads(_text(path))
        if not isinstance(table, dict) or table.get("graph", {}).get("writer") != "meshloom":
            return None
        return nx.node_link_graph(table, edges="edges")
    except json.JSONDecodeError:
        return None  # several documents, perhaps; the reader of traces tells
    except (nx.NetworkXException, KeyError, TypeError, AttributeError) as error:
        raise TraceError(f"{path}: expected a graph that `meshloom view graph` wrote, got '{error}'") from error


def _read_graphml(path: Path) -> nx.DiGraph | None:
    text = _text(path)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise TraceError(f"{path}: expected GraphML without a document type: entities of strangers are not expanded")
    try:
        graph = nx.parse_graphml(text)
    except (ParseError, nx.NetworkXException, KeyError, ValueError, StopIteration) as error:
        raise TraceError(f"{path}: expected GraphML, got '{error}'") from error
    for name in ("node_default", "edge_default"):  # NetworkX's own additions
        graph.graph.pop(name, None)
    return graph if graph.graph.get("writer") == "meshloom" else None


def checked(graph: Any, path: Path) -> nx.DiGraph:
    """The graph, with every fact of the kind that drawing needs; raises TraceError where one is missing or another."""
    for key, facts in graph.nodes(data=True):
        for name, kind in _NODE.items():
            value = facts.get(name, "" if kind is str else None)
            if not isinstance(value, kind) or (name == "kind" and value not in ("op", "tensor", "communication")):
                raise TraceError(
                    f"{path}: node {key!r}: expected {name} as `meshloom view graph` writes it, got {value!r}"
                )
            facts[name] = value
    for name in ("level", "title", "notes"):
        graph.graph[name] = str(graph.graph.get(name, ""))
    return nx.DiGraph(graph)


def write_part(trace: Trace, path: Path, choice: Choice) -> Path:
    """Write the chosen part of a trace as Chakra JSON and return the path; raises UsageError if it is empty."""
    part = part_of(trace, choice)
    FORMS[".json"].write(part, path)
    return path


def visualize_trace(trace: Trace, folder: str | Path, *, findings: list[Finding] | None = None) -> list[Path]:
    """Write tensor_trace_graph.png and .json, tensor_comm_graph.png and tensor_trace_chakra.json into `folder`.

    The pictures gather ops by module where they are too many to read; the JSON files hold every op. A trace without
    communication has no second picture. Returns what was written; raises FolderError.
    """
    folder = Path(folder)
    findings = check(trace) if findings is None else findings
    return [
        write_graph(step_graph(trace, findings=findings), folder / "tensor_trace_graph.png", "png"),
        write_graph(step_graph(trace, collapse="op", findings=findings), folder / "tensor_trace_graph.json", "json"),
        write_graph(communication_graph(trace, findings), folder / "tensor_comm_graph.png", "png"),
        write_part(trace, folder / "tensor_trace_chakra.json", Choice()),
    ]


def communication_graph(trace: Trace, findings: list[Finding]) -> nx.DiGraph:
    """Communication and what touches it; an empty graph that says so where a trace has none."""
    try:
        return step_graph(trace, choice=Choice(comm=True), findings=findings)
    except UsageError:
        empty = step_graph(Trace(nodes=[], attrs=trace.attrs, version=trace.version))
        empty.graph["notes"] = "no communication in this trace"
        return empty
