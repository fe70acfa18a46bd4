"""What the demo leaves: a run folder that tells everything, with a loss that fell."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

from meshloom.chakra import timeline
from meshloom.chakra.file import read_all


def test_the_run_folder_is_whole(demo_run: Path) -> None:
    names = {path.name for path in demo_run.iterdir()}
    assert {"model.json", "plan.toml", "run.json", "metrics.jsonl", "logs", "trace", "synth.tp2.dp2", "timeline.json",
            "report.html", "graph.svg"} <= names  # fmt: skip
    assert json.loads((demo_run / "run.json").read_text())["state"] == "finished"
    assert not list(demo_run.rglob("*.part"))


def test_the_loss_falls(demo_run: Path) -> None:
    losses = [json.loads(line)["loss"] for line in (demo_run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 20
    assert max(losses[-5:]) < 0.75 * losses[0]


def test_two_captured_and_four_synthesised_ranks(demo_run: Path) -> None:
    captured, imagined = read_all(demo_run), read_all(demo_run / "synth.tp2.dp2")
    assert list(captured) == [0, 1]
    assert list(imagined) == [0, 1, 2, 3]
    assert {trace.get("source") for trace in captured.values()} == {"capture"}
    assert {trace.get("source") for trace in imagined.values()} == {"synth"}
    axes = [node.get("comm_axis") for node in imagined[3].nodes if node.is_comm]
    assert {"tp", "dp"} == set(axes)
    groups = {node.get("comm_axis"): node.get("comm_ranks") for node in imagined[3].nodes if node.is_comm}
    assert groups == {"tp": [2, 3], "dp": [1, 3]}


def test_both_are_predicted(demo_run: Path) -> None:
    for folder, num_ranks in ((demo_run, 2), (demo_run / "synth.tp2.dp2", 4)):
        told = timeline.read(folder / "timeline.json")
        assert told.ranks() == list(range(num_ranks))
        assert told.makespan_ns > 0


def test_what_it_said(demo_run: Path) -> None:
    said = (demo_run.parent / "stdout.txt").read_text()
    for text in ("tokens/s", "no fault", "predicted on", "idle", f"everything lies in {demo_run}"):
        assert text in said


def test_pictures(demo_run: Path) -> None:
    root = ET.parse(demo_run / "graph.svg").getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "transformer.h.1" in texts
    assert "all_reduce (tp)" in texts
    page = (demo_run / "report.html").read_text()
    assert "Synthesised: tp2.dp2" in page
    assert "default-src 'none'" in page, "it may not reach any network"
    assert not any(way in page for way in ('src="http', 'href="http', "url(http", "@import"))
