"""Files of others: real Megatron pairs, every schema of the host trace, and files that need a repair."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from meshloom import Node, read
from meshloom.capture.convert import convert_rank
from meshloom.capture.host import read_host
from meshloom.capture.link import link
from meshloom.capture.repair import read_json
from meshloom.chakra.check import check
from meshloom.chakra.file import read_all
from meshloom.errors import TraceError
from tests.conftest import Meshloom


@pytest.mark.shared
def test_the_eight_megatron_ranks(shared: Path, tmp_path: Path, meshloom: Meshloom) -> None:
    pairs = shared / "traces" / "megatron_gpt8b_tp8_8xA100"
    result = meshloom("capture", str(pairs), "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    traces = read_all(tmp_path)
    assert list(traces) == list(range(8))
    assert check(traces) == []
    for trace in traces.values():
        device = [node for node in trace.nodes if not node.get("is_cpu_op")]
        kinds = Counter("memset" if node.name.startswith("Memset") else "copy" if node.name.startswith("Memcpy")
                        else "kernel" for node in device)  # fmt: skip
        assert kinds == {"kernel": 690, "copy": 6, "memset": 81}
        assert sum(bool(node.get("scope")) for node in trace.nodes) == 5422
        collectives = [node for node in trace.nodes if node.is_comm]
        facts = Counter((node.get("comm_type"), node.get("comm_size"), node.get("dtype"), node.get("comm_reduction"),
                         tuple(node.get("comm_ranks"))) for node in collectives)  # fmt: skip
        world = tuple(range(8))
        assert facts == {(0, 64 << 20, "float16", "sum", world): 81, (0, 32 << 10, "float32", "sum", world): 3}


@pytest.mark.shared
def test_kernels_have_successors_and_stand_in_their_streams_order(shared: Path, tmp_path: Path) -> None:
    pairs = shared / "traces" / "megatron_gpt8b_tp8_8xA100"
    trace, _ = convert_rank(pairs / "host_0.json.gz", pairs / "device_0.json.gz", tmp_path / "rank0.et")
    needed = {dependency for node in trace.nodes for dependency in (*node.data_deps, *node.ctrl_deps)}
    streams: dict[int, list[Node]] = {}
    for node in trace.nodes:
        if not node.get("is_cpu_op"):
            streams.setdefault(node.get("stream"), []).append(node)
    for nodes in streams.values():
        assert [node.start_ns for node in nodes] == sorted(node.start_ns for node in nodes)
        assert sum(node.id in needed for node in nodes) >= len(nodes) - 1
        for before, after in pairwise(nodes):
            assert before.id in (*after.data_deps, *after.ctrl_deps)
            assert before.start_ns + before.duration_ns <= after.start_ns
    # what reads the result of a collective on another stream waits for it
    collective = next(node for node in trace.nodes if node.is_comm)
    users = [node for node in trace.nodes if collective.id in node.data_deps and not node.is_comm]
    assert users
    assert all(user.start_ns >= collective.start_ns + collective.duration_ns for user in users)


@pytest.mark.shared
def test_against_the_reference(shared: Path, tmp_path: Path) -> None:
    """Same ops, kernels and collectives as the reference tools made, with the same times and sizes."""
    pairs = shared / "traces" / "megatron_gpt8b_tp8_8xA100"
    ours, _ = convert_rank(pairs / "host_3.json.gz", pairs / "device_3.json.gz", tmp_path / "rank3.et")
    oracle = read(shared / "traces" / "chakra_oracle" / "megatron_gpt8b_tp8.3.et.gz")

    def device(nodes: list[Node]) -> Counter[tuple[str, int, int, Any]]:
        return Counter((node.name, node.duration_ns, node.get("stream"), node.get("comm_size")) for node in nodes
                       if not node.get("is_cpu_op") and not node.name.startswith("Memset"))  # fmt: skip

    assert device(ours.nodes) == device(oracle.nodes)
    host = Counter(node.name for node in ours.nodes if node.get("is_cpu_op"))
    told = Counter(node.name for node in oracle.nodes if node.get("is_cpu_op"))
    del told["[pytorch|profiler|execution_trace|thread]"]
    assert host == told


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("param_hf_gpt2_1gpu_schema1.1.0.host.json.gz", 27_000),
        ("param_resnet_1gpu_schema1.0.3.host.json.gz", 14_000),
        ("param_resnet_1gpu_schema1.1.1.host.json.gz", 14_000),
    ],
)
def test_every_schema_is_read(shared: Path, name: str, count: int) -> None:
    warnings: list[str] = []
    ops = read_host(shared / "traces" / "single_files" / name, warnings)
    assert warnings == []
    assert len(ops) > count
    assert any(ref.dtype == "float32" for op in ops for refs in op.inputs for ref in refs)
    assert all(op.thread >= 1 for op in ops)


@pytest.mark.shared
def test_a_pair_of_different_runs_is_refused(shared: Path, demo_run: Path) -> None:
    other = shared / "traces" / "simple_add_1xA100" / "device_0.json.gz"
    with pytest.raises(TraceError, match=r"are not there, the first is .*; are they of one run\?"):
        link(demo_run / "trace" / "rank0.host.json", other)


def test_without_ids_ops_pair_by_name_and_order(demo_run: Path, tmp_path: Path) -> None:
    trace = demo_run / "trace"
    device = json.loads((trace / "rank0.device.json").read_text())
    for event in device["traceEvents"]:
        event.get("args", {}).pop("Record function id", None)
    (tmp_path / "device.json").write_text(json.dumps(device))
    by_id = link(trace / "rank0.host.json", trace / "rank0.device.json")
    by_name = link(trace / "rank0.host.json", tmp_path / "device.json")
    assert by_name.warnings == []
    times = {op.rf_id: (op.start_ns, op.duration_ns) for op in by_id.ops}
    moved = [op.name for op in by_name.ops if times[op.rf_id] != (op.start_ns, op.duration_ns)]
    assert set(moved) <= {"gloo:all_reduce"}, "only what gloo's worker threads ran may change places"


def _host_text(demo_run: Path) -> str:
    return (demo_run / "trace" / "rank0.host.json").read_text()


def test_gzip_and_several_documents(demo_run: Path, tmp_path: Path) -> None:
    text = _host_text(demo_run)
    empty = json.dumps({"schema": "1.1.1-chakra.0.0.4", "nodes": []})
    for name, content in (("two.json", empty + "\n" + text), ("two.json.gz", text + empty)):
        path = tmp_path / name
        path.write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
        warnings: list[str] = []
        assert len(read_host(path, warnings)) == len(read_host(demo_run / "trace" / "rank0.host.json", []))
        assert len(warnings) == 1
        assert "2 JSON documents in one file" in warnings[0]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_truncated_tail(demo_run: Path, tmp_path: Path, share: float) -> None:
    text = _host_text(demo_run)
    path = tmp_path / "cut.json"
    path.write_text(text[: int(share * len(text))])
    warnings: list[str] = []
    whole = len(read_host(demo_run / "trace" / "rank0.host.json", []))
    kept = len(read_host(path, warnings))
    assert abs(kept / whole - share) < 0.1
    assert "ends in the middle" in warnings[0]


def test_names_that_are_not_utf_8(demo_run: Path, tmp_path: Path) -> None:
    raw = (demo_run / "trace" / "rank0.host.json").read_bytes()
    path = tmp_path / "latin.json"
    path.write_bytes(raw.replace(b"aten::tanh", b"aten::t\xe4nh"))
    warnings: list[str] = []
    assert any("\ufffd" in op.name for op in read_host(path, warnings))
    assert "no UTF-8" in warnings[0]


@pytest.mark.parametrize("text", ["", "{", "[1, 2", "hello", '{"schema": 3}', '{"schema": "1.1.1", "nodes": 5}'])
def test_what_cannot_be_repaired_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(TraceError, match=r"bad\.json: "):
        read_host(path, [])


def test_an_unknown_schema_is_named(tmp_path: Path) -> None:
    path = tmp_path / "new.json"
    path.write_text('{"schema": "9.0", "nodes": []}')
    with pytest.raises(TraceError, match=r"schema 1\.0\.1 to 1\.1\.1 .* got '9\.0'"):
        read_host(path, [])


def test_no_json_is_read_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="expected a thing, got 'No such file"):
        read_json(tmp_path / "missing.json", dict, "a thing", [])


def test_capture_again_gives_the_same_bytes(demo_run: Path, tmp_path: Path, meshloom: Meshloom) -> None:
    result = meshloom("capture", str(demo_run), "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    for rank in (0, 1):
        name = f"rank{rank}.et"
        assert (tmp_path / name).read_bytes() == (demo_run / "trace" / name).read_bytes()


def test_a_rank_that_fails_does_not_stop_the_others(demo_run: Path, tmp_path: Path, meshloom: Meshloom) -> None:
    for path in (demo_run / "trace").glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "rank1.host.json").write_text("no trace")
    result = meshloom("capture", str(tmp_path))
    assert result.returncode == 1
    assert "rank1.host.json" in result.stderr
    assert (tmp_path / "rank0.et").is_file()
    assert not (tmp_path / "rank1.et").exists()
