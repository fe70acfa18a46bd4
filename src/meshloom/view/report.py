"""One self-contained HTML page about a run folder. No network, no torch.

A trace is untrusted input: everything that comes from a file is escaped.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from meshloom.chakra import timeline as timeline_file
from meshloom.chakra.check import Finding, check
from meshloom.chakra.file import read_all, whole_file
from meshloom.chakra.timeline import Span, Timeline
from meshloom.chakra.trace import Trace
from meshloom.errors import FolderError, TraceError
from meshloom.view.graph import summary

_ROWS = 30  # rows of a table of ops
_PIXELS = 1040  # width of a timeline; what is narrower than a pixel is drawn together with its neighbours


@dataclass(frozen=True, slots=True, kw_only=True)
class Chapter:
    """A set of traces, with its timeline where there is one."""

    title: str
    traces: dict[int, Trace]
    timeline: Timeline | None
    findings: list[Finding]


def report(folder: str | Path) -> Path:
    """Write `report.html` into the run folder and return its path; raises FolderError if there is nothing to tell."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FolderError(f"{folder}: expected a run folder, there is none")
    run, steps, chapters = _read_json(folder / "run.json"), _read_steps(folder / "metrics.jsonl"), _chapters(folder)
    if not chapters and not steps:
        raise FolderError(f"{folder}: expected trace/rank<r>.et or metrics.jsonl, found neither")
    path = folder / "report.html"
    with whole_file(path) as file:
        file.write(_page(folder.name, run, steps, chapters).encode())
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        facts = dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
        return {**facts, "command": dict(facts.get("command") or {})}
    except (ValueError, TypeError, RecursionError) as error:
        raise FolderError(f"{path}: expected JSON, got '{error}'") from error


