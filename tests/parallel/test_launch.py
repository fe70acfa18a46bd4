"""What the process that forks ranks must not do: import for each, start CUDA's driver, hold threads of C++."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from meshloom.errors import RunFailed
from meshloom.parallel import launch


def _note(folder: str) -> None:
    """A rank: what it finds as it starts, and whether a second start is told."""
    told = {"loaded": "torch" in sys.modules, "restarts": launch.restart_count()}
    with launch.rank_context("cpu"):
        rank = launch.world_from_environment()
    assert rank is not None
    Path(folder, f"{rank[0]}.{launch.restart_count()}.json").write_text(json.dumps(told))


def _die_once(folder: str) -> None:
    _note(folder)
    if not launch.restart_count():
        raise ValueError("the first time")


def _die(folder: str) -> None:
    raise ValueError("each time")


def test_gpus_are_counted_without_starting_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own count calls cuInit, after which CUDA fails in every process that is forked."""

    def poisons() -> int:
        raise AssertionError("the agent started CUDA's driver")

    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
    monkeypatch.setattr(torch.cuda, "_is_compiled", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", poisons, raising=False)
    launch.run_ranks(_note, str(tmp_path), num_ranks=1, log_dir=tmp_path / "logs")
    assert (tmp_path / "0.0.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked on Linux only")
def test_ranks_find_imported_what_the_agent_imported(tmp_path: Path) -> None:
    launch.run_ranks(_note, str(tmp_path), num_ranks=2, log_dir=tmp_path / "logs")
    told = [json.loads((tmp_path / f"{rank}.0.json").read_text()) for rank in (0, 1)]
    assert told == [{"loaded": True, "restarts": 0}] * 2


def test_ranks_are_started_again_as_often_as_is_allowed(tmp_path: Path) -> None:
    launch.run_ranks(_die_once, str(tmp_path), num_ranks=2, log_dir=tmp_path / "logs", max_restarts=1)
    assert {path.name for path in tmp_path.glob("*.json")} >= {"0.1.json", "1.1.json"}
    with pytest.raises(RunFailed, match="ValueError: each time"):
        launch.run_ranks(_die, str(tmp_path), num_ranks=2, log_dir=tmp_path / "other", max_restarts=2)
