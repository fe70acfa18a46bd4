"""The folder for ASTRA-sim: every file, and what they must agree on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meshloom.chakra.file import read, read_all
from meshloom.errors import TraceError
from meshloom.hardware.cluster import load_cluster
from meshloom.simulate.export import export_astra_sim


def test_the_folder_holds_what_astra_sim_reads(demo_run: Path, tmp_path: Path) -> None:
    traces = read_all(demo_run)
    files = export_astra_sim(traces, load_cluster("h100x8"), tmp_path / "astra")
    names = {path.name for path in files}
    assert names == {f"workload.{rank}.et" for rank in traces} | {
        "network.yml", "system.json", "memory.json", "comm_group.json",
    }  # fmt: skip
    for rank, trace in traces.items():
        copied = read(tmp_path / "astra" / f"workload.{rank}.et")
        assert list(copied.nodes) == list(trace.nodes)
    lines = dict(line.split(": ") for line in (tmp_path / "astra" / "network.yml").read_text().splitlines())
    assert json.loads(lines["npus_count"]) == [len(traces)]
    assert json.loads(lines["bandwidth"]) == [360.0], "450 GB/s, of which 0.8 are reached"
    groups = json.loads((tmp_path / "astra" / "comm_group.json").read_text())
    used = {node.get("pg_name") for trace in traces.values() for node in trace.nodes if node.is_comm} - {None}
    assert set(groups) == used != set()
    assert all(set(ranks) <= set(traces) for ranks in groups.values())
    system = json.loads((tmp_path / "astra" / "system.json").read_text())
    assert len(system["all-reduce-implementation"]) == 1
    assert 0 < system["peak-perf"] < 989.4


def test_missing_ranks_are_refused(demo_run: Path, tmp_path: Path) -> None:
    traces = read_all(demo_run)
    del traces[1]
    with pytest.raises(TraceError, match="rank 1 has none"):
        export_astra_sim(traces, load_cluster("h100x8"), tmp_path)
