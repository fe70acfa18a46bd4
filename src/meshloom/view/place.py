"""Where the boxes of a graph go: in layers, by phase and module, or where Graphviz puts them. No torch.

Layers follow Sugiyama, Tagawa and Toda 1981: each node below all that it needs, orders by barycentres, then x by the
middle of the neighbours. Nothing recurses; a cycle (in a trace that fails `check`) loses the edge that closes it.
"""

from __future__ import annotations

import shutil
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import networkx as nx

Point = tuple[float, float]

WIDTH, HEIGHT = 190.0, 36.0
_GAP_X, _GAP_Y, _LINE_GAP = 26.0, 34.0, 14.0
_SWEEPS = 8
_GRAPHVIZ_SECONDS = 10.0
# without a limit its simplex takes more than forty times as long on the long edges from forward to backward
_DOT = ("-Gnodesep=0.3", "-Granksep=0.45", "-Gnslimit=1", "-Gnslimit1=1", "-Gmclimit=0.3")
_GRAPHVIZ_NODES = 1500  # it takes minutes beyond
COLOURS = {"tensor": ("#e8f5e9", "#2e7d32"), "op": ("#e3f2fd", "#1565c0"), "communication": ("#ffebee", "#c62828")}
_PHASES = ("forward", "backward", "optimizer", "other")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Upper left corners of the boxes, ways of the edges (cubic Bézier points) and headings, from (0, 0) on."""

    corners: dict[Any, Point]
    ways: dict[tuple[Any, Any], list[Point]]
    headings: list[tuple[float, str]]
    width: float
    height: float


def place(graph: nx.DiGraph, *, graphviz: bool | None = None) -> Placed:
    """The places of a graph's nodes: modules by phase, ops in layers.

    `graphviz` says whether `dot` lays out the layers; None means where it is installed and soon done.
    """
    if graph.graph.get("level") == "module":
        return by_phase(graph)
    if graphviz is None:
        graphviz = len(graph) <= _GRAPHVIZ_NODES and shutil.which("dot") is not None
    return (_by_graphviz(graph) if graphviz else None) or in_layers(graph)


# -- modules: a row each, a column for each phase


def by_phase(graph: nx.DiGraph) -> Placed:
    """A row a module, in the order of the step; a column a phase, and one for its communication."""
    facts = dict(graph.nodes(data=True))
    columns: dict[str, int] = {}
    for phase in (*_PHASES, *sorted({each["phase"] for each in facts.values()} - set(_PHASES))):
        for kind, name in (("op", phase), ("communication", f"{phase} communication")):
            if any(each["phase"] == phase and each["kind"] == kind for each in facts.values()):
                columns[name] = len(columns)
    rows: dict[str, int] = {}
    taken: dict[tuple[int, int], int] = {}
    corners: dict[Any, Point] = {}
    for each in facts.values():
        rows.setdefault(each["module"], len(rows))
    extra: dict[int, int] = defaultdict(int)  # how many boxes of one place stand below one another
    slots = {}
    for key, each in facts.items():
        column = columns[each["phase"] + (" communication" if each["kind"] == "communication" else "")]
        row = rows[each["module"]]
        slots[key] = column, row, taken.setdefault((column, row), 0)
        taken[column, row] += 1
        extra[row] = max(extra[row], taken[column, row])
    tops, top = {}, 28.0
    for row in range(len(rows)):
        tops[row] = top
        top += extra[row] * (HEIGHT + 6) + 12
    for key, (column, row, slot) in slots.items():
        corners[key] = column * (WIDTH + 44), tops[row] + slot * (HEIGHT + 6)
    ways = {edge: _between(corners[edge[0]], corners[edge[1]]) for edge in needed_edges(graph)}
    headings = [(column * (WIDTH + 44), name) for name, column in columns.items()]
    return Placed(corners=corners, ways=ways, headings=headings, width=max(1, len(columns)) * (WIDTH + 44) + 20,
                  height=max(top, 80))  # fmt: skip


def needed_edges(graph: nx.DiGraph) -> list[tuple[Any, Any]]:
    """Edges that no longer way implies: the rest would only cover the picture."""
    if len(graph) > 400 or not nx.is_directed_acyclic_graph(graph):
        return list(graph.edges)
    return list(nx.transitive_reduction(graph).edges)


def _between(one: Point, other: Point) -> list[Point]:
    (x1, y1), (x2, y2) = one, other
    if x1 == x2:
        down = y2 > y1
        begin = (x1 + WIDTH / 2, y1 + HEIGHT if down else y1)
        end = (x2 + WIDTH / 2, y2 if down else y2 + HEIGHT)
        if abs(y2 - y1) <= 2 * HEIGHT:
            return [begin, begin, end, end]
        side = x1 + WIDTH + 18
        return [(x1 + WIDTH, y1 + HEIGHT / 2), (side, y1 + HEIGHT / 2), (side, y2 + HEIGHT / 2),
                (x2 + WIDTH, y2 + HEIGHT / 2)]  # fmt: skip
    begin, end = (x1 + WIDTH, y1 + HEIGHT / 2), (x2, y2 + HEIGHT / 2)
    if x2 < x1:
        begin, end = (x1, begin[1]), (x2 + WIDTH, end[1])
    middle = (begin[0] + end[0]) / 2
    return [begin, (middle, begin[1]), (middle, end[1]), end]


# -- ops: layers


def in_layers(graph: nx.DiGraph) -> Placed:
    """Each node in the layer below the last of those that it needs; long edges pass through places of their own."""
    edges = _acyclic(graph)
    layer_of = _layers(list(graph), edges)
    num_layers = max(layer_of.values(), default=-1) + 1
    rows: list[list[Any]] = [[] for _ in range(num_layers)]
    for key in graph:
        rows[layer_of[key]].append(key)
    above: dict[Any, list[Any]] = defaultdict(list)
    below: dict[Any, list[Any]] = defaultdict(list)
    chains: dict[tuple[Any, Any], list[Any]] = {}
    for source, target in edges:
        chain = [source]
        for layer in range(layer_of[source] + 1, layer_of[target]):
            point = ("by", source, target, layer)
            rows[layer].append(point)
            chain.append(point)
        chain.append(target)
        chains[source, target] = chain
        for one, other in pairwise(chain):
            below[one].append(other)
            above[other].append(one)
    _order(rows, above, below)
    middles = _middles(rows, above, below, graph)
    left = min((middles[key] - WIDTH / 2 for row in rows for key in row), default=0.0)
    corners = {key: (middles[key] - WIDTH / 2 - left, layer_of[key] * (HEIGHT + _GAP_Y)) for key in graph}
    ways = {edge: _way(chain, layer_of, middles, left) for edge, chain in chains.items()}
    xs = [middle - left for middle in middles.values()]
    return Placed(corners=corners, ways=ways, headings=[], width=max(xs, default=0.0) + WIDTH / 2 + 10,
                  height=max(1, num_layers) * (HEIGHT + _GAP_Y))  # fmt: skip


def _acyclic(graph: nx.DiGraph) -> list[tuple[Any, Any]]:
    if nx.is_directed_acyclic_graph(graph):
        return list(graph.edges)
    place_of = {key: place for place, key in enumerate(graph)}  # the order of the file breaks the cycles
    return [edge for edge in graph.edges if place_of[edge[0]] < place_of[edge[1]]]


def _layers(keys: list[Any], edges: list[tuple[Any, Any]]) -> dict[Any, int]:
    below: dict[Any, list[Any]] = defaultdict(list)
    waiting = dict.fromkeys(keys, 0)
    for source, target in edges:
        below[source].append(target)
        waiting[target] += 1
    layer = dict.fromkeys(keys, 0)
    sources = {key for key in keys if not waiting[key]}
    ready, order = [key for key in reversed(keys) if key in sources], []
    while ready:
        key = ready.pop()
        order.append(key)
        for target in below[key]:
            layer[target] = max(layer[target], layer[key] + 1)
            waiting[target] -= 1
            if not waiting[target]:
                ready.append(target)
    for key in reversed(order):  # what nothing holds above moves down to where it is needed
        if below[key] and key in sources:
            layer[key] = min(layer[target] for target in below[key]) - 1
    return layer


def _order(rows: list[list[Any]], above: dict[Any, list[Any]], below: dict[Any, list[Any]]) -> None:
    """Sort each row by the mean place of its neighbours, down and up in turn."""
    at = {key: float(place) for row in rows for place, key in enumerate(row)}
    for sweep in range(_SWEEPS):
        near, passing = (above, rows) if sweep % 2 == 0 else (below, rows[::-1])
        for row in passing:
            means = {key: _mean([at[other] for other in near[key]], at[key]) for key in row}
            row.sort(key=means.__getitem__)
            for place, key in enumerate(row):
                at[key] = float(place)


def _middles(
    rows: list[list[Any]], above: dict[Any, list[Any]], below: dict[Any, list[Any]], graph: nx.DiGraph
) -> dict[Any, float]:
    def room(one: Any, other: Any) -> float:
        return (_half(one, graph) + _half(other, graph)) + (_GAP_X if one in graph and other in graph else _LINE_GAP)

    x: dict[Any, float] = {}
    for row in rows:
        at = 0.0
        for place, key in enumerate(row):
            at = at + room(row[place - 1], key) if place else 0.0
            x[key] = at
        for key in row:
            x[key] -= at / 2
    for sweep in range(2 * _SWEEPS):
        for row in rows if sweep % 2 == 0 else rows[::-1]:
            near = above if sweep % 2 == 0 else below
            wanted = [_mean([x[other] for other in near[key]], x[key]) for key in row]
            right, left = list(wanted), list(wanted)
            for place in range(1, len(row)):
                right[place] = max(right[place], right[place - 1] + room(row[place - 1], row[place]))
            for place in range(len(row) - 2, -1, -1):
                left[place] = min(left[place], left[place + 1] - room(row[place], row[place + 1]))
            for place, key in enumerate(row):
                x[key] = (right[place] + left[place]) / 2
    return x


def _half(key: Any, graph: nx.DiGraph) -> float:
    return WIDTH / 2 if key in graph else 0.0


def _mean(values: list[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _way(chain: list[Any], layer_of: dict[Any, int], middles: dict[Any, float], left: float) -> list[Point]:
    first, last = layer_of[chain[0]], layer_of[chain[-1]]
    step = HEIGHT + _GAP_Y
    stops = [(middles[chain[0]] - left, first * step + HEIGHT)]
    stops += [(middles[key] - left, (first + 1 + place) * step + HEIGHT / 2) for place, key in enumerate(chain[1:-1])]
    stops.append((middles[chain[-1]] - left, last * step))
    way = [stops[0]]
    for (x1, y1), (x2, y2) in pairwise(stops):
        bend = (y2 - y1) / 2
        way += [(x1, y1 + bend), (x2, y2 - bend), (x2, y2)]
    return way


# -- Graphviz


def dot_source(graph: nx.DiGraph, *, labels: bool = True) -> str:
    """The graph in Graphviz's language, with its colours; without labels only sizes, to be laid out."""
    number = {key: place for place, key in enumerate(graph)}
    lines = ["digraph step {", '  node [shape=box style="filled,rounded" fontname="sans-serif" fontsize=11];']
    for key, facts in graph.nodes(data=True):
        if labels:
            fill, line = COLOURS[facts["kind"]]
            told = f'label={_quoted(facts["label"])} tooltip={_quoted(facts["name"])} fillcolor="{fill}" color="{line}"'
        else:
            told = f'label="" fixedsize=true width={WIDTH / 72:.4f} height={HEIGHT / 72:.4f}'
        lines.append(f"  n{number[key]} [{told}];")
    for source, target, facts in graph.edges(data=True):
        colour = ' [color="#c62828"]' if facts.get("kind") == "communication" else ""
        lines.append(f"  n{number[source]} -> n{number[target]}{colour};")
    return "\n".join([*lines, "}", ""])


