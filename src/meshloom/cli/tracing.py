"""Options of `meshloom train` for what is recorded, and the recorder that they ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from meshloom.errors import UsageError
from meshloom.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracing:
    """What the options here ask of a run: `step` counts from 1, None where `wait` and `warmup` or nothing says it."""

    trace: bool = False
    step: int | None = None
    wait: int | None = None
    warmup: int | None = None
    active: int = 1
    separate: bool = False
    stacks: bool = False

    def first(self, max_steps: int, resumed: Any) -> int:
        """The first of the steps to record, counted from 1; raises UsageError if not all are among those to do.

        `resumed` is where the run goes on, None if it begins.
        """
        begun = resumed.step if resumed else 0
        if begun >= max_steps:
            raise UsageError(f"--max-steps {max_steps}: expected more than the {begun} steps of {resumed.checkpoint}")
        step = self.step
        if self.wait is not None or self.warmup is not None:
            step = begun + (self.wait or 0) + (self.warmup or 0) + 1
            if step > max_steps:
                raise UsageError(f"--trace-wait, --trace-warmup: expected fewer steps than --max-steps, {max_steps}")
        if step is not None and step > max_steps:
            raise UsageError(f"--trace-step {step}: expected at most --max-steps, which is {max_steps}")
        if step is not None and step <= begun:
            raise UsageError(f"--trace-step {step}: expected more than the {begun} steps that were done before")
        first = step or max(begun + 1, min(begun + 3, max_steps - self.active + 1))
        if first + self.active - 1 > max_steps:
            raise UsageError(
                f"--trace-active {self.active}: expected at most {max_steps - first + 1} steps from step {first} to "
                f"--max-steps, which is {max_steps}"
            )
        return first

    def recorder(self, folder: Path, plan: Plan, *, model: str, first: int, num_tokens: int) -> Any:
        """What stands around each step: the recorder of the capture room, made on each rank; None without --trace."""
        if not self.trace:
            return None

        def make(mesh: Any, module: Any) -> Any:
            from meshloom.capture.record import Recorder
            from meshloom.parallel.mesh import axis_groups

            return Recorder(
                folder / "trace", step=first - 1, active=self.active, warmup=self.warmup or 0, separate=self.separate,
                stacks=self.stacks, model=module, axes=axis_groups(plan, mesh.rank),
                facts={"plan": str(plan), "model": model, "num_tokens": num_tokens},
            )  # fmt: skip

        return make


def trace_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command."""
    options = [
        click.option("--trace", is_flag=True, help="Record steps on each rank as Chakra traces, with PyTorch's own "
                     "files and a table of the most expensive ops."),
        click.option("--trace-step", type=click.IntRange(1), help="Which step to record.  "
                     "[default: the third, or the last]"),
        click.option("--trace-wait", type=click.IntRange(0), help="Steps to leave alone first.  [default: 0]"),
        click.option("--trace-warmup", type=click.IntRange(0), help="Steps after them that are recorded and thrown "
                     "away, because a profiler starts slowly.  [default: 0]"),
        click.option("--trace-active", type=click.IntRange(1), default=1, show_default=True,
                     help="How many steps to record."),
        click.option("--trace-separate", is_flag=True, help="Write each recorded step into a folder of its own."),
        click.option("--trace-stacks", is_flag=True, help="Add a table of times as text beside each trace."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def take_tracing(options: dict[str, Any]) -> Tracing:
    """Take what is ours from `options`; raises UsageError."""
    names = ("step", "wait", "warmup", "active", "separate", "stacks")
    given = {name: options.pop(f"trace_{name}", None) for name in names}
    tracing = Tracing(
        trace=bool(options.pop("trace", False)), **{name: value for name, value in given.items() if value is not None}
    )
    if tracing.step is not None and (tracing.wait is not None or tracing.warmup is not None):
        raise UsageError("--trace-step: expected it, or --trace-wait and --trace-warmup, both say where to begin")
    return tracing
