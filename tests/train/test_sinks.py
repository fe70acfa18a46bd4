"""Where a run's numbers go: event files that TensorBoard reads, W&B as its package is asked, a log of each rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from meshloom.errors import UsageError
from meshloom.train.metrics import Reporter, Told
from meshloom.train.sinks import EventFile, WandbRun, check_wandb
from tests.conftest import Meshloom


def _told(step: int, loss: float = 2.5, **more: Any) -> Told:
    return Told(step=step, loss=loss, learning_rate=0.5, grad_norm=1.0, memory_bytes=7, recorded=False, **more)


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_the_event_files(tmp_path: Path) -> None:
    reporter = Reporter(
        tmp_path, max_steps=3, tokens_per_step=8, store=True, show=False, sinks=[EventFile(tmp_path / "tensorboard")]
    )
    with reporter:
        reporter.step(_told(0))
        reporter.step(_told(1, loss=float("nan"), eval_loss=1.25))
        reporter.step(_told(299, loss=1e-3))
    found = _scalars(tmp_path / "tensorboard")
    assert found["loss"] == [(1, 2.5), (300, pytest.approx(1e-3))]
    assert found["eval_loss"] == [(2, 1.25)]
    assert [step for step, _ in found["tokens_per_second"]] == [1, 2, 300]
    assert "step" not in found


def test_steps_that_are_done_again_replace_those_before(tmp_path: Path) -> None:
    for steps_before, loss in ((0, 3.0), (2, 1.0)):
        events = EventFile(tmp_path, steps_before=steps_before)
        for step in range(steps_before + 1, 5):
            events.write(step, {"loss": loss})
        events.close()
    assert _scalars(tmp_path)["loss"] == [(1, 3.0), (2, 3.0), (3, 1.0), (4, 1.0)]


def test_what_metrics_hold_is_json_and_the_share_of_the_peak(tmp_path: Path) -> None:
    reporter = Reporter(
        tmp_path, max_steps=2, tokens_per_step=100, store=True, show=False, flops_per_token=6e3, peak_flops=3e9
    )
    with reporter:
        reporter.step(_told(0, loss=float("inf")))
        reporter.step(_told(1, loss_scale=2.0, eval_loss=1.5, eval_ns=5))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    first, second = (json.loads(line) for line in text.splitlines())
    assert first["loss"] is None
    assert first["mfu"] == pytest.approx(first["tokens_per_second"] * 6e3 / 3e9)
    assert (second["loss_scale"], second["eval_loss"], second["eval_duration_ns"]) == (2.0, 1.5, 5)


def test_wandb_gets_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Run:
        def log(self, numbers: dict[str, float], step: int) -> None:
            calls.append((step, numbers))

        def finish(self) -> None:
            calls.append("finished")

    module: Any = ModuleType("wandb")
    module.init = lambda **given: calls.append(given) or Run()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("meshloom.train.sinks.find_spec", lambda name: module)
    run = WandbRun("project", folder=tmp_path, config={"seed": 1})
    run.write(3, {"loss": 1.0})
    run.close()
    assert calls[0]["project"] == "project"
    assert calls[0]["config"] == {"seed": 1}
    assert calls[1:] == [(3, {"loss": 1.0}), "finished"]


def test_without_wandb_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshloom.train.sinks.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'meshloom\[wandb\]'"):
        check_wandb()


def test_a_run_leaves_events_and_a_log_of_each_rank(tmp_path: Path, meshloom: Meshloom) -> None:
    given = ("train", "--model", "gpt2-tiny", "--test", "--max-steps", "2", "--seq-length", "16", "--plan", "dp2",
             "--hardware", "cpu", "--eval-fraction", "0.1", "--out", str(tmp_path / "run"))  # fmt: skip
    result = meshloom(*given)
    assert result.returncode == 0, result.stderr
    assert "MFU" in result.stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = _scalars(tmp_path / "run" / "tensorboard")
    assert [value for _, value in found["loss"]] == pytest.approx([line["loss"] for line in lines])
    assert set(found) == {"loss", "eval_loss", "learning_rate", "grad_norm", "mfu", "tokens_per_second"}
    for rank in range(2):
        text = (tmp_path / "run" / "logs" / f"rank{rank}.jsonl").read_text()
        assert [json.loads(line)["event"] for line in text.splitlines()] == ["begin", "step", "step", "end"]
