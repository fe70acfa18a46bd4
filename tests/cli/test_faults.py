"""A rank that dies ends the run, with a clear message and no process left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

COMMAND = [
    sys.executable, "-u", "-m", "meshloom.cli", "train", "--model", "gpt2-tiny", "--tokenizer", "bytes", "--data",
    "sample", "--plan", "dp2", "--max-steps", "100000",
]  # fmt: skip


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@contextmanager
def _running(folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A run that has done its third step, and its ranks."""
    process = subprocess.Popen(
        [*COMMAND, "--out", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 10/"):
                break
        yield process, _children(process.pid)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(
    ("rank", "sent", "told"),
    [(0, signal.SIGKILL, "rank 0 was killed"), (1, signal.SIGKILL, "rank 1 was killed"),
     (1, signal.SIGTERM, "rank 1 was ended by SIGTERM")],
)  # fmt: skip
def test_a_killed_rank(tmp_path: Path, rank: int, sent: signal.Signals, told: str) -> None:
    with _running(tmp_path / "run") as (process, ranks):
        assert len(ranks) == 2
        os.kill(ranks[rank], sent)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 1
        assert told in said
        assert not any(_alive(pid) for pid in ranks)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "failed"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ctrl_c(tmp_path: Path) -> None:
    with _running(tmp_path / "run") as (process, ranks):
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130
        assert said.strip().endswith("everything that was started has been ended")
        assert "Traceback" not in said
        assert not any(_alive(pid) for pid in ranks)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "stopped"
