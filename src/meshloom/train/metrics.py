"""What a run reports while it runs: a line or bar on the terminal, and one JSON line a step in metrics.jsonl."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter:
    """Stores each step's loss and speed, and shows them; rank 0 is the one to do so."""

    def __init__(
        self, folder: Path, *, max_steps: int, tokens_per_step: int, store: bool, show: bool, first_step: int = 0
    ) -> None:
        self._store, self._show = store, show
        self._max_steps = max_steps
        self._tokens_per_step = tokens_per_step
        self._path = folder / "metrics.jsonl"
        self._first_step = first_step
        self._file: IO[str] | None = None
        self._console = Console(file=sys.stdout)
        self._last_ns = 0
        self._last_step = first_step - 1
        self._progress: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> Reporter:
        if self._store:
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
        if self._file is not None:
            self._file.close()

    def step(
        self,
        step: int,
        loss: float,
        *,
        learning_rate: float,
        grad_norm: float | None,
        memory_bytes: int,
        recorded: bool,
    ) -> None:
        """Report step `step` (counted from 0), whose mean loss over all ranks is `loss`.

        Speed is the mean since the step that was reported before; `memory_bytes` is the most this rank held.
        """
        now_ns = time.perf_counter_ns()
        num_steps, self._last_step = max(1, step - self._last_step), step
        duration_ns, self._last_ns = (now_ns - self._last_ns) // num_steps, now_ns
        if self._file is None:
            return
        tokens_per_second = self._tokens_per_step / (duration_ns / 1e9)
        facts = {
            "step": step,
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "duration_ns": duration_ns,
            "tokens_per_second": tokens_per_second,
            "memory_bytes": memory_bytes,
            "recorded": recorded,
        }
        self._file.write(json.dumps(facts) + "\n")
        text = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s" + ("  (recorded)" if recorded else "")
        if self._progress is not None:
            self._progress.update(self._task, completed=step + 1, description=text)
        elif self._show:
            self._console.print(f"step {step + 1}/{self._max_steps}  {text}", highlight=False)


def _lines_before(path: Path, step: int) -> list[str]:
    """The lines of steps before `step`, which is where a run goes on; what was lost after it is done again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if step and path.exists() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] < step:
                kept.append(line)
        except (ValueError, KeyError):  # cut off when the run was killed
            continue
    return kept
