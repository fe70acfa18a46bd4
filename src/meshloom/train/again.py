"""Ranks that were started again go on from the newest checkpoint that the run has saved meanwhile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from meshloom.parallel.launch import restart_count
from meshloom.train.checkpoint import checkpoints, newest
from meshloom.train.job import Job
from meshloom.train.loop import AroundStep, train_rank
from meshloom.train.runs import CHECKPOINTS


def saved_before(folder: Path) -> frozenset[str]:
    """Names of the checkpoints that a run holds as it is started."""
    return frozenset(path.name for path in checkpoints(folder / CHECKPOINTS))


def train_again(
    before: frozenset[str], job: Job, folder: str, device: str, around_step: AroundStep | None, rank_zero_shows: bool
) -> None:
    """`train_rank`, from the newest checkpoint of the run if it is none of `before`."""
    found, troubles = newest(Path(folder) / CHECKPOINTS)
    if found is not None and found.name not in before:
        job = replace(job, resume=str(found))
    if restart_count():
        for trouble in troubles:
            print(f"meshloom: warning: {trouble}; going on from an older one", flush=True)
        where = "the beginning" if job.resume is None else job.resume
        print(f"a rank died: restart {restart_count()}, going on from {where}", flush=True)
    train_rank(job, folder, device, around_step, rank_zero_shows)
