"""The report's time and size on real traces, frames a second of a large timeline, and Perfetto's own count of slices.

`--data FOLDER` holds the eight Megatron ranks (`traces/megatron_gpt8b_tp8_8xA100`, as PyTorch's files); without it the
first part is left out. The browser is headless Chromium by selenium; Perfetto's `trace_processor` is the binary that
its Python package downloads, or `--trace-processor FILE`; what is not there is told. `--write` puts the figures into
RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from meshloom.chakra.file import write
from meshloom.chakra.timeline import Span, Timeline
from meshloom.chakra.timeline import write as write_timeline
from meshloom.chakra.trace import Node, NodeType, Trace
from meshloom.view.perfetto import write_perfetto
from meshloom.view.report import report
from meshloom.view.scene import scene
from results import section, write_section

FRAMES = 180


def command(*arguments: str) -> tuple[float, str]:
    """Seconds of a command of ours in a process of its own, and what it printed."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "meshloom.cli", *arguments], check=True, capture_output=True, text=True
    )
    return time.perf_counter() - begin, done.stdout


def megatron(data: Path, folder: Path) -> dict[str, Any]:
    """Seconds and bytes of the report of the eight ranks, measured beside predicted."""
    command("capture", str(data / "traces" / "megatron_gpt8b_tp8_8xA100"), "--out", str(folder))
    command("simulate", str(folder), "--cluster", "a100x8")
    times = sorted(command("report", str(folder))[0] for _ in range(3))
    seconds, _ = command("view", "timeline", str(folder))
    return {
        "report_s": times[1],
        "report_mb": (folder / "report.html").stat().st_size / 1e6,
        "slices": scene(folder).tracks.num_slices,
        "perfetto_s": seconds,
        "perfetto_mb": (folder / "timeline.perfetto-trace").stat().st_size / 1e6,
    }


def large(folder: Path, num_slices: int, num_ranks: int = 8) -> Path:
    """A run folder with a predicted timeline of `num_slices` slices on `num_ranks` ranks."""
    rng = np.random.default_rng(0)
    each = num_slices // num_ranks // 2
    spans = []
    for rank in range(num_ranks):
        for track in ("compute", "communication"):
            lengths, gaps = rng.integers(500, 20_000, each), rng.integers(0, 4_000, each)
            starts = np.cumsum(lengths + gaps) - lengths
            kinds = rng.integers(0, 40, each)
            spans += [
                Span(rank, track, f"{track} {kind}", int(start), int(length), 1)  # type: ignore[arg-type]
                for start, length, kind in zip(starts, lengths, kinds)
            ]
        write(Trace(nodes=[Node(id=1, name="op", type=NodeType.COMP)], attrs={"rank": rank}), folder / f"rank{rank}.et")
    end = max(span.end_ns for span in spans)
    write_timeline(
        Timeline(spans=spans, source="predicted", world_size=num_ranks, makespan_ns=end), folder / "timeline.json"
    )
    return folder


def frames(page: Path) -> dict[str, Any]:
    """Frames a second while the timeline zooms in and out and moves, and the slowest frame, in headless Chromium."""
    from selenium import webdriver
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1400,1000",
    ):
        options.add_argument(argument)
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    browser = webdriver.Chrome(options=options, service=service)
    browser.set_script_timeout(120)
    try:
        begin = time.perf_counter()
        browser.get(page.resolve().as_uri())
        WebDriverWait(browser, 120).until(lambda each: each.execute_script("return window.meshloom?.ready"))
        opened = time.perf_counter() - begin
        told: dict[str, Any] = browser.execute_async_script(
            """
            const done = arguments[arguments.length - 1], frames = arguments[0], line = window.meshloom.timelines[0];
            const times = [], draws = []; let at = performance.now(), count = 0;
            function frame(now) {
              times.push(now - at); at = now;
              const begin = performance.now();
              const zoom = Math.pow(0.5, 12 * Math.abs(Math.sin(count / frames * Math.PI)));
              const middle = line.length * (0.3 + 0.4 * count / frames), half = line.length * zoom / 2;
              line.from = middle - half; line.to = middle + half; line.draw();
              draws.push(performance.now() - begin);
              if (++count < frames) requestAnimationFrame(frame);
              else done({seconds: times.slice(2).reduce((a, b) => a + b) / 1000,
                         frames: times.length - 2, worst_ms: Math.max(...times.slice(2)),
                         draw_ms: draws.sort((a, b) => a - b)[draws.length >> 1]});
            }
            requestAnimationFrame(frame);
            """,
            FRAMES,
        )
        return {
            "open_s": opened,
            "fps": told["frames"] / told["seconds"],
            "worst_ms": told["worst_ms"],
            "draw_ms": told["draw_ms"],
        }
    finally:
        browser.quit()


