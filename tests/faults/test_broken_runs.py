"""What ends a run from outside: killed and hung ranks, full disks, folders that cannot be written, clocks that jump."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from meshloom.errors import FolderError, RunFailed
from meshloom.parallel import launch
from meshloom.parallel.waiting import limit_waits
from meshloom.plan import Plan
from meshloom.train.checkpoint import newest
from meshloom.train.processes import describe_process, find_process
from meshloom.train.runs import new_run
from tests.conftest import Meshloom

pytestmark = pytest.mark.faults

SCRIPT = str(Path(__file__).with_name("broken_ranks.py"))
SAME = ("--model", "gpt2-tiny", "--tokenizer", "bytes", "--data", "sample", "--seq-length", "32", "--plan", "dp2",
        "--max-steps", "6", "--save-steps", "2")  # fmt: skip


def _losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, meshloom: Meshloom) -> list[float]:
    """The losses of the run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = meshloom("train", *SAME, "--out", str(folder))
    assert result.returncode == 0, result.stderr
    return _losses(folder)


def _broken(phase: str, rank: int, run: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, phase, str(rank), *SAME, "--out", str(run), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked on Linux only")
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("phase", "saved"), [("start", 0), ("step", 0), ("collective", 0), ("save", 2), ("trace", 4)])
def test_a_rank_killed_in_any_phase(
    tmp_path: Path, meshloom: Meshloom, whole: list[float], phase: str, saved: int, rank: int
) -> None:
    """The run names it, and what is saved is whole; saving goes on beside steps, so a kill may come before its end."""
    run = tmp_path / "run"
    result = _broken(phase, rank, run, *(("--trace", "--trace-step", "5") if phase == "trace" else ()))
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"rank {rank} was killed" in result.stderr.splitlines()[-1]
    assert json.loads((run / "run.json").read_text())["state"] == "failed"
    found, troubles = newest(run / "checkpoints")
    assert troubles == []
    assert int(found.name.partition("-")[2] if found else 0) >= saved
    if rank == 1:  # of each phase once: it goes on to the same losses
        again = meshloom("train", *SAME, "--resume", "--out", str(run))
        assert again.returncode == 0, again.stderr
        assert _losses(run) == whole


@pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked on Linux only")
def test_a_hung_rank_ends_the_run_and_is_named(tmp_path: Path) -> None:
    result = _broken("hang", 1, tmp_path / "run", "--collective-timeout", "5")
    assert result.returncode == 1, result.stdout + result.stderr
    line = result.stderr.splitlines()[-1]
    # a broadcast of buffers comes first in the step where the model has some, else a sum of gradients
    assert re.search(r"rank 1 hung: rank 0 waited for it in \w+ number \d+ of ranks 0, 1 until its time was up", line)
    assert "rank 1 was in broken_ranks.py:" in line
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "failed"


def _hang(_: str) -> None:
    """Rank 2 leaves the others alone with the second all-reduce of all, and the message that it owes rank 1."""
    import torch
    import torch.distributed as dist

    with launch.rank_context("cpu"):
        limit_waits(4)
        dist.all_reduce(torch.ones(3))
        if dist.get_rank() == 2:
            threading.Event().wait()
        dist.all_reduce(torch.ones(4))


@pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked on Linux only")
def test_the_one_that_did_not_come_is_told_from_those_that_wait(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"^rank 2 hung: .*all_?reduce number 2 of ranks 0, 1, 2 .*in _hang"):
        launch.run_ranks(_hang, "", num_ranks=3, log_dir=tmp_path / "logs")


@pytest.mark.parametrize(
    ("setup", "arguments"),
    [("", ("synth", "--model", "gpt2-tiny", "--plan", "dp2", "--out", "{}/traces")),
     ("synth", ("report", "{}/traces")),
     ("synth", ("view", "graph", "{}/traces", "--format", "png")),
     ("synth", ("convert", "{}/traces/rank0.et", "{}/rank0.json"))],
)  # fmt: skip
def test_a_full_disk_is_one_line_and_leaves_nothing_half(
    tmp_path: Path, meshloom: Meshloom, setup: str, arguments: tuple[str, ...]
) -> None:
    if setup:
        made = meshloom("synth", "--model", "gpt2-tiny", "--plan", "dp2", "--out", str(tmp_path / "traces"))
        assert made.returncode == 0, made.stderr
    before = sorted(tmp_path.rglob("*"))

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    command = [sys.executable, "-B", "-m", "meshloom.cli", *(each.format(tmp_path) for each in arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, preexec_fn=small_files)
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.count("\n") == 1
    assert "expected to write" in result.stderr
    assert "File too large" in result.stderr, "the limit of this test, as the system calls it"
    left = [path for path in sorted(tmp_path.rglob("*")) if path not in before and not path.is_dir()]
    assert left == []


@pytest.mark.skipif(sys.platform != "linux", reason="/proc takes no new files, not even from root")
@pytest.mark.parametrize(
    "arguments",
    [("train", "--model", "gpt2-tiny", "--tokenizer", "bytes", "--data", "sample", "--out", "/proc/run"),
     ("synth", "--model", "gpt2-tiny", "--plan", "dp2", "--out", "/proc/traces"),
     ("report", "{}", "--out", "/proc/report.html"),
     ("view", "graph", "{}", "--out", "/proc/graph.svg"),
     ("view", "timeline", "{}", "--out", "/proc/timeline"),
     ("convert", "{}/rank0.et", "/proc/rank0.json")],
)  # fmt: skip
def test_a_folder_that_cannot_be_written_is_one_line(
    demo_run: Path, meshloom: Meshloom, arguments: tuple[str, ...]
) -> None:
    where = demo_run / "trace" if arguments[0] == "convert" else demo_run
    result = meshloom(*(each.format(where) for each in arguments))
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert "/proc/" in result.stderr


def test_of_many_runs_that_begin_in_one_folder_one_gets_it(tmp_path: Path) -> None:
    start, got, refused = threading.Barrier(8), [], []

    def begin() -> None:
        start.wait()
        try:
            got.append(new_run(tmp_path / "run", model="gpt2-tiny", plan=Plan()))
        except FolderError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    assert len(refused) == 7


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system tells starts by its clock")
@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0])
def test_a_clock_that_jumps_makes_no_run_seem_dead(monkeypatch: pytest.MonkeyPatch, jump_s: float) -> None:
    described = describe_process()
    plain = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: plain(process) + jump_s)
    assert find_process(described) is not None
    assert find_process({**described, "since_boot": f"{described['since_boot']}0"}) is None, "another process"
