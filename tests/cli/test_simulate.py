"""What `simulate`, `what-if` and `advise` print: of traces, of a model and a plan, of a mixture of experts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from meshloom.chakra.timeline import read
from meshloom.cli.__main__ import cli


def _run(*arguments: str) -> str:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def traces(demo_run: Path, tmp_path: Path) -> Path:
    """A folder of the run's traces alone."""
    folder = tmp_path / "traces"
    shutil.copytree(demo_run / "trace", folder)
    return folder


def test_a_recorded_run(traces: Path) -> None:
    told = json.loads(_run("simulate", str(traces), "--cluster", "h100x8", "--json"))
    assert told["world_size"] == len(told["ranks"]) == 2
    for rank in told["ranks"]:
        parts = ("compute", "exposed_communication", "bubble", "idle")
        assert sum(rank[f"{part}_ns"] for part in parts) == told["step_time_ns"]
        assert sum(rank[f"{part}_share"] for part in parts) == pytest.approx(1)
    path = told["critical_path"]
    assert path["compute_ns"] + path["communication_ns"] + path["waiting_ns"] == told["step_time_ns"]
    assert path["num_ops"] == len(path["path"]) == sum(op["count"] for op in path["ops"])
    assert 0 < told["mfu"] <= told["hfu"] < 1
    assert told["tokens_per_second"] > 0
    assert told["memory"]["peak_bytes"] is None
    assert [each.partition(":")[0] for each in told["unknown"]] == ["memory"]
    assert read(told["timeline"]).makespan_ns == told["step_time_ns"]
    shown = _run("simulate", str(traces), "--cluster", "h100x8")
    for part in ("tokens/s, MFU", "bubble", "critical path: ", "not known: memory"):
        assert part in shown


def test_tokens_of_a_trace_that_tells_them_are_not_told_again(traces: Path) -> None:
    result = CliRunner().invoke(cli, ["simulate", str(traces), "--tokens", "3"])
    assert result.exit_code == 2
    assert "the traces are of a step of" in str(result.exception or result.output)


def test_a_model_and_a_plan(tmp_path: Path) -> None:
    arguments = ["simulate", "--model", "gpt2", "--plan", "pp2", "--gradient-accumulation", "4", "--seq-length", "512"]
    told = json.loads(_run(*arguments, "--json", "--out", str(tmp_path)))
    played = told["event_by_event"]
    assert played["step_time_ns"] / 1e9 == pytest.approx(told["step_s"], rel=0.1)
    assert [rank["rank"] for rank in played["ranks"]] == [0, 1]
    assert all(rank["bubble_ns"] > 0 for rank in played["ranks"])
    assert played["memory"]["fits"] is True
    assert read(told["timeline"]).world_size == 2
    interleaved = json.loads(_run(*arguments, "--virtual-stages", "2", "--recompute", "full", "--json"))
    assert interleaved["memory_bytes"]["activations"] < told["memory_bytes"]["activations"]
    shown = _run(*arguments)
    assert "event by event" in shown
    assert "MB at the peak" in shown or "GB at the peak" in shown


def test_what_if_says_what_was_changed(traces: Path) -> None:
    shown = _run("what-if", str(traces), "--scale", "network=2x", "--remove-comm", "dp")
    assert "with network 2x, no communication over dp: compute" in shown
    told = json.loads(_run("what-if", str(traces), "--scale", "compute=2x", "--json"))
    assert told["speedup"] == pytest.approx(told["before_ns"] / told["after_ns"])
    assert told["after"]["step_time_ns"] == told["after_ns"]


def test_a_mixture_of_experts_is_advised_on_with_a_word() -> None:
    arguments = [
        "advise",
        "--model",
        "mixtral-8x7b",
        "--cluster",
        "h100x1024",
        "--devices",
        "64",
        "--seq-length",
        "4096",
    ]
    shown = _run(*arguments, "--global-batch", "256")
    assert "46.7 billion parameters, 12.9 of them met by a token: 2 of 8 experts" in shown
    assert "outside the calibrated range: a mixture of experts was never held against a measured step" in shown
