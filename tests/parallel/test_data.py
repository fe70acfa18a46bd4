"""The reducer's twin sends what DistributedDataParallel sends, in the same order."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshloom.chakra.file import read_all
from meshloom.chakra.trace import Trace
from meshloom.cli.synth import synth
from tests.conftest import Meshloom


def _sent(trace: Trace, axis: str) -> list[tuple[int, str]]:
    return [(node.get("comm_size"), node.get("dtype")) for node in trace.nodes if node.get("comm_axis") == axis]


def test_twin_equals_ddp_in_the_demo(demo_run: Path, tmp_path: Path) -> None:
    synth(model="gpt2-tiny", plan="dp2", micro_batch=4, gradient_accumulation=1, seq_length=128, objective=None,
          out=tmp_path / "synth")  # fmt: skip
    captured, imagined = read_all(demo_run)[0], read_all(tmp_path / "synth")[0]
    assert len(_sent(captured, "dp")) >= 2
    assert _sent(captured, "dp") == _sent(imagined, "dp")


@pytest.mark.parametrize("accumulation", [3])
def test_gradients_are_reduced_in_the_last_micro_batch_only(
    accumulation: int, tmp_path: Path, meshloom: Meshloom
) -> None:
    options = ["--model", "gpt2-tiny", "--plan", "dp2", "--gradient-accumulation", str(accumulation)]
    run = ["--tokenizer", "bytes", "--data", "sample", "--max-steps", "3", "--trace", "--out", str(tmp_path / "run")]
    result = meshloom("train", *options, *run)
    assert result.returncode == 0, result.stderr
    result = meshloom("synth", *options, "--out", str(tmp_path / "synth"))
    assert result.returncode == 0, result.stderr
    captured, imagined = read_all(tmp_path / "run")[1], read_all(tmp_path / "synth")[1]
    assert sum(size for size, _ in _sent(captured, "dp")) == 463_360 * 4
    assert _sent(captured, "dp") == _sent(imagined, "dp")
