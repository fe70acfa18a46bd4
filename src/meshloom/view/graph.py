"""The graph of a step, collapsed by module, and its picture as SVG. No torch.

`module_graph` computes, `draw` draws. A row is a module, a column a phase: forward runs down, backward up.
"""

from __future__ import annotations

from collections import defaultdict
from html import escape
from typing import Any

import networkx as nx

from meshloom.chakra.summary import comm_kind, summarize
from meshloom.chakra.trace import Node, NodeType, Trace

_COLUMNS = (
    "forward",
    "forward communication",
    "backward",
    "backward communication",
    "optimizer",
    "optimizer communication",
    "other",
    "other communication",
)
_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 190, 34, 40, 16, 24


def module_graph(trace: Trace, *, depth: int = 3, max_rows: int = 60) -> nx.DiGraph:
    """The step with its ops gathered by phase and module, to `depth` parts of the path; less if that is too many.

    Nodes carry label, phase, module, kind (op or communication), num_ops, flops, bytes and row; edges their bytes'
    kind (communication or data). Host scopes are left out: what encloses an op is told by its module.
    """
    while depth > 1 and len({_module(node, depth) for node in trace.nodes}) > max_rows:
        depth -= 1
    graph = nx.DiGraph()
    home: dict[int, tuple[str, str]] = {}
    for node in trace.nodes:
        if node.is_comm or (node.type == NodeType.COMP and node.get("op_class") != "host"):
            home[node.id] = key = _key(node, depth)
            if key not in graph:
                graph.add_node(key, **_facts(node, depth))
            facts = graph.nodes[key]
            facts["num_ops"] += 1
            facts["flops"] += node.get("num_ops", 0) if not node.is_comm else 0
            facts["bytes"] += node.get("comm_size", 0) if node.is_comm else node.get("tensor_size", 0)
    rows: dict[str, int] = {}
    for key in graph:
        rows.setdefault(graph.nodes[key]["module"], len(rows))
    for key in graph:
        graph.nodes[key]["row"] = rows[graph.nodes[key]["module"]]
    for node in trace.nodes:
        for dependency in node.data_deps:
            if node.id in home and dependency in home and home[dependency] != home[node.id]:
                kind = "communication" if "communication" in home[dependency][0] + home[node.id][0] else "data"
                graph.add_edge(home[dependency], home[node.id], kind=kind)
    return graph


def _module(node: Node, depth: int) -> str:
    return ".".join(str(node.get("module", "")).split(".")[:depth])


def _key(node: Node, depth: int) -> tuple[str, str]:
    phase = node.get("phase") or "other"
    return (f"{phase} communication" if node.is_comm else phase), _module(node, depth)


def _facts(node: Node, depth: int) -> dict[str, Any]:
    column, module = _key(node, depth)
    label = module or "outside all modules"
    if node.is_comm:
        label = comm_kind(node) + (f" ({node.get('comm_axis')})" if node.get("comm_axis") else "")
    return {
        "label": label,
        "column": column,
        "module": module,
        "kind": "communication" if node.is_comm else "op",
        "num_ops": 0,
        "flops": 0,
        "bytes": 0,
    }


def draw(graph: nx.DiGraph, *, title: str = "") -> str:
    """The graph as an SVG document: ops blue, communication and its edges red, a legend."""
    columns = [name for name in _COLUMNS if any(facts["column"] == name for _, facts in graph.nodes(data=True))]
    num_rows = 1 + max((facts["row"] for _, facts in graph.nodes(data=True)), default=0)
    width = 2 * _MARGIN + len(columns) * (_WIDTH + _GAP_X)
    height = 2 * _MARGIN + 64 + num_rows * (_HEIGHT + _GAP_Y)
    place = {
        key: (
            _MARGIN + columns.index(facts["column"]) * (_WIDTH + _GAP_X),
            _MARGIN + 64 + facts["row"] * (_HEIGHT + _GAP_Y),
        )
        for key, facts in graph.nodes(data=True)
    }
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        '<defs><marker id="end" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#555"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{_MARGIN}" y="{_MARGIN + 8}" font-size="15" font-weight="600">{escape(title)}</text>',
    ]
    parts += [
        f'<text x="{_MARGIN + index * (_WIDTH + _GAP_X)}" y="{_MARGIN + 52}" fill="#555">{escape(name)}</text>'
        for index, name in enumerate(columns)
    ]
    parts += [_edge(place[source], place[target], kind) for source, target, kind in _drawn_edges(graph)]
    parts += [_box(place[key], facts) for key, facts in graph.nodes(data=True)]
    parts.append(_legend(width))
    parts.append("</svg>")
    return "\n".join(parts)


