"""A run in the background: it outlives its starter, is listed, saves when it is stopped, and goes on."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from meshloom.train.processes import describe_process, find_process
from tests.conftest import Meshloom

TRAIN = ("train", "--model", "gpt2-tiny", "--tokenizer", "bytes", "--data", "sample", "--seq-length", "16")


def _wait(meshloom: Meshloom, cwd: Path, name: str, *, until: Any) -> dict[str, Any]:
    """What is known of the run once it is as wanted; fails after two minutes."""
    deadline = time.monotonic() + 120
    while True:
        told: dict[str, Any] = json.loads(meshloom("runs", "show", name, "--json", cwd=cwd).stdout)
        if until(told):
            return told
        assert time.monotonic() < deadline, told


def test_stop_saves_and_resume_goes_on(meshloom: Meshloom, tmp_path: Path) -> None:
    started = meshloom(
        *TRAIN, "--plan", "dp2", "--max-steps", "100000", "--log-steps", "1", "--background", cwd=tmp_path
    )
    assert started.returncode == 0, started.stderr
    name = started.stdout.split()[-1]
    try:
        _wait(meshloom, tmp_path, name, until=lambda told: told["step"] >= 3)
        (listed,) = json.loads(meshloom("runs", "--json", cwd=tmp_path).stdout)
        assert (listed["name"], listed["state"]) == (name, "running")
        assert "step 1/" in meshloom("runs", "logs", name, cwd=tmp_path).stdout
        taken = meshloom("runs", "resume", name, cwd=tmp_path)
        assert taken.returncode == 2
        assert "expected a run that has ended" in taken.stderr
    finally:
        stopped = meshloom("runs", "stop", name, cwd=tmp_path)
    assert stopped.returncode == 0, stopped.stderr
    told = json.loads(meshloom("runs", "show", name, "--json", cwd=tmp_path).stdout)
    assert told["state"] == "stopped"
    assert (tmp_path / "runs" / name / "checkpoints" / f"checkpoint-{told['step']}").is_dir()
    again = meshloom("runs", "stop", name, cwd=tmp_path)
    assert again.returncode == 2
    assert "this one is stopped" in again.stderr
    facts_path = tmp_path / "runs" / name / "run.json"
    facts = json.loads(facts_path.read_text())
    place = facts["arguments"].index("--max-steps") + 1
    facts["arguments"][place] = str(told["step"] + 2)
    facts_path.write_text(json.dumps(facts))
    resumed = meshloom("runs", "resume", name, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    told_after = json.loads(meshloom("runs", "show", name, "--json", cwd=tmp_path).stdout)
    assert (told_after["state"], told_after["step"]) == ("finished", told["step"] + 2)


def test_a_run_whose_process_was_killed_has_failed(meshloom: Meshloom, tmp_path: Path) -> None:
    started = meshloom(*TRAIN, "--max-steps", "100000", "--background", cwd=tmp_path)
    name = started.stdout.split()[-1]
    told = _wait(meshloom, tmp_path, name, until=lambda told: told["state"] == "running")
    tree = [*psutil.Process(told["process"]).children(recursive=True), psutil.Process(told["process"])]
    for process in tree:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(tree, timeout=30)
    told = json.loads(meshloom("runs", "show", name, "--json", cwd=tmp_path).stdout)
    assert (told["state"], told["reason"]) == ("failed", "its process is gone and left no word")


@pytest.mark.parametrize(
    "changed", [{"created": 1.0, "since_boot": "of another boot 1"}, {"command": ["other"]}, {"pid": 2**22 - 1}]
)
def test_another_process_of_the_same_number_is_not_taken_for_the_run(changed: dict[str, Any]) -> None:
    described = describe_process()
    assert find_process(described) == psutil.Process(os.getpid())
    assert find_process({**described, **changed}) is None


def test_a_name_that_is_none(meshloom: Meshloom, tmp_path: Path) -> None:
    told = meshloom("runs", "show", "nothing", cwd=tmp_path)
    assert told.returncode == 2
    assert "expected the name of one run; there are none in runs" in told.stderr
