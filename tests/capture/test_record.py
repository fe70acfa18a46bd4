"""`meshloom.record` in a plain torch script: what is recorded, and that nothing is lost when the script ends early."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import meshloom
from meshloom.chakra.check import check
from meshloom.errors import UsageError

SCRIPT = Path(__file__).with_name("loop.py")


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
    assert trace.get("step") == 3
    assert sum(node.name.startswith("Optimizer.step") for node in trace.nodes) == 2


def test_numbers_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="active of at least 1"):
        meshloom.record(tmp_path, active=0)
