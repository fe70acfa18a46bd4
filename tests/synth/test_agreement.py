"""The two commands agree, as a user runs them; `tests/agreement` holds every plan and model, and dependencies too."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from meshloom.chakra.check import check
from meshloom.chakra.file import read_all
from meshloom.chakra.trace import Node, Trace
from tests.conftest import Meshloom

# A fake tensor makes autograd add gradients into new memory where real ones are added in place.
_SAME = {"aten::add_": "aten::add"}


def _work(trace: Trace) -> Counter[tuple[str, str, str, str]]:
    nodes = [node for node in trace.nodes if not node.is_comm and node.get("op_class") != "host"]
    return Counter(
        (_SAME.get(node.name, node.name), node.get("output_shapes"), node.get("dtype"), node.get("phase"))
        for node in nodes
    )


def _sent(trace: Trace) -> list[tuple[object, ...]]:
    def facts(node: Node) -> tuple[object, ...]:
        return tuple(
            node.get(name)
            for name in (
                "comm_type",
                "comm_size",
                "dtype",
                "pg_name",
                "comm_ranks",
                "phase",
                "comm_src",
                "comm_dst",
                "comm_tag",
                "comm_axis",
            )
        )

    return [facts(node) for node in trace.nodes if node.is_comm]


@pytest.mark.parametrize("plan", ["dp2"])
def test_capture_and_synth_agree(plan: str, tmp_path: Path, meshloom: Meshloom) -> None:
    run = ["--tokenizer", "bytes", "--data", "sample", "--max-steps", "3", "--trace", "--out", str(tmp_path / "run")]
    size = ["--model", "gpt2-tiny", "--plan", plan, "--seq-length", "32"]
    result = meshloom("train", *size, *run)
    assert result.returncode == 0, result.stderr
    result = meshloom("synth", *size, "--out", str(tmp_path / "synth"))
    assert result.returncode == 0, result.stderr
    captured, imagined = read_all(tmp_path / "run"), read_all(tmp_path / "synth")
    assert check(captured) == []
    assert check(imagined) == []
    assert list(captured) == list(imagined)
    for rank in captured:
        assert _work(captured[rank]) == _work(imagined[rank])
        assert _sent(captured[rank]) == _sent(imagined[rank])
        phases = {node.get("phase") for node in captured[rank].nodes if node.get("op_class") not in (None, "host")}
        assert phases == {"forward", "backward", "optimizer"}


def test_modules_are_told_alike(demo_run: Path, tmp_path: Path, meshloom: Meshloom) -> None:
    result = meshloom("synth", "--model", "gpt2-tiny", "--plan", "dp2", "--out", str(tmp_path / "synth"))
    assert result.returncode == 0, result.stderr

    def of(trace: Trace) -> Counter[tuple[str, str, str]]:
        products = [node for node in trace.nodes if node.get("op_class") in ("gemm", "attention")]
        return Counter((node.name, node.get("phase"), node.get("module", "")) for node in products)

    captured, imagined = of(read_all(demo_run)[0]), of(read_all(tmp_path / "synth")[0])
    assert captured == imagined
    assert sum(captured.values()) == 31
    assert all(module for _, _, module in captured)
