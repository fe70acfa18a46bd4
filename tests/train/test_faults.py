"""What ends a run: a loss that is no number, a full disk, a folder in use; each in one line, nothing good is lost."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from meshloom.errors import FolderError
from meshloom.plan import Plan
from meshloom.train.metrics import RankLog, Reporter, Told
from meshloom.train.runs import new_run, reopen_run, set_state, write_facts
from tests.conftest import Meshloom

SAME = ("--model", "gpt2-tiny", "--tokenizer", "bytes", "--data", "sample", "--seq-length", "32", "--plan", "dp2")


def test_a_loss_that_is_no_number_stops_saves_and_names_step_and_rank(tmp_path: Path, meshloom: Meshloom) -> None:
    """It is noticed four steps later, and what is saved is still what was there before it."""
    script = Path(__file__).with_name("nan_ranks.py")
    given = (*SAME, "--max-steps", "16", "--log-steps", "8", "--out", str(tmp_path / "run"))
    command = [sys.executable, str(script), *given]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 1, result.stdout + result.stderr
    line = result.stderr.splitlines()[-1]
    assert "step 4: the loss is no number on rank 1" in line
    assert "saved as checkpoint-3" in line
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "failed"
    events = [json.loads(text) for text in (tmp_path / "run" / "logs" / "rank1.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["begin", "step", "failed", "save"]
    good = meshloom("train", *SAME, "--max-steps", "3", "--save-steps", "3", "--out", str(tmp_path / "good"))
    assert good.returncode == 0, good.stderr
    mine, theirs = (
        load_file(tmp_path / run / "checkpoints" / "checkpoint-3" / "model.safetensors") for run in ("run", "good")
    )
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    states = [
        json.loads((tmp_path / run / "checkpoints" / "checkpoint-3" / "training_info.json").read_text())["data"]
        for run in ("run", "good")
    ]
    assert states[0] == states[1]


def test_without_a_norm_the_weights_may_be_lost(tmp_path: Path, meshloom: Meshloom) -> None:
    given = ("--max-steps", "9", "--learning-rate", "1e30", "--max-grad-norm", "0", "--out", str(tmp_path / "run"))
    result = meshloom("train", *SAME[:-1], "dp1", *given)
    assert result.returncode == 1
    assert "the loss is no number on rank 0; the weights may be lost" in result.stderr


def test_a_disk_that_is_full_while_saving(tmp_path: Path) -> None:
    """Files of a megabyte are all that fits, which is less than the weights; the checkpoint before stays."""
    command = [sys.executable, "-m", "meshloom.cli", "train", *SAME[:-1], "dp1", "--max-steps", "2"]

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    run = str(tmp_path / "run")
    whole = subprocess.run(
        [*command, "--save-steps", "2", "--out", run], capture_output=True, text=True, timeout=240, check=False
    )
    assert whole.returncode == 0, whole.stderr
    command[-1] = "4"
    result = subprocess.run(
        [*command, "--save-steps", "2", "--resume", run], capture_output=True, text=True, timeout=240, check=False,
        preexec_fn=small_files,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    assert "expected to write a file of" in result.stderr
    assert "make room" in result.stderr
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["checkpoint-2", "initial_model"], "nothing half is left, and nothing older lost"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_full_while_reporting(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    told = Told(step=0, loss=1.0, learning_rate=1.0, grad_norm=None, memory_bytes=1, recorded=False)
    reporter = Reporter(tmp_path, max_steps=1, tokens_per_step=1, store=True, show=False)
    with pytest.raises(FolderError, match=r"metrics\.jsonl: the disk is full"), reporter:
        reporter.step(told)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank0.jsonl").symlink_to("/dev/full")
    log = RankLog(tmp_path, 0)
    with pytest.raises(FolderError, match=r"rank0\.jsonl: the disk is full"):
        log.write("begin")
    log.close()


def test_a_folder_in_use(tmp_path: Path) -> None:
    folder = new_run(tmp_path / "run", model="gpt2-tiny", plan=Plan())

    class Config:
        def to_json_string(self, use_diff: bool) -> str:
            return "{}"

    write_facts(folder, config=Config(), plan=Plan(), command={"max_steps": 1})
    reopen_run(folder)  # by the process itself
    note = json.loads((folder / "run.json").read_text())
    script = "print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        from meshloom.train.processes import describe_process

        assert other.stdout is not None
        other.stdout.readline()  # before its first word it may still be known by our own command
        (folder / "run.json").write_text(json.dumps({**note, "process": describe_process(other.pid)}))
        with pytest.raises(FolderError, match=f"in use by process {other.pid}"):
            reopen_run(folder)
        set_state(folder, "finished")
        reopen_run(folder)
        other.kill()
    with pytest.raises(FolderError, match="expected a new or empty folder"):
        new_run(folder, model="gpt2-tiny", plan=Plan())