def _quoted(text: str) -> str:
    safe = str(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
    return f'"{safe}"'


def _by_graphviz(graph: nx.DiGraph) -> Placed | None:
    """Where `dot` puts everything; None where it is not there, takes too long, or fails."""
    try:
        done = subprocess.run(
            ["dot", "-Tplain", *_DOT], input=dot_source(graph, labels=False), text=True,
            capture_output=True, timeout=_GRAPHVIZ_SECONDS, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    keys, height, width = list(graph), 0.0, 0.0
    corners: dict[Any, Point] = {}
    ways: dict[tuple[Any, Any], list[Point]] = {}
    for line in done.stdout.splitlines():
        kind, *words = line.split()
        if kind == "graph":
            width, height = (72 * float(word) for word in words[1:3])
        elif kind == "node":
            x, y = (72 * float(word) for word in words[1:3])
            corners[keys[int(words[0][1:])]] = x - WIDTH / 2, height - y - HEIGHT / 2
        elif kind == "edge":
            count = int(words[2])
            numbers = [72 * float(word) for word in words[3 : 3 + 2 * count]]
            ends = keys[int(words[0][1:])], keys[int(words[1][1:])]
            ways[ends] = [(x, height - y) for x, y in zip(numbers[::2], numbers[1::2])]
    return Placed(corners=corners, ways=ways, headings=[], width=width, height=height)
