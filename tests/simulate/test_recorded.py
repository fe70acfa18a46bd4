"""A device calibrated on recorded traces: a known speed is found again, and a real recording gives a plausible one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from meshloom.capture.convert import convert_rank
from meshloom.chakra.file import read_all
from meshloom.chakra.trace import Node, NodeType, Trace
from meshloom.errors import TraceError
from meshloom.hardware.device import load_device
from meshloom.simulate.calibrate import Collected, predict_collectives
from meshloom.simulate.compute import gemm_seconds
from meshloom.simulate.recorded import calibrate, device_toml

DEVICE = load_device("a100-80gb-sxm")


def _trace(slow: float) -> dict[int, Trace]:
    """What an A100 would have recorded, everything `slow` times as long, on two ranks of which one waits."""
    nodes = []
    for number, gemm in enumerate(((1, 4096, 4096, 4096), (1, 8192, 1024, 4096), (1, 2048, 8192, 2048)), 1):
        length = round(gemm_seconds((gemm,), DEVICE, "float16")[0] * slow * 1e9)
        attrs = {"gemm": list(gemm), "dtype": "float16", "op_class": "gemm", "is_cpu_op": False}
        nodes.append(Node(id=number, name="gemm", type=NodeType.COMP, duration_ns=length, attrs=attrs))
    attrs = {"op_class": "memory", "tensor_size": 2_039_000_000, "is_cpu_op": False}
    nodes.append(Node(id=4, name="copy", type=NodeType.COMP, duration_ns=round(1e6 * slow), attrs=attrs))
    ranks = {}
    sample = Collected("all_reduce", 2, 1e8, 0.0)
    (seconds,) = predict_collectives(DEVICE, [sample], DEVICE.collectives["all_reduce"])
    for rank, wait in ((0, 0), (1, 10**8)):
        attrs = {"comm_type": 0, "comm_size": 10**8, "pg_name": "1", "comm_ranks": [0, 1], "is_cpu_op": False}
        length = round(seconds * slow * 1e9) + wait
        reduce = Node(id=5, name="reduce", type=NodeType.COMM_COLL, duration_ns=length, attrs=attrs)
        ranks[rank] = Trace(nodes=[*nodes, reduce], attrs={"rank": rank, "world_size": 2})
    return ranks


def test_a_known_slowdown_is_found_again(tmp_path: Path) -> None:
    found = calibrate(_trace(1.25), DEVICE, "mine").device
    assert found.sustained == pytest.approx(0.8, rel=2e-3)
    assert found.memory_efficiency == pytest.approx(0.8, rel=2e-3)
    ratio = found.collectives["all_reduce"].wire(2) / DEVICE.collectives["all_reduce"].wire(2)
    assert ratio == pytest.approx(0.8, rel=1e-3)
    assert found.collectives["all_gather"] == DEVICE.collectives["all_gather"], "never recorded"
    (tmp_path / "mine.toml").write_text(device_toml(found))
    assert load_device(str(tmp_path / "mine.toml")) == found


def test_traces_without_device_kernels_are_refused() -> None:
    empty = {0: Trace(nodes=[], attrs={"rank": 0, "world_size": 1})}
    with pytest.raises(TraceError, match="measured device kernels, these hold none"):
        calibrate(empty, replace(DEVICE), "mine")


@pytest.mark.shared
def test_a_recorded_a100(shared: Path, tmp_path: Path) -> None:
    pairs = shared / "traces" / "megatron_gpt8b_tp8_8xA100"
    for rank in range(2):
        host, device = (pairs / f"{kind}_{rank}.json.gz" for kind in ("host", "device"))
        convert_rank(host, device, tmp_path / f"rank{rank}.et", rank=rank)
    found = calibrate(read_all(tmp_path), DEVICE, "mine").device
    assert 0.6 < found.sustained <= 1.0
    assert 0.3 < found.memory_efficiency <= 1.0
