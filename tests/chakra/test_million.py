"""A chain of a million nodes: recursion nowhere, and no more memory than a laptop has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from meshloom import Node, Trace, check, write
from meshloom.capture.convert import convert_rank
from meshloom.chakra.trace import NodeType
from meshloom.chakra.wire import StoredNodes

LENGTH = 1_000_000

# In a process of its own, so that its peak is that of the work.
_WORK = """
import json, resource, sys
from pathlib import Path
from meshloom import check, read
from meshloom.chakra.formats import convert
from meshloom.chakra.summary import summarize
path = Path(sys.argv[1])
trace = convert(path, path.with_name("again.et.gz"))
print(json.dumps({
    "nodes": len(trace.nodes),
    "findings": len(check(trace)),
    "last": trace.nodes[-1].data_deps,
    "flops": summarize(trace.nodes).flops,
    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}))
"""


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    nodes = StoredNodes()
    for number in range(1, LENGTH + 1):
        attrs = {"is_cpu_op": True, "num_ops": 2, "tensor_size": number, "op_class": "memory", "module": "layer"}
        needs = [number - 1] if number > 1 else []
        nodes.append(
            Node(id=number, name="aten::add", type=NodeType.COMP, data_deps=needs, start_ns=number, attrs=attrs)
        )
    return write(Trace(nodes=nodes), tmp_path_factory.mktemp("chain") / "rank0.et")


def test_converts_and_checks_within_a_gibibyte(chain: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _WORK, str(chain)], check=True, capture_output=True, text=True)
    told = json.loads(done.stdout)
    assert told["peak_mib"] < 1024
    del told["peak_mib"]
    assert told == {"nodes": LENGTH, "findings": 0, "last": [LENGTH - 1], "flops": 2 * LENGTH}


def test_info_draws_its_numbers_from_many_parts(chain: Path) -> None:
    command = [sys.executable, "-m", "meshloom.cli", "info", str(chain), "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    summary = json.loads(done.stdout)["0"]["summary"]
    assert summary["num_nodes"] == LENGTH
    assert summary["flops"] == 2 * LENGTH
    assert summary["num_bytes"] == LENGTH * (LENGTH + 1) // 2
    assert summary["first"]["node"] == 1
    assert summary["last"]["node"] == LENGTH


def test_a_deep_nest_of_ops_is_captured(tmp_path: Path) -> None:
    depth = 100_000  # Python's own limit is 1,000
    name = "aten::linear"  # composite: each encloses the next
    no_tensors: dict[str, list[object]] = {"values": [], "shapes": [], "types": [], "strides": []}
    nodes = [
        {
            "id": number + 1,
            "name": name,
            "inputs": no_tensors,
            "outputs": no_tensors,
            "attrs": [{"name": "rf_id", "type": "uint64", "value": number}],
        }
        for number in range(1, depth + 1)
    ]
    events = [
        {
            "ph": "X",
            "cat": "cpu_op",
            "name": name,
            "ts": number,
            "dur": 2 * (depth - number) + 1,
            "tid": 7,
            "args": {"Record function id": number},
        }
        for number in range(1, depth + 1)
    ]
    (tmp_path / "host.json").write_text(json.dumps({"schema": "1.1.1-chakra.0.0.4", "nodes": nodes}))
    (tmp_path / "device.json").write_text(json.dumps({"traceEvents": events}))
    trace, warnings = convert_rank(tmp_path / "host.json", tmp_path / "device.json", tmp_path / "rank0.et")
    assert warnings == []
    assert len(trace.nodes) == depth
    assert [node.ctrl_deps for node in trace.nodes[:3]] == [[], [1], [2]]
    assert check(trace) == []