def _drawn_edges(graph: nx.DiGraph) -> list[tuple[Any, Any, str]]:
    """Edges that no longer way implies: the rest would only cover the picture."""
    kinds = {(source, target): kind for source, target, kind in graph.edges(data="kind")}
    if nx.is_directed_acyclic_graph(graph):
        graph = nx.transitive_reduction(graph)
    return [(source, target, kinds[source, target]) for source, target in graph.edges]


def _edge(source: tuple[int, int], target: tuple[int, int], kind: str) -> str:
    colour = "#c62828" if kind == "communication" else "#555"
    (x1, y1), (x2, y2) = source, target
    if x1 == x2:  # within a column: along its middle, beside the boxes if it leaps over some
        x1 = x2 = x1 + _WIDTH // 2
        y1, y2 = (y1 + _HEIGHT, y2) if y2 > y1 else (y1, y2 + _HEIGHT)
        leap = abs(y2 - y1) > _GAP_Y + 4
        bend = _WIDTH * 0.75 if leap else 0
        path = f"M{x1} {y1}C{x1 + bend} {y1 + (y2 - y1) / 4},{x2 + bend} {y2 - (y2 - y1) / 4},{x2} {y2}"
    else:
        x1, x2 = (x1 + _WIDTH, x2) if x2 > x1 else (x1, x2 + _WIDTH)
        y1, y2 = y1 + _HEIGHT // 2, y2 + _HEIGHT // 2
        middle = (x1 + x2) / 2
        path = f"M{x1} {y1}C{middle} {y1},{middle} {y2},{x2} {y2}"
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-opacity=".65" marker-end="url(#end)"/>'


def _box(place: tuple[int, int], facts: dict[str, Any]) -> str:
    x, y = place
    fill, line = ("#ffebee", "#c62828") if facts["kind"] == "communication" else ("#e3f2fd", "#1565c0")
    label = facts["label"] if len(facts["label"]) <= 28 else "…" + facts["label"][-27:]
    amount = _si(facts["bytes"], "B") if facts["kind"] == "communication" else _si(facts["flops"], "FLOP")
    return (
        f"<g><title>{escape(facts['module'] or facts['label'])}: {facts['num_ops']} ops, "
        f"{facts['flops']:,} FLOP, {facts['bytes']:,} bytes</title>"
        f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="{fill}" stroke="{line}"/>'
        f'<text x="{x + 8}" y="{y + 14}">{escape(label)}</text>'
        f'<text x="{x + 8}" y="{y + 28}" font-size="10" fill="#555">{facts["num_ops"]} × · {amount}</text></g>'
    )


def _legend(width: int) -> str:
    items = (("#e3f2fd", "#1565c0", "ops of a module"), ("#ffebee", "#c62828", "communication"))
    return "".join(
        f'<rect x="{width - 300 + 150 * index}" y="{_MARGIN - 4}" width="14" height="14" rx="3" fill="{fill}" '
        f'stroke="{line}"/><text x="{width - 280 + 150 * index}" y="{_MARGIN + 8}">{text}</text>'
        for index, (fill, line, text) in enumerate(items)
    )


def _si(value: float, unit: str) -> str:
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.1f} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def summary(trace: Trace) -> dict[str, dict[str, int]]:
    """Collectives and messages of a trace by name and axis -> count and bytes."""
    table: dict[str, dict[str, int]] = defaultdict(lambda: {"count": 0, "bytes": 0})
    for item in summarize(trace.nodes).traffic:
        row = table[f"{item.kind} ({item.axis})" if item.axis else item.kind]
        row["count"] += item.count
        row["bytes"] += item.count * item.num_bytes
    return dict(table)
