"""Files of 2023: Chakra 0.0.1 to 0.0.3, the feeder's JSON, and ASTRA-sim's text workloads."""

from __future__ import annotations

import json
import struct
import tarfile
from pathlib import Path
from typing import Any

import pytest

from meshloom import Node, Trace, check, read, write
from meshloom.chakra.attribute import varint
from meshloom.chakra.file import stream
from meshloom.chakra.formats import convert
from meshloom.chakra.text import read_workload, workload_trace
from meshloom.chakra.trace import CommType, NodeType
from meshloom.errors import TraceError

# Messages as the old definitions number them, made by hand: no installed package writes them any more.


def _number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value % (1 << 64))


def _text(field: int, value: bytes | str) -> bytes:
    body = value.encode() if isinstance(value, str) else value
    return varint(field << 3 | 2) + varint(len(body)) + body


def _float(field: int, value: float) -> bytes:
    return varint(field << 3 | 5) + struct.pack("<f", value)


def _attribute(name: str, kind: int, value: bytes) -> bytes:
    return _text(11, _text(1, name) + _number(2, kind) + value)


def _file(path: Path, *messages: bytes) -> Path:
    path.write_bytes(b"".join(varint(len(body)) + body for body in messages))
    return path


def _facts(path: Path) -> list[tuple[Any, ...]]:
    trace = read(path)
    assert [part.nodes[:] for part in stream(path)] == [trace.nodes]
    return [(node.id, node.name, node.type, node.data_deps, node.duration_ns, node.attrs) for node in trace.nodes]


def test_version_1(tmp_path: Path) -> None:
    path = _file(
        tmp_path / "a.et",
        _number(1, 0) + _text(2, "work") + _number(3, 3) + _number(7, 5) + _number(12, 100) + _number(6, 64),
        _number(1, 1) + _text(2, "reduce") + _number(3, 6) + _number(4, 0) + _number(13, 3) + _number(18, 4096)
        + _number(14, 1) + _number(14, 0),
        _number(1, 2) + _text(2, "send") + _number(3, 4) + _number(4, 0) + _number(4, 1) + _number(16, 0)
        + _number(17, 3) + _number(18, 8) + _number(19, 7),
    )  # fmt: skip
    assert _facts(path) == [
        (0, "work", NodeType.COMP, [], 5000, {"tensor_size": 64, "num_ops": 100}),
        (1, "reduce", NodeType.COMM_COLL, [0], 0,
         {"comm_type": CommType.ALL_GATHER, "comm_size": 4096, "involved_dim": [True, False]}),
        (2, "send", NodeType.COMM_SEND, [0, 1], 0, {"comm_src": 0, "comm_dst": 3, "comm_size": 8, "comm_tag": 7}),
    ]  # fmt: skip
    assert read(path).get("read_from_schema") == "0.0.1"


def test_version_2(tmp_path: Path) -> None:
    path = _file(
        tmp_path / "a.et",
        _number(1, 7) + _text(2, "work") + _number(3, 3) + _text(5, "[1]") + _attribute("runtime", 1, _number(5, 9))
        + _attribute("loss", 0, _float(4, 0.5)) + _attribute("where", 2, _text(6, "here"))
        + _attribute("shape", 4, _number(8, 2) + _number(8, -3)),
        _number(1, 8) + _text(2, "a2a") + _number(3, 6) + _text(4, varint(7))
        + _attribute("comm_type", 1, _number(5, 1)),
    )  # fmt: skip
    assert _facts(path) == [
        (7, "work", NodeType.COMP, [], 9000, {"loss": 0.5, "where": "here", "shape": [2, -3]}),
        (8, "a2a", NodeType.COMM_COLL, [7], 0, {"comm_type": CommType.ALL_TO_ALL}),
    ]
    assert read(path).nodes[0].inputs == ("[1]", "", "")


def test_version_3_with_metadata(tmp_path: Path) -> None:
    path = _file(
        tmp_path / "a.et",
        _text(1, _text(1, "schema") + _number(2, 4) + _text(8, "1.0.1")),
        _number(1, 1) + _text(2, "work") + _number(3, 4) + _attribute("is_cpu_op", 0, _number(4, 1))
        + _attribute("num_ops", 3, _number(7, 12)) + _attribute("size", 2, _number(6, 5)),
        _number(1, 2) + _text(2, "bcast") + _number(3, 7) + _number(4, 1) + _attribute("comm_type", 3, _number(7, 4))
        + _attribute("names", 9, _text(13, "x")),
    )  # fmt: skip
    assert _facts(path) == [
        (1, "work", NodeType.COMP, [], 0, {"is_cpu_op": True, "num_ops": 12, "size": 5}),
        (2, "bcast", NodeType.COMM_COLL, [1], 0, {"comm_type": CommType.BROADCAST, "names": ["x"]}),
    ]
    assert read(path).get("schema") == "1.0.1"
    assert read(path).get("read_from_schema") == "0.0.3"
    new = tmp_path / "new.et"
    convert(path, new)
    assert read(new).nodes == read(path).nodes


