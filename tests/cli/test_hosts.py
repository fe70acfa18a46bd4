"""Several hosts, played by agents on one machine, and ranks that are killed: the run goes on by itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from meshloom.cli.__main__ import _run
from meshloom.errors import UsageError
from meshloom.parallel.hosts import parse_endpoint
from tests.conftest import Meshloom

TRAIN = ("train", "--model", "gpt2-tiny", "--tokenizer", "bytes", "--data", "sample", "--seq-length", "32", "--plan",
         "dp2", "--max-steps", "8", "--log-steps", "1", "--save-steps", "2")  # fmt: skip
# two ranks of one host share its cores, those of two hosts do not; sums depend on it
MAIN = "import sys, torch\ntorch.set_num_threads(1)\ntorch.set_num_threads = lambda number: None\n"
MAIN += "from meshloom.cli.__main__ import main\nmain(sys.argv[1:])"


def _start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-c", MAIN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _same_end(one: Path, other: Path) -> bool:
    mine, theirs = (load_file(run / "checkpoints" / "checkpoint-8" / "model.safetensors") for run in (one, other))
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def _ranks(process: subprocess.Popen[str]) -> list[int]:
    """The ranks that an agent has forked; on host 0 the store's process came before them."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def _kill_after_step(process: subprocess.Popen[str], step: int, victim: subprocess.Popen[str]) -> str:
    """Read what rank 0 prints, kill the newest rank of `victim` with SIGKILL once step `step` is told; all output."""
    told, killed = "", False
    assert process.stdout is not None
    for line in process.stdout:
        told += line
        if line.startswith(f"step {step}/") and not killed:
            os.kill(_ranks(victim)[-1], signal.SIGKILL)
            killed = True
    assert killed
    return told


def _drain(process: subprocess.Popen[str]) -> list[str]:
    """Take what the process says, so that it never waits for a reader."""
    said: list[str] = []
    assert process.stderr is not None
    threading.Thread(target=lambda: said.append(process.stderr.read() if process.stderr else ""), daemon=True).start()
    return said


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one host that nobody disturbed."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    process = _start(*TRAIN, "--out", str(folder))
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    return folder


linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@linux
def test_a_killed_rank_and_the_run_goes_on_by_itself(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = _start(*TRAIN, "--out", str(run), "--max-restarts", "1")
    try:
        said = _drain(process)
        told = _kill_after_step(process, 5, process)
        assert process.wait(60) == 0, (told, said)
    finally:
        process.kill()
        process.communicate()
    assert "a rank died: restart 1, going on from" in told
    assert "checkpoints/checkpoint-" in told.partition("restart 1")[2]
    assert _losses(run) == _losses(straight)
    assert _same_end(run, straight)
    assert json.loads((run / "run.json").read_text())["state"] == "finished"


@linux
def test_it_gives_up_after_as_many_restarts_as_were_allowed(tmp_path: Path) -> None:
    process = _start(*TRAIN, "--out", str(tmp_path / "run"), "--max-restarts", "1", "--max-steps", "100000")
    try:
        said = _drain(process)
        assert process.stdout is not None
        kills = 0
        for line in process.stdout:
            if line.startswith(f"step {4 + 3 * kills}/") and kills < 2:
                os.kill(_ranks(process)[-1], signal.SIGKILL)
                kills += 1
        assert process.wait(60) == 1
    finally:
        process.kill()
        process.communicate()
    assert kills == 2
    assert "was killed" in "".join(said)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "failed"


@linux
@pytest.mark.parametrize("kill", [False, True])
def test_two_hosts_are_one_world(straight: Path, tmp_path: Path, kill: bool) -> None:
    run = tmp_path / "run"
    where = ["--out", str(run), "--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{_free_port()}", "--max-restarts", "1"]
    hosts = [_start(*TRAIN, *where, "--node-rank", str(rank)) for rank in (1, 0)][::-1]
    try:
        said = [_drain(host) for host in hosts]
        if kill:
            told = _kill_after_step(hosts[0], 5, hosts[1])
            assert "going on from" in told
        else:
            assert hosts[0].stdout is not None
            told = hosts[0].stdout.read()
        assert [host.wait(90) for host in hosts] == [0, 0], (told, said)
        assert hosts[1].stdout is not None
        assert "step 8/8" not in hosts[1].stdout.read()
    finally:
        for host in hosts:
            host.kill()
            host.communicate()
    assert _losses(run) == _losses(straight)
    assert _same_end(run, straight)
    log = subprocess.run([sys.executable, "-m", "meshloom.cli", "runs", "logs", str(run), "--rank", "1"],
                         capture_output=True, text=True, check=True)  # fmt: skip
    assert ("a rank died: restart" in log.stdout) == kill


@linux
def test_torchrun_restarts_and_resume_goes_on(straight: Path, tmp_path: Path) -> None:
    """Where torchrun starts the ranks, --resume without a value goes on in --out when it starts them again."""
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "--no-python",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{_free_port()}", sys.executable, "-u", "-c", MAIN,
        *TRAIN, "--out", str(run), "--resume",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said = _drain(process)
        told = _kill_after_step(process, 5, process)
        assert process.wait(90) == 0, (told, said)
    finally:
        process.kill()
        process.communicate()
    assert "checkpoints/checkpoint-" in told
    assert _losses(run) == _losses(straight)
    assert _same_end(run, straight)


def test_a_host_that_differs_is_refused(tmp_path: Path) -> None:
    port = _free_port()
    where = ["--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    first = _start(*TRAIN, *where, "--out", str(tmp_path / "a"))
    try:
        other = _start(*TRAIN, *where, "--plan", "tp2", "--node-rank", "1", "--out", str(tmp_path / "b"))
        _, said = other.communicate(timeout=120)
        assert other.returncode == 2
        assert (
            "host 0 has plan dp2, seed 0 on 2 hosts of 1 ranks, this one plan tp2, seed 0 on 2 hosts of 1 ranks" in said
        )
        taken = _start(*TRAIN, *where, "--out", str(tmp_path / "c"))
        _, said = taken.communicate(timeout=120)
        assert taken.returncode == 2
        assert f"expected to open port {port}" in said
    finally:
        first.kill()
        first.communicate()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--nnodes", "2"), "expected --rdzv-endpoint"),
        (("--nnodes", "2", "--rdzv-endpoint", "a:1"), "expected --out"),
        (("--nnodes", "2", "--rdzv-endpoint", "a:1", "--out", "x", "--node-rank", "2"), "from 0 to 1"),
        (("--nnodes", "3", "--rdzv-endpoint", "a:1", "--out", "x"), "expected a multiple of 3 ranks"),
        (("--nnodes", "2", "--rdzv-endpoint", "a:b", "--out", "x"), "expected HOST:PORT"),
        (("--node-rank", "1"), "expected --nnodes with them"),
        (("--max-restarts", "2", "--save-steps", "0"), "expected --save-steps too"),
        (("--launcher", "slurm"), "expected --out"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run([*TRAIN, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_under_torchrun_its_own_options_count(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert _run([*TRAIN, "--out", "x", "--max-restarts", "2"]) == 2
    assert "expected them at who starts the ranks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "found"),
    [("node0:29", ("node0", 29)), ("node0", ("node0", 29400)), ("[::1]:7", ("::1", 7)), ("[::1]", ("::1", 29400))],
)
def test_endpoints(text: str, found: tuple[str, int]) -> None:
    assert parse_endpoint(text) == found
    with pytest.raises(UsageError):
        parse_endpoint(text.partition(":")[0] + ":70000")


def test_slurm_prints_a_script_that_a_shell_takes(meshloom: Meshloom, tmp_path: Path) -> None:
    """The script is run with stand-ins for Slurm's own commands: each host gets its own number and the first's name."""
    arguments = [*TRAIN, "--plan", "tp2.dp4", "--nnodes", "2", "--out", "runs/it's big", "--device", "cuda"]
    result = meshloom(*arguments, "--launcher", "slurm", "--max-restarts", "3", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []
    assert "#SBATCH --nodes=2\n" in result.stdout
    assert "#SBATCH --gpus-per-node=4\n" in result.stdout
    stand_ins = {
        "srun": 'for id in 0 1; do SLURM_NODEID=$id "${@:2}"; done',
        "scontrol": "printf 'first\\nsecond\\n'",
        "meshloom": 'printf "<%s>" "$@"; echo',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "123456",
                   "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}  # fmt: skip
    told = subprocess.run(["bash", "-c", result.stdout], env=environment, capture_output=True, text=True, check=True)
    for rank, line in enumerate(told.stdout.splitlines()):
        assert "<--out><runs/it's big><--max-restarts><3><--resume>" in line
        assert f"<--nnodes><2><--node-rank><{rank}><--rdzv-endpoint><first:23456>" in line
        assert "slurm" not in line
