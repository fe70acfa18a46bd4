"""`meshloom.record` in a plain torch script: what is recorded, and that nothing is lost when the script ends early."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import meshloom
from meshloom.chakra.check import check
from meshloom.chakra.file import read_all
from meshloom.chakra.trace import CommType
from meshloom.errors import UsageError

SCRIPT = Path(__file__).with_name("loop.py")
RANKS = Path(__file__).with_name("ranks.py")


@pytest.mark.parametrize(("how", "code"), [("end", 0), ("raise", 1), ("sigterm", 128 + 15)])
def test_a_plain_script(tmp_path: Path, how: str, code: int) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path / "trace"), how]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == code, result.stderr
    trace = meshloom.read(tmp_path / "trace" / "rank0.et")
    assert check(trace) == []
    products = [node for node in trace.nodes if node.get("op_class") == "gemm"]
    forward = [node for node in products if node.name == "aten::addmm"]
    assert len(forward) == 4, "two layers, two steps"
    assert {node.get("module") for node in forward} == {"0", "2"}
    assert trace.get("num_steps") == 2
    table = (tmp_path / "trace" / "rank0.stacks.txt").read_text().splitlines()
    assert table[0] == f"# rank=0 world_size=1 step=3 num_steps=2: {len(trace.nodes):,} nodes"
    rows = [line.split(maxsplit=3) for line in table[2:]]
    assert sum(int(row[2]) for row in rows) == len(trace.nodes)
    assert abs(sum(float(row[1]) for row in rows) - sum(node.duration_ns for node in trace.nodes) / 1000) < len(rows)
    assert [row[2] for row in rows if row[3].endswith("> 0 > aten::addmm")] == ["2"]
    assert trace.get("step") == 3
    assert sum(node.name.startswith("Optimizer.step") for node in trace.nodes) == 2


def test_each_step_in_a_folder_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path), "separate"]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    traces = [meshloom.read(tmp_path / f"step{step}" / "rank0.et") for step in (3, 4)]
    assert [(trace.get("step"), trace.get("num_steps")) for trace in traces] == [(3, 1), (4, 1)]
    for trace in traces:
        assert check(trace) == []
        assert sum(node.name == "aten::addmm" for node in trace.nodes if node.get("op_class") == "gemm") == 2
    assert not (tmp_path / "rank0.et").exists()


def _two_ranks(folder: Path, what: str) -> dict[int, meshloom.Trace]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*command, str(RANKS), str(folder), what], capture_output=True, timeout=180, check=True)
    traces = read_all(folder)
    assert check(traces) == []
    return traces


def test_fsdp(tmp_path: Path) -> None:
    """Fully sharded: each of two layers is gathered twice, and its gradient scattered."""
    for trace in _two_ranks(tmp_path, "fsdp").values():
        comm = [node for node in trace.nodes if node.is_comm]
        kinds = [CommType(node.get("comm_type")).name.lower() for node in comm]
        assert kinds == ["all_gather"] * 4 + ["reduce_scatter"] * 2
        weights = [(8 * 16 + 16) * 4, (16 * 4 + 4) * 4]  # bytes
        assert [node.get("comm_output_size") for node in comm[:4]] == [*weights, *reversed(weights)]
        assert [node.get("comm_size") for node in comm[4:]] == list(reversed(weights))
        assert all(node.get("comm_ranks") == [0, 1] for node in comm)


def test_messages_and_collectives(tmp_path: Path) -> None:
    for rank, trace in _two_ranks(tmp_path, "comm").items():
        comm = [node for node in trace.nodes if node.is_comm]
        told = [(node.type.name, node.get("comm_src"), node.get("comm_dst"), node.get("comm_tag")) for node in comm[:4]]
        send, receive = ("COMM_SEND", rank, 1 - rank), ("COMM_RECV", 1 - rank, rank)
        first = [(*send, 5), (*receive, 6)] if rank == 0 else [(*receive, 5), (*send, 6)]
        assert told == [*first, (*send, 7), (*receive, 7)]
        kinds = [CommType(node.get("comm_type")).name.lower() for node in comm[4:]]
        assert kinds == ["all_to_all", "broadcast", "all_gather", "barrier"]
        assert {node.get("comm_size") for node in comm[:7]} == {4 * 3 * 4}


def test_numbers_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="active of at least 1"):
        meshloom.record(tmp_path, active=0)