def perfetto_count(path: Path, binary: str | None) -> tuple[int | None, str]:
    """How many slices Perfetto's trace_processor counts, or None and why not."""
    try:
        from perfetto.trace_processor import TraceProcessor, TraceProcessorConfig

        config = TraceProcessorConfig(bin_path=binary) if binary else TraceProcessorConfig()
        with TraceProcessor(trace=str(path), config=config) as processor:
            return next(iter(processor.query("select count(*) as n from slice"))).n, ""
    except Exception as error:  # whatever stops a binary that is downloaded: the figures of ours stand alone
        return None, f"its binary could not be had or started ({type(error).__name__})"


def schema_count(path: Path) -> int | None:
    """How many slices begin in the file as Perfetto's own schema reads it; None where its package is not there."""
    try:
        from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace as Schema
        from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TrackEvent
    except ImportError:
        return None
    trace = Schema.FromString(path.read_bytes())
    return sum(packet.track_event.type == TrackEvent.TYPE_SLICE_BEGIN for packet in trace.packet)


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = ["| what | figure |", "|---|---|"]
    if "megatron" in results:
        told = results["megatron"]
        rows += [
            f"| 8 Megatron ranks, {told['slices']:,} slices: report.html, median of three | {told['report_s']:.1f} s, "
            f"{told['report_mb']:.2f} MB |",
            f"| the same as a Perfetto trace | {told['perfetto_s']:.1f} s, {told['perfetto_mb']:.1f} MB |",
        ]
    told = results["large"]
    rows.append(
        f"| {told['slices']:,} slices on 8 ranks: report.html | {told['report_s']:.1f} s, {told['report_mb']:.1f} MB |"
    )
    if "fps" in told:
        rows += [
            f"| the same, from loading to the timeline | {told['open_s']:.1f} s |",
            f"| the same, zooming by 4096 and moving, {FRAMES} frames | {told['fps']:.0f} frames/s, slowest "
            f"{told['worst_ms']:.0f} ms, drawing {told['draw_ms']:.1f} ms |",
        ]
    count = results["perfetto"]
    rows.append(f"| slices written, and counted with Perfetto's schema | {count['written']:,}, {count['schema']} |")
    rows.append(
        "| slices that trace_processor counts | "
        + (f"{count['processor']:,} |" if count["processor"] is not None else f"not run: {count['why']} |")
    )
    return "\n".join(rows)


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--slices", type=int, default=1_000_000)
    parser.add_argument("--trace-processor")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        if options.data:
            results["megatron"] = megatron(options.data, root / "megatron")
        begin = time.perf_counter()
        path = report(large(root / "large", options.slices))
        results["large"] = {"slices": options.slices, "report_s": time.perf_counter() - begin,
                            "report_mb": path.stat().st_size / 1e6}  # fmt: skip
        if shutil.which("chromium") and shutil.which("chromedriver"):
            results["large"] |= frames(path)
        shown = scene(root / "megatron" if options.data else root / "large")
        trace = write_perfetto(shown.tracks, root / "timeline.perfetto-trace")
        count, why = perfetto_count(trace, options.trace_processor)
        schema = schema_count(trace)
        results["perfetto"] = {"written": shown.tracks.num_slices,
                               "schema": f"{schema:,}" if schema is not None else "not installed",
                               "processor": count, "why": why}  # fmt: skip
    text = section("Pictures and pages", "python benchmarks/view.py --data ../shared/data --write", table(results))
    print(json.dumps(results) if options.json else text)
    if options.write:
        write_section(text)


if __name__ == "__main__":
    main()
