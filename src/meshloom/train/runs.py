"""The run folder: made once, never reused, with what is needed to know what ran."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import tomli_w

import meshloom
from meshloom.chakra.file import whole_file
from meshloom.errors import FolderError, UsageError
from meshloom.plan import Plan
from meshloom.train.processes import describe_process, find_process

CHECKPOINTS = "checkpoints"  # the folder of a run that holds them
STOP = "stop"  # the file by which a run is asked to end


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """Where a run goes on: from which checkpoint, if there is one, after how many steps, in which run folder.

    `folder` is None if that is a new one. `troubles` tells what is wrong with newer checkpoints.
    """

    folder: Path | None
    checkpoint: Path | None
    step: int
    troubles: list[str]


def find_resumed(resume: str, out: str | None) -> Resumed:
    """Find what `resume` names: a checkpoint, a run folder, or, if it is empty, the run in `out`, if there is one.

    Raises FolderError if it is neither or cannot be read, UsageError if nothing is named.
    """
    from meshloom.train.checkpoint import check_checkpoint, newest  # which imports torch; runs are listed without it

    if not resume and out is None:
        raise UsageError("--resume: expected the folder of a run or a checkpoint, or --out with the run to go on with")
    path = Path(resume or str(out))
    if not resume and not (path / "run.json").is_file():
        return Resumed(folder=None, checkpoint=None, step=0, troubles=[])
    if (path / "training_info.json").is_file():
        run = path.parent.parent if path.parent.name == CHECKPOINTS else None
        checkpoint, troubles = path, list[str]()
    elif (path / "run.json").is_file():
        run = path
        found, troubles = newest(path / CHECKPOINTS)
        if found is None and resume:
            why = f" that can be read: {troubles[0]}" if troubles else ""
            raise FolderError(f"{path}: expected a run with a checkpoint{why}; train with --save-steps")
        if found is None:
            return Resumed(folder=path, checkpoint=None, step=0, troubles=troubles)
        checkpoint = found
    else:
        raise FolderError(f"{path}: expected a checkpoint or the folder of a run, found neither there")
    here = run if run is not None and out in (None, str(run)) else None
    return Resumed(folder=here, checkpoint=checkpoint, step=check_checkpoint(checkpoint).step, troubles=troubles)


def reopen_run(folder: Path) -> Path:
    """Make a run folder ready to go on in: what its ranks wrote of their ends is put aside.

    Raises FolderError if the run in it is still going on, here or elsewhere.
    """
    known = read_run(folder)
    if known.is_alive and known.process is not None and known.process["pid"] != os.getpid():
        raise FolderError(
            f"{folder}: expected a run that has ended, this one is in use by process {known.process['pid']}; "
            f"end it with meshloom runs stop {folder}, or choose another --out"
        )
    for number in range(1, 10_000):
        aside = folder / f"logs.{number}"
        if not aside.exists():
            break
    try:
        if (folder / "logs").exists():
            (folder / "logs").rename(aside)
        (folder / "logs").mkdir()
        (folder / STOP).unlink(missing_ok=True)
    except OSError as error:
        raise FolderError(f"{folder}: expected to make logs here, got '{error.strerror}'") from error
    return folder


def new_run(out: str | Path | None, *, model: str, plan: Plan) -> Path:
    """Make an empty run folder and return it: `out`, or `runs/<model>.<plan>.<stamp>`; raises FolderError."""
    if out is None:
        name = Path(model).stem if model.endswith(".json") else Path(model).name
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        folder = Path("runs") / f"{name}.{plan}.{stamp}"
        for again in range(2, 100):  # two runs of one second must not share a folder
            if not folder.exists():
                break
            folder = Path("runs") / f"{name}.{plan}.{stamp}-{again}"
    else:
        folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FolderError(f"{folder}: expected a new or empty folder, it holds files already; choose another --out")
        (folder / "logs").mkdir()
    except OSError as error:
        raise FolderError(
            f"{folder}: expected to make a folder here, got '{error.strerror}'; choose another --out"
        ) from error
    return folder


def write_facts(
    folder: Path,
    *,
    config: Any,
    plan: Plan,
    command: dict[str, Any],
    arguments: Sequence[str] = (),
    state: str = "running",
) -> None:
    """Write model.json (HF's config), plan.toml and run.json, in which the calling process is that of the run."""
    with whole_file(folder / "model.json") as file:
        file.write(config.to_json_string(use_diff=False).encode())
    with whole_file(folder / "plan.toml") as file:
        table: dict[str, Any] = {
            "plan": str(plan),
            **{str(axis): degree for axis, degree in plan.degrees.items()},
            "world_size": plan.world_size,
            "num_micro_batches": plan.num_micro_batches,
        }
        file.write(tomli_w.dumps(table).encode())
    facts = {
        "state": state,
        "started": _now(),
        "meshloom": meshloom.__version__,
        "python": platform.python_version(),
        "platform": sys.platform,
        "command": command,
        "arguments": list(arguments),
        "process": describe_process(),
    }
    _write_json(folder / "run.json", facts)


def note_process(folder: Path, process: dict[str, Any]) -> None:
    """Note which process a run that is starting belongs to, unless that has done so itself by now."""
    path = folder / "run.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    if facts["state"] == "starting":
        _write_json(path, {**facts, "process": process})


def set_state(folder: Path, state: str, **facts: Any) -> None:
    """Set the state in run.json: finished, failed or stopped, with the time and `facts`."""
    path = folder / "run.json"
    _write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "state": state, "ended": _now(), **facts})


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is known of a run, by its folder: `state` is starting, running, finished, failed or stopped.

    A run that says it is running while its process is gone has failed. `arguments` are those of `meshloom train`.
    """

    name: str
    folder: Path
    state: str
    started: str
    ended: str
    reason: str
    step: int
    max_steps: int
    loss: float | None
    process: dict[str, Any] | None
    arguments: list[str]

    @property
    def is_alive(self) -> bool:
        """Whether its process is there."""
        return self.state in ("starting", "running")

    def facts(self) -> dict[str, Any]:
        """Everything, as it is printed."""
        table = asdict(self)
        return {**table, "folder": str(self.folder), "process": self.process["pid"] if self.process else None}


def read_run(folder: Path) -> Run:
    """What is known of the run in `folder`; raises FolderError if it holds none that can be read."""
    path = folder / "run.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        last = _last_line(folder / "metrics.jsonl")
        process = facts.get("process")
        if process is not None and not isinstance(process.get("pid"), int):
            raise ValueError(f"process {process!r:.60}")
        state, reason = str(facts["state"]), str(facts.get("reason", ""))
        if state in ("starting", "running") and find_process(facts.get("process")) is None:
            state, reason = "failed", "its process is gone and left no word"
        return Run(
            name=folder.name,
            folder=folder,
            state=state,
            started=str(facts.get("started", "")),
            ended=str(facts.get("ended", "")),
            reason=reason,
            step=int(last.get("step", -1)) + 1,
            max_steps=int(facts.get("command", {}).get("max_steps", 0)),
            loss=None if (loss := last.get("loss")) is None else float(loss),
            process=process,
            arguments=[str(argument) for argument in facts.get("arguments", [])],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise FolderError(f"{path}: expected what a run wrote, got '{error}'") from error


def ask_to_stop(folder: Path) -> None:
    """Let the run in `folder` save and end after the step that it is in."""
    (folder / STOP).touch()


def is_asked_to_stop(folder: Path) -> bool:
    """Whether someone asked the run in `folder` to end."""
    return (folder / STOP).exists()


def _last_line(path: Path) -> dict[str, Any]:
    """The last whole line of a JSON-lines file, {} if there is none."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        lines = [line for line in file.read().split(b"\n") if line.startswith(b"{") and line.endswith(b"}")]
    table: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return table


def _write_json(path: Path, table: dict[str, Any]) -> None:
    with whole_file(path) as file:
        file.write(json.dumps(table, indent=2, ensure_ascii=False).encode())


def _now() -> str:
    return datetime.fromtimestamp(time.time(), tz=timezone.utc).isoformat(timespec="seconds")
