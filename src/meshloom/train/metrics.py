"""What a run reports while it runs: a line or bar on the terminal, and one JSON line a step in metrics.jsonl.

Each rank also keeps a log of its own, `logs/rank<r>.jsonl`: what it did and saw, a JSON object a line.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from meshloom.errors import FolderError
from meshloom.train.sinks import Sink


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What is told of a step, counted from 0: losses are means over all ranks.

    `memory_bytes` is the most this rank held. `eval_loss` is None where nothing was evaluated, `eval_ns` how long that
    took, `loss_scale` None without fp16.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float | None
    memory_bytes: int
    recorded: bool
    loss_scale: float | None = None
    eval_loss: float | None = None
    eval_ns: int = 0


class Reporter:
    """Stores each step's loss and speed, and shows them; rank 0 is the one to do so.

    `flops_per_token` over `peak_flops`, those of all devices in a second, give the share of the peak that is used.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_steps: int,
        tokens_per_step: int,
        store: bool,
        show: bool,
        first_step: int = 0,
        sinks: Sequence[Sink] = (),
        flops_per_token: float = 0.0,
        peak_flops: float = 0.0,
    ) -> None:
        self._store, self._show = store, show
        self._max_steps = max_steps
        self._tokens_per_step = tokens_per_step
        self._path = folder / "metrics.jsonl"
        self._first_step = first_step
        self._sinks = sinks
        self._share_of_peak = flops_per_token / peak_flops if peak_flops else None
        self._file: IO[str] | None = None
        self._console = Console(file=sys.stdout)
        self._last_ns = 0
        self._last_step = first_step - 1
        self._progress: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> Reporter:
        if self._store:
            with writing(self._path):
                before = _lines_before(self._path, self._first_step)
                self._file = self._path.open("w", encoding="utf-8", buffering=1)
                self._file.writelines(before)
            if self._show and self._console.is_terminal:
                self._progress = Progress(
                    TextColumn("step"),
                    MofNCompleteColumn(),
                    BarColumn(),
                    TextColumn("{task.description}"),
                    TimeRemainingColumn(),
                    console=self._console,
                )
                self._progress.start()
                self._task = self._progress.add_task("", total=self._max_steps, completed=self._first_step)
        self._last_ns = time.perf_counter_ns()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        for sink in self._sinks:
            sink.close()
        if self._file is not None:
            _close(self._file)

    def step(self, told: Told) -> None:
        """Report a step; its speed is the mean since the step that was reported before.

        Raises FolderError if it cannot be written.
        """
        now_ns = time.perf_counter_ns()
        num_steps, self._last_step = max(1, told.step - self._last_step), told.step
        duration_ns, self._last_ns = (now_ns - self._last_ns - told.eval_ns) // num_steps, now_ns
        if self._file is None:
            return
        facts = self._facts(told, duration_ns)
        with writing(self._path):
            self._file.write(json.dumps(facts) + "\n")
        numbers = {name: value for name, value in facts.items() if name != "step" and isinstance(value, float)}
        for sink in self._sinks:
            with writing(self._path.parent):
                sink.write(told.step + 1, numbers)
        text = f"loss {told.loss:.4f}"
        text += f"  eval loss {told.eval_loss:.4f}" if told.eval_loss is not None else ""
        text += f"  {facts['tokens_per_second']:,.0f} tokens/s"
        text += f"  {facts['mfu']:.1%} MFU" if self._share_of_peak else ""
        text += "  (recorded)" if told.recorded else ""
        if self._progress is not None:
            self._progress.update(self._task, completed=told.step + 1, description=text)
        elif self._show:
            self._console.print(f"step {told.step + 1}/{self._max_steps}  {text}", highlight=False)

    def _facts(self, told: Told, duration_ns: int) -> dict[str, Any]:
        tokens_per_second = self._tokens_per_step / (duration_ns / 1e9)
        facts: dict[str, Any] = {
            "step": told.step,
            "loss": _number(told.loss),
            "learning_rate": told.learning_rate,
            "grad_norm": _number(told.grad_norm),
            "duration_ns": duration_ns,
            "tokens_per_second": tokens_per_second,
            "memory_bytes": told.memory_bytes,
            "recorded": told.recorded,
        }
        if self._share_of_peak:
            facts["mfu"] = self._share_of_peak * tokens_per_second
        if told.loss_scale is not None:
            facts["loss_scale"] = told.loss_scale
        if told.eval_loss is not None:
            facts |= {"eval_loss": _number(told.eval_loss), "eval_duration_ns": told.eval_ns}
        return facts


class RankLog:
    """What this rank did and saw: `logs/rank<r>.jsonl`, on every rank."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / "logs" / f"rank{rank}.jsonl"
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8", buffering=1)

    def write(self, event: str, **facts: Any) -> None:
        """Add a line; raises FolderError if it cannot be written."""
        with writing(self._path):
            self._file.write(json.dumps({"time_ns": time.time_ns(), "event": event, **facts}) + "\n")

    def close(self) -> None:
        """Close the file."""
        _close(self._file)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within this, what the system says of a file that cannot be written becomes one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FolderError(f"{path}: the disk is full; make room, and go on with --resume") from error
        said = os.strerror(error.errno) if error.errno else str(error)
        raise FolderError(f"{path}: expected to write here, got '{said}'") from error


def _close(file: IO[str]) -> None:
    try:
        file.close()
    except OSError:  # what could not be written was told when it was
        return


def _number(value: float | None) -> float | None:
    """The value, None where it is no number, which JSON has no word for."""
    return value if value is not None and isfinite(value) else None


def _lines_before(path: Path, step: int) -> list[str]:
    """The lines of steps before `step`, which is where a run goes on; what was lost after it is done again."""
    lines = (
        path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if step and path.exists() else []
    )
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] < step:
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):  # cut off when the run was killed
            continue
    return kept
