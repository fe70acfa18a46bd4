"""The run folder: made once, never reused, with what is needed to know what ran."""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import tomli_w

import meshloom
from meshloom.chakra.file import whole_file
from meshloom.errors import FolderError, UsageError
from meshloom.plan import Plan
from meshloom.train.checkpoint import check_checkpoint, newest

CHECKPOINTS = "checkpoints"  # the folder of a run that holds them


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
    """Make a run folder ready to go on in: what its ranks wrote of their ends is put aside."""
    for number in range(1, 10_000):
        aside = folder / f"logs.{number}"
        if not aside.exists():
            break
    try:
        if (folder / "logs").exists():
            (folder / "logs").rename(aside)
        (folder / "logs").mkdir()
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


def write_facts(folder: Path, *, config: Any, plan: Plan, command: dict[str, Any]) -> None:
    """Write model.json (HF's config), plan.toml and run.json (state running)."""
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
        "state": "running",
        "started": _now(),
        "meshloom": meshloom.__version__,
        "python": platform.python_version(),
        "platform": sys.platform,
        "command": command,
    }
    _write_json(folder / "run.json", facts)


def set_state(folder: Path, state: str, **facts: Any) -> None:
    """Set the state in run.json: finished, failed or stopped, with the time and `facts`."""
    path = folder / "run.json"
    _write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "state": state, "ended": _now(), **facts})


def _write_json(path: Path, table: dict[str, Any]) -> None:
    with whole_file(path) as file:
        file.write(json.dumps(table, indent=2, ensure_ascii=False).encode())


def _now() -> str:
    return datetime.fromtimestamp(time.time(), tz=timezone.utc).isoformat(timespec="seconds")