def _read_steps(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        steps = [dict(json.loads(line)) for line in lines]
        # a loss that is no number is stored as null, and has no place on a curve
        return [step for step in steps if step["loss"] is not None and _is_number(step, "loss", "tokens_per_second")]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FolderError(f"{path}: expected one JSON object a line, got '{error}'") from error


def _is_number(step: dict[str, Any], *names: str) -> bool:
    """True; raises ValueError if one of them is none."""
    for name in names:
        if not isinstance(step[name], int | float) or not -1e30 < step[name] < 1e30:
            raise ValueError(f"{name} {step[name]!r:.60}")
    return True


def _chapters(folder: Path) -> list[Chapter]:
    chapters = []
    for where, title in ((folder, "Captured"), *((sub, "Synthesised") for sub in sorted(folder.glob("synth.*")))):
        try:
            traces = read_all(where)
        except TraceError:
            if where is folder and not any((folder / "trace").glob("*.et*")):
                continue
            raise
        file = where / "timeline.json"
        plan = next(iter(traces.values())).get("plan", "")
        chapters.append(
            Chapter(
                title=f"{title}: {plan or where.name}",
                traces=traces,
                findings=check(traces),
                timeline=timeline_file.read(file) if file.is_file() else None,
            )
        )
    return chapters


def _page(name: str, run: dict[str, Any], steps: list[dict[str, Any]], chapters: list[Chapter]) -> str:
    room = resources.files("meshloom.view")
    style, script = (room.joinpath(f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    command = run.get("command", {})
    named = {key: command[key] for key in ("model", "plan", "data", "seq_length", "batch_size") if key in command}
    facts = [f"{key} {' '.join(map(str, value)) if isinstance(value, list) else value}" for key, value in named.items()]
    body = [f"<h1>{escape(name)}</h1>", f"<p>{escape(', '.join(facts))}</p>", _cards(run, steps, chapters)]
    if steps:
        body += ["<h3>Loss</h3>", _loss_curve([float(step["loss"]) for step in steps])]
    for chapter in chapters:
        body.append(_chapter(chapter))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{escape(name)}</title><style>{style}</style></head>'
        f"<body><main>{''.join(body)}</main><script>{script}</script></body></html>"
    )


def _cards(run: dict[str, Any], steps: list[dict[str, Any]], chapters: list[Chapter]) -> str:
    cards = [("state", str(run["state"]))] if "state" in run else []
    if steps:
        speeds = sorted(step["tokens_per_second"] for step in steps if not step.get("recorded"))
        cards += [("steps", str(len(steps))), ("loss", f"{steps[0]['loss']:.3f} → {steps[-1]['loss']:.3f}")]
        cards += [("tokens/s, median", f"{speeds[len(speeds) // 2]:,.0f}")] if speeds else []
    for chapter in chapters:
        if chapter.timeline is not None:
            cards.append((f"{chapter.title}, predicted step", f"{chapter.timeline.makespan_ns / 1e6:.3f} ms"))
    inner = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for label, value in cards
    )
    return f'<div class="cards">{inner}</div>'


def _loss_curve(losses: Sequence[float]) -> str:
    low, high = min(losses), max(losses)
    spread = (high - low) or 1.0
    points = " ".join(
        f"{40 + 980 * index / max(1, len(losses) - 1):.1f},{10 + 120 * (high - loss) / spread:.1f}"
        for index, loss in enumerate(losses)
    )
    return (
        f'<svg viewBox="0 0 1040 150" role="img" aria-label="loss from {losses[0]:.3f} to {losses[-1]:.3f}">'
        f'<text x="0" y="16">{high:.2f}</text><text x="0" y="134">{low:.2f}</text>'
        f'<polyline points="{points}" fill="none" stroke="var(--compute)" stroke-width="2"/></svg>'
    )


def _chapter(chapter: Chapter) -> str:
    num_nodes = sum(len(trace.nodes) for trace in chapter.traces.values())
    parts = [
        f"<h2>{escape(chapter.title)}</h2>",
        f"<p>{len(chapter.traces)} ranks, {num_nodes:,} nodes</p>",
        _faults(chapter.findings),
    ]
    if chapter.timeline is not None:
        parts += [
            f"<h3>Predicted on {escape(chapter.timeline.cluster)}</h3>",
            _timeline(chapter.timeline),
            _share_table(chapter.timeline),
            f"<h3>Ops by predicted time, rank {chapter.timeline.ranks()[0]}</h3>",
            _op_table(chapter.timeline),
        ]
    trace = next(iter(chapter.traces.values()))
    rows = [(name, row["count"], row["bytes"]) for name, row in summary(trace).items()]
    parts += [f"<h3>Communication, rank {trace.rank}</h3>", _table(("what", "count", "bytes"), rows)]
    return "".join(parts)


def _faults(findings: list[Finding]) -> str:
    if not findings:
        return "<p>No fault found: ids, dependencies, cycles, and collectives across ranks.</p>"
    items = "".join(f'<li class="bad">{escape(str(finding))}</li>' for finding in findings[:50])
    return f"<p class=bad>{len(findings)} faults</p><ul>{items}</ul>"


def _timeline(timeline: Timeline) -> str:
    ranks = timeline.ranks()
    scale = _PIXELS / max(1, timeline.makespan_ns)
    height = 44 * len(ranks) + 24
    parts = []
    for row, rank in enumerate(ranks):
        y = 44 * row
        parts.append(f'<text x="0" y="{y + 22}">rank {rank}</text>')
        for track, offset, colour in (("compute", 4, "--compute"), ("communication", 22, "--comm")):
            parts.append(f'<rect x="60" y="{y + offset}" width="{_PIXELS}" height="16" fill="var(--track)"/>')
            spans = [span for span in timeline.spans if span.rank == rank and span.track == track]
            path = "".join(
                f"M{60 + begin:.2f} {y + offset}h{max(0.3, end - begin):.2f}v16H{60 + begin:.2f}z"
                for begin, end in _merged(spans, scale)
            )
            parts.append(f'<path d="{path}" fill="var({colour})"/>')
    parts.append(
        f'<text x="60" y="{height - 6}">0</text><text x="{60 + _PIXELS}" y="{height - 6}" '
        f'text-anchor="end">{timeline.makespan_ns / 1e6:.3f} ms</text>'
    )
    legend = "".join(
        f'<span><i style="background:var({colour})"></i>{text}</span>'
        for colour, text in (("--compute", "compute"), ("--comm", "communication"))
    )
    return (
        f'<div class="legend">{legend}</div><div class="wide"><svg viewBox="0 0 {_PIXELS + 64} {height}" '
        f'role="img" aria-label="timeline of {len(ranks)} ranks">{"".join(parts)}</svg></div>'
    )


def _merged(spans: Iterable[Span], scale: float) -> list[tuple[float, float]]:
    """Pixel intervals of the spans; those closer than a quarter of a pixel become one."""
    merged: list[tuple[float, float]] = []
    for span in sorted(spans, key=lambda span: span.start_ns):
        begin, end = span.start_ns * scale, span.end_ns * scale
        if merged and begin - merged[-1][1] < 0.25:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def _share_table(timeline: Timeline) -> str:
    whole = max(1, timeline.makespan_ns)
    rows = [
        (
            f"rank {share.rank}",
            *(
                f"{part / whole:.1%}"
                for part in (share.compute_ns, share.exposed_communication_ns, share.idle_ns, share.communication_ns)
            ),
        )
        for share in timeline.shares()
    ]
    return _table(("rank", "compute", "exposed communication", "idle", "communication, overlapped or not"), rows)


def _op_table(timeline: Timeline) -> str:
    first = timeline.ranks()[0]
    table: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for span in timeline.spans:
        if span.rank == first:
            row = table[span.name, span.phase]
            row[0] += 1
            row[1] += span.duration_ns
    rows = sorted(
        ((name, phase, count, time) for (name, phase), (count, time) in table.items()), key=lambda row: -row[3]
    )
    return _table(("op", "phase", "count", "total ns"), rows[:_ROWS])


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        text = f"{value:,}" if isinstance(value, int) else escape(str(value))
        raw = value.rstrip("%") if isinstance(value, str) and value.endswith("%") else value
        return f'<td data-value="{escape(str(raw))}">{text}</td>'

    heads = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in head)
    body = "".join(f"<tr>{''.join(cell(value) for value in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