def test_a_damaged_old_file(tmp_path: Path) -> None:
    path = _file(tmp_path / "a.et", _number(1, 1) + _text(2, "work")[:-2])
    with pytest.raises(TraceError, match="message 0: expected a node"):
        read(path)


@pytest.mark.shared
def test_the_feeders_json(shared: Path, tmp_path: Path) -> None:
    with tarfile.open(shared / "traces" / "single_files" / "chakra_json_trace.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    path = tmp_path / "jsonData" / "chakra.0.json"
    told = json.loads(path.read_text())["workload_graph"]
    trace = convert(path, tmp_path / "a.et")
    nodes = read(tmp_path / "a.et").nodes
    assert nodes == trace.nodes
    assert [(node.id, node.name, node.duration_ns, node.data_deps) for node in nodes] == [
        (row["Id"], row["Name"], 1000 * row.get("runtime", 0), row["data_deps"]) for row in told
    ]
    assert sum(node.is_comm for node in nodes) == 21


WORKLOAD = """HYBRID_DATA_MODEL
2
first -1 100 NONE 0 120 NONE 0 90 ALLREDUCE 4096 5
last -1 50 ALLGATHER 2048 60 ALLREDUCE 2048 40 NONE 0 0
"""


def test_a_text_workload(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(WORKLOAD)
    workload = read_workload(tmp_path / "a.txt")
    traces = {
        rank: workload_trace(
            workload,
            rank=rank,
            world_size=4,
            groups={"tp": [rank // 2 * 2, rank // 2 * 2 + 1], "dp": [rank % 2, rank % 2 + 2]},
            num_passes=2,
        )
        for rank in range(4)
    }
    assert check(traces) == []
    nodes = list(traces[3].nodes)
    once = [
        ("first.forward", 100_000), ("last.forward", 50_000), ("all_gather", 0), ("last.weight_gradient", 40_000),
        ("last.input_gradient", 60_000), ("all_reduce", 0), ("first.weight_gradient", 90_000), ("all_reduce", 0),
        ("first.update", 5_000), ("first.input_gradient", 120_000),
    ]  # fmt: skip
    assert [(node.name, node.duration_ns) for node in nodes] == once + once
    gather, inner, outer = (nodes[place] for place in (2, 5, 7))
    assert (gather.get("comm_ranks"), gather.get("comm_size"), gather.get("comm_output_size")) == ([2, 3], 2048, 4096)
    assert (inner.get("comm_ranks"), outer.get("comm_ranks")) == ([2, 3], [1, 3])
    # the weight gradient's collective holds up the next pass of its layer, not what follows in this one
    needs = [set(node.ctrl_deps) for node in nodes]
    assert outer.id not in needs[9]
    assert nodes[8].id in needs[10]
    assert inner.id in needs[6]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "line 1: expected one of"),
        ("NEURAL\n1\n", "line 1: expected one of"),
        ("DATA\nmany\n", "line 2: expected the number of layers"),
        ("DATA\n2\na -1 1 NONE 0 1 NONE 0 1 NONE 0 0\n", "line 2: expected 2 layers"),
        ("DATA\n1\na -1 1 NONE 0 1 SOMETIMES 0 1 NONE 0 0\n", "line 3: expected name"),
        ("DATA\n1\na -1 1 NONE\n", "line 3: expected name"),
    ],
)
def test_what_is_no_workload(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(TraceError, match=told):
        read_workload(tmp_path / "a.txt")


@pytest.mark.parametrize("version", ["0.0.4", "1.0.0", "1.1.1-chakra.0.0.4"])
def test_todays_versions_are_not_old(tmp_path: Path, version: str) -> None:
    trace = Trace(nodes=[Node(id=1, name="a", type=NodeType.COMP)], version=version)
    assert read(write(trace, tmp_path / "a.et")) == trace
    assert convert(tmp_path / "a.et", tmp_path / "b.et", version="1.0.0").version == "1.0.0"
    assert read(tmp_path / "b.et").version == "1.0.0"
