"""One self-contained HTML page about a run folder, a trace, or two of them. No network, no torch.

The page is data (JSON) and the scripts below `page/`, which make text nodes of whatever came from a file: a trace is
untrusted input. Its Content-Security-Policy forbids every connection.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from meshloom.chakra.file import whole_file
from meshloom.errors import PlanError
from meshloom.plan import Plan
from meshloom.view.graph import clean
from meshloom.view.pack import pack
from meshloom.view.path import critical_path, memory_curve, path_parts, roofline, roofs_of
from meshloom.view.scene import Event, Folder, Scene, folder
from meshloom.view.stats import OpRow, collectives, layers, matrix, modules, ops, shares, steps_of

_FINDINGS = 200
_PATH_ROWS = 3000
_MATRIX_RANKS = 512  # more are a table of pairs only
_SCRIPTS = ("vendor/uplot.js", "words.js", "table.js", "timeline.js", "charts.js", "main.js")
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"

Table = dict[str, Any]


def report(where: str | Path, *, out: str | Path | None = None, cluster: str | None = None) -> Path:
    """Write the page about a run folder, a trace folder or a trace, and return its path (by default `report.html` in
    the folder); raises FolderError if there is nothing to tell."""
    shown = folder(where, cluster=cluster)
    place = Path(where) if Path(where).is_dir() else Path(where).parent
    path = Path(out) if out is not None else place / "report.html"
    return _write(page(report_data(shown)), path)


def diff_page(told: dict[str, Any], path: Path) -> Path:
    """Write the page about what `diff` found and return its path; raises FolderError."""
    return _write(page(diff_data(told)), path)


def diff_data(told: dict[str, Any]) -> dict[str, Any]:
    """What `diff` found as the page shows it."""
    heads = [("change", "word"), ("name", "text"), ("module", "text"), ("phase", "text"), ("A ×", "number"),
             ("B ×", "number"), ("A", "ns"), ("B", "ns"), ("difference", "ns")]  # fmt: skip
    data: dict[str, Any] = {"kind": "diff", "name": f"{told['a']['name']} – {told['b']['name']}"}
    for name in ("ops", "collectives"):
        rows = [
            [row["change"], row["name"], row["module"], row["phase"], row["count_a"], row["count_b"], row["time_a_ns"],
             row["time_b_ns"], row["time_b_ns"] - row["time_a_ns"]]
            for row in told[name]
        ]  # fmt: skip
        data[name] = _table(heads, rows)
    return {**data, "a": told["a"], "b": told["b"]}


def _write(text: str, path: Path) -> Path:
    body = text.encode("utf-8", errors="replace")
    with whole_file(path, num_bytes=len(body)) as file:
        file.write(body)
    return path


def page(data: dict[str, Any]) -> str:
    """The page as text: style, scripts and data in one file."""
    room = resources.files("meshloom.view") / "page"

    def part(name: str) -> str:
        return room.joinpath(*name.split("/")).read_text(encoding="utf-8")

    style = part("vendor/uplot.css") + part("page.css")
    licence = part("vendor/uplot.LICENSE").replace("--", "- -")
    # "<" never stands in the data: no name can end the script element
    body = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(clean(data["name"]))}'
        f"</title><style>{style}</style></head><body><div id=page></div><noscript>This page needs JavaScript; "
        "<code>meshloom stats</code> tells the same in a terminal.</noscript>"
        f'<script type="application/json" id="data">{body}</script>'
        f"<!-- uPlot:\n{licence}-->\n"
        f"<script>(() => {{\n{chr(10).join(part(name) for name in _SCRIPTS)}\n}})();</script></body></html>\n"
    )


def report_data(shown: Folder) -> dict[str, Any]:
    """Everything that the page shows, as plain data."""
    command = shown.run.get("command", {}) if isinstance(shown.run.get("command"), dict) else {}
    run = {"state": shown.run.get("state"), "model": command.get("model"), "plan": command.get("plan"),
           "on_device": command.get("device") not in (None, "cpu")}  # fmt: skip
    keys = ("step", "loss", "tokens_per_second", "memory_bytes", "duration_ns", "recorded")
    steps = [{key: step.get(key) for key in keys} for step in shown.steps if _number(step.get("loss"))]
    return {"kind": "report", "name": clean(shown.name), "run": run, "steps": steps,
            "scenes": [scene_data(scene) for scene in shown.scenes]}  # fmt: skip


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == value and abs(value) != float("inf")


def scene_data(scene: Scene) -> dict[str, Any]:
    """One scene as plain data."""
    first = next(iter(scene.sources), None)
    by_source = {source: scene.events(source) for source in scene.sources}
    events = by_source[first] if first else scene.events()
    faults = [(finding.rank, finding.node) for finding in scene.findings if finding.node is not None]
    path = critical_path(scene, events) if first else []
    told = {source: shares(each) for source, each in by_source.items()}
    cluster = scene.cluster
    facts = {"model": scene.fact("model"), "plan": scene.fact("plan"), "ranks": scene.num_ranks,
             "nodes": f"{sum(map(len, scene.nodes.values())):,}",
             "cluster": cluster.name if cluster else scene.predicted.cluster if scene.predicted else None}  # fmt: skip
    return {
        "name": clean(scene.name),
        "facts": {name: clean(value) if isinstance(value, str) else value for name, value in facts.items()},
        "steps": {source: steps_of(scene, source) for source in scene.sources},
        "findings": {"total": len(scene.findings), "shown": [clean(str(each)) for each in scene.findings[:_FINDINGS]]},
        "timeline": pack(scene.tracks, faults=faults, path=path, path_source=first) if first else None,
        "shares": {
            source: [
                {"rank": row.rank, "compute": row.compute_ns / max(1, whole), "exposed": row.exposed_ns / max(1, whole),
                 "idle": row.idle_ns / max(1, whole), "gaps": row.num_gaps}
                for row in rows
            ]
            for source, (whole, rows, _) in told.items()
        },
        "gaps": _table(
            [("rank", "int"), ("start", "ns"), ("duration", "ns"), ("before", "text")],
            [[gap.rank, gap.start_ns, gap.duration_ns, clean(gap.before)] for gap in told[first][2]] if first else [],
        ),
        "compare": _compare(by_source),
        "ops": _op_table(ops(events), kinds=True),
        "modules": _op_table(modules(events)),
        "layers": _op_table(layers(events)),
        "collectives": _collective_table(events),
        "matrix": _matrix(scene),
        "memory": _memory(scene, events),
        "roofline": _roofline(scene, by_source),
        "path": _path(path) if path else None,
        "grid": _grid(scene),
    }  # fmt: skip


def _table(heads: Sequence[tuple[str, str]], rows: list[list[Any]], sort: int = -1) -> Table:
    """Columns and rows, sorted by column `sort`, without the columns in which no row tells anything."""
    shown = [
        place for place in range(len(heads)) if place == sort or any(row[place] or row[place] == 0 for row in rows)
    ]
    return {"columns": [{"title": heads[place][0], "type": heads[place][1]} for place in shown],
            "rows": [[row[place] for place in shown] for row in rows],
            "sort": shown.index(sort) if sort in shown else -1}  # fmt: skip


def _op_table(rows: list[OpRow], *, kinds: bool = False) -> Table:
    whole = max(1, sum(row.time_ns for row in rows))
    heads = [("name", "text"), ("kind", "word"), ("phase", "word"), ("count", "int"), ("time", "ns"),
             ("share", "share"), ("FLOP", "flops"), ("bytes", "bytes")]  # fmt: skip
    cells = [
        [
            clean(row.name),
            row.kind,
            clean(row.phase),
            row.num_events,
            row.time_ns,
            row.time_ns / whole,
            row.flops or None,
            row.num_bytes or None,
        ]
        for row in rows
    ]
    if kinds:
        return _table(heads, cells, 4)
    return _table([heads[0], *heads[2:]], [[cell[0], *cell[2:]] for cell in cells], 3)


def _collective_table(events: list[Event]) -> Table:
    heads = [("kind", "text"), ("axis", "text"), ("ranks", "int"), ("size", "bytes"), ("count", "int"), ("time", "ns"),
             ("fastest", "ns"), ("bus", "bus")]  # fmt: skip
    return _table(heads, [list(row) for row in collectives(events)], 5)


def _compare(by_source: dict[Any, list[Event]]) -> Table | None:
    """Measured beside predicted, by op and phase; None unless there are both."""
    if len(by_source) < 2:
        return None
    table: dict[tuple[str, str, str], dict[str, int]] = defaultdict(dict)
    counts: dict[tuple[str, str, str], int] = {}
    for source, events in by_source.items():
        for row in ops(events):
            key = row.name, row.kind, row.phase
            table[key][source] = row.time_ns
            counts[key] = row.num_events
    rows: list[list[Any]] = [
        [clean(name), kind, clean(phase), counts[name, kind, phase], times.get("measured"), times.get("predicted"),
         times["predicted"] / times["measured"] - 1 if times.get("measured") and "predicted" in times else None]
        for (name, kind, phase), times in table.items()
    ]  # fmt: skip
    rows.sort(key=lambda row: -(row[4] or 0))
    heads = [("name", "text"), ("kind", "word"), ("phase", "word"), ("count", "int"), ("measured", "ns"),
             ("predicted", "ns"), ("difference", "share")]  # fmt: skip
    return _table(heads, rows, 4)


def _matrix(scene: Scene) -> dict[str, Any] | None:
    ranks, table = matrix(scene)
    pairs = [[one, other, size] for one, row in zip(ranks, table) for other, size in zip(ranks, row) if size]
    if not pairs:
        return None
    pairs.sort(key=lambda pair: -pair[2])
    small = len(ranks) <= _MATRIX_RANKS
    return {"ranks": ranks if small else [], "table": table if small else [],
            "pairs": _table([("from", "int"), ("to", "int"), ("bytes", "bytes")], pairs[:5000], 2)}  # fmt: skip


def _memory(scene: Scene, events: list[Event]) -> dict[str, Any]:
    first = min(scene.traces, default=0)
    curve = memory_curve([event for event in events if event.rank == first])
    return {"rank": first, "times": [when for when, _ in curve], "values": [value for _, value in curve],
            "capacity": scene.cluster.device.memory_bytes if scene.cluster else None}  # fmt: skip


def _roofline(scene: Scene, by_source: dict[Any, list[Event]]) -> dict[str, Any] | None:
    """Ops against the device's peaks: as measured on a device, else as predicted; a host's times say nothing of it."""
    on_device = any(event.node.get("stream") is not None for event in by_source.get("measured", ()))
    source = next(
        (each for each in (["measured"] if on_device else []) + ["predicted", "measured"] if each in by_source), None
    )
    if source is None:
        return None
    roofs = roofs_of(scene.cluster.device) if scene.cluster and (on_device or source == "predicted") else None
    points = [roof._asdict() for roof in roofline(by_source[source])][:400]
    return {"points": points, "roofs": roofs, "times": source}


def _path(path: list[Any]) -> dict[str, Any]:
    rows = [
        [clean(link.event.node.name), clean(str(link.event.node.get("module", ""))), link.event.rank,
         link.event.start_ns, link.event.duration_ns, link.waited_ns]
        for link in path[:_PATH_ROWS]
    ]  # fmt: skip
    heads = [("name", "text"), ("module", "text"), ("rank", "int"), ("start", "ns"), ("duration", "ns"),
             ("waiting", "ns")]  # fmt: skip
    return {"parts": path_parts(path), "rows": _table(heads, rows, 4)}


def _grid(scene: Scene) -> dict[str, Any] | None:
    """The plan as pipeline stages of groups (dp) of devices (cp, tp), each with its rank."""
    world = max([int(scene.fact("world_size") or 0), *(rank + 1 for rank in scene.traces)])
    try:
        plan = Plan.parse(str(scene.fact("plan")))
    except PlanError:
        plan = Plan(dp=world)
    if plan.world_size != world or world > 4096:
        return None
    per_host = scene.cluster.devices_per_host if scene.cluster else 8

    def device(rank: int) -> dict[str, Any]:
        where = " ".join(f"{axis} {index}" for axis, index in plan.coordinate(rank).items() if plan.degrees[axis] > 1)
        title = f"rank {rank}: {where or 'alone'}; host {rank // per_host}, device {rank % per_host}"
        return {"rank": rank, "traced": rank in scene.traces, "title": title}

    stages = [
        [
            [device(plan.rank(pp=pp, dp=dp, cp=cp, tp=tp)) for cp in range(plan.cp) for tp in range(plan.tp)]
            for dp in range(plan.dp)
        ]
        for pp in range(plan.pp)
    ]
    return {"stages": stages}
