"""The doctor: what it looks at, that it really runs a collective, and that each fault it can find fails it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from meshloom.cli import doctor
from meshloom.errors import RunFailed
from meshloom.parallel import launch, probe
from tests.conftest import Meshloom


def test_a_host_in_order(meshloom: Meshloom, tmp_path: Path) -> None:
    result = meshloom(
        "doctor", "--json", "--device", "cpu", "--tokenizer", "bytes", "--model", "koen-sllm", cwd=tmp_path
    )
    assert result.returncode == 0, result.stdout
    told = json.loads(result.stdout)
    assert told["ok"]
    found = {finding["what"]: finding for finding in told["findings"]}
    for what in ("Python", "torch", "transformers", "gloo", "memory", "disk, runs", "disk, cache", "data sample",
                 "tokenizer bytes", "model koen-sllm"):  # fmt: skip
        assert found[what]["state"] in ("ok", "warning"), what
    assert found["2 ranks, gloo"]["found"] == "an all-reduce ran and is right"
    assert "TFLOP/s in float32" in found["GEMM, cpu"]["found"]
    assert "17 MB in" in found["all-reduce, 2 ranks, gloo"]["found"]
    assert {"hub", "datasets", "wandb", "CUDA"} <= set(found)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_fails_it_and_is_told_in_a_table(
    meshloom: Meshloom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    result = meshloom("doctor", "--device", "cpu", "--data", "missing.jsonl", cwd=tmp_path)
    assert result.returncode == 1, result.stdout
    assert "missing.jsonl: expected" in " ".join(result.stdout.split())
    assert "1 failures" in result.stdout


def _states(findings: Any) -> dict[str, str]:
    return {finding.what: finding.state for finding in findings}


def test_too_little_room_fails_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    class Little:
        available, total = 5e8, 8e9
        free = 1e8

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Little)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Little)
    states = _states(doctor._room())
    assert states["memory"] == states["disk, runs"] == states["disk, cache"] == "failure"


def _ended(monkeypatch: pytest.MonkeyPatch, run: Callable[..., None]) -> list[doctor.Finding]:
    monkeypatch.setattr(launch, "run_ranks", run)
    return list(doctor._ranks("cpu"))


def test_ranks_that_fail_or_hang_fail_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise RunFailed("rank 1 failed: RuntimeError: no route; see x")

    def hangs(function: Any, folder: str, *args: Any, **kwargs: Any) -> None:
        (Path(folder) / probe.LATE).touch()
        raise RunFailed("rank 0 was killed")

    (failed,) = _ended(monkeypatch, fails)
    assert (failed.state, failed.found) == ("failure", "rank 1 failed: RuntimeError: no route")
    (hung,) = _ended(monkeypatch, hangs)
    assert (hung.state, hung.found) == ("failure", "did not end within 60 s")
    assert "hostname" in hung.advice


def test_a_wrong_sum_and_a_slow_gpu_are_found() -> None:
    told: dict[str, Any] = {
        "backend": "nccl", "sum_is_right": False, "device": "NVIDIA H200", "dtype": "bfloat16", "threads": 1,
        "flops_per_second": 100e12, "all_reduce_s": {"65536": 1e-5, "16777216": 1.0},
        "gpus": [{"name": "NVIDIA H200", "free_bytes": 140e9, "total_bytes": 141e9, "reaches": [1]},
                 {"name": "NVIDIA H200", "free_bytes": 1e9, "total_bytes": 141e9, "reaches": []}],
    }  # fmt: skip
    states = _states(doctor._measured("2 ranks, nccl", told))
    assert states == {
        "2 ranks, nccl": "failure", "GPU 0": "ok", "GPU 1": "warning", "peer access": "warning",
        "GEMM, NVIDIA H200": "warning", "all-reduce, 2 ranks, nccl": "warning",
    }  # fmt: skip
    well = {**told, "sum_is_right": True, "flops_per_second": 700e12, "all_reduce_s": {"65536": 1e-5, "16777216": 1e-4}}
    states = _states(doctor._measured("2 ranks, nccl", well))
    assert states["GEMM, NVIDIA H200"] == states["all-reduce, 2 ranks, nccl"] == states["2 ranks, nccl"] == "ok"


def _wrong(folder: str, device: str, limit_s: float) -> None:
    """A rank whose all-reduce loses a part."""
    right = dist.all_reduce

    def loses(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        done = right(tensor, *args, **kwargs)
        tensor[0] += 1
        return done

    dist.all_reduce = loses
    probe.probe(folder, device, limit_s)


def test_the_probe_sees_a_sum_that_is_wrong(tmp_path: Path) -> None:
    launch.run_ranks(_wrong, str(tmp_path), "cpu", 60.0, num_ranks=2, log_dir=tmp_path / "logs")
    assert json.loads((tmp_path / probe.RESULT).read_text())["sum_is_right"] is False
