"""Ranks started by hand: they meet, say for whom they wait, and train as `meshloom train` does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

from meshloom.errors import RunFailed, UsageError
from meshloom.parallel.meet import Meeting, join, meet
from tests.conftest import Meshloom

TRAIN = ["train", "--model", "gpt2-tiny", "--tokenizer", "bytes", "--data", "sample", "--seq-length", "32"]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _start(*arguments: str, program: str | None = None) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    run = ["-c", program] if program else ["-m", "meshloom.cli"]
    return subprocess.Popen(
        [sys.executable, *run, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment,
    )  # fmt: skip


def _losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


DEBUGGED = """
import sys
import meshloom.train.loop as loop
step = loop.train_step
def stopped(*args, mesh, **kwargs):
    loop.train_step = step
    breakpoint()
    return step(*args, mesh=mesh, **kwargs)
loop.train_step = stopped
from meshloom.cli.__main__ import main
main(sys.argv[1:])
"""


def test_ranks_by_hand_train_as_train_does_and_one_stands_in_a_debugger(tmp_path: Path, meshloom: Meshloom) -> None:
    result = meshloom(*TRAIN, "--max-steps", "3", "--plan", "dp2", "--out", str(tmp_path / "together"))
    assert result.returncode == 0, result.stderr
    train = [*TRAIN, "--max-steps", "3", "--out", str(tmp_path / "by hand")]
    where = ["--plan", "dp2", "--port", str(_free_port()), "--timeout", "200"]
    ranks = [
        _start("launch", "--rank", "0", *where, "--", *train),
        _start("launch", "--rank", "1", *where, "--", *train, program=DEBUGGED),
    ]
    try:
        debugged = ranks[1].communicate("p 'rank', mesh.rank, 6 * 7\nc\n", timeout=240)
        plain = ranks[0].communicate(timeout=240)
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[0].returncode == 0, plain
    assert ranks[1].returncode == 0, debugged
    assert "(Pdb) ('rank', 1, 42)" in debugged[0]
    assert "step 3/3" in plain[0]
    assert "step 3/3" not in debugged[0]
    assert _losses(tmp_path / "by hand") == _losses(tmp_path / "together")


def test_a_rank_of_another_command_is_refused(tmp_path: Path, meshloom: Meshloom) -> None:
    port = str(_free_port())
    first = _start("launch", "--rank", "0", "--plan", "dp2", "--port", port, "--", *TRAIN, "--out", str(tmp_path / "a"))
    try:
        assert first.stderr is not None
        said = first.stderr.readline()
        assert said.startswith(f"rank 0 of 2 waits on 127.0.0.1:{port} for rank 1: start it with `meshloom launch --ra")
        assert f"--rank 1 --plan dp2 --port {port} -- train --model gpt2-tiny" in said
        for rank, plan, told in (("1", "tp2", "expected the command of the other ranks"), ("0", "dp2", "is taken")):
            second = ["launch", "--rank", rank, "--plan", plan, "--port", port, "--", *TRAIN]
            result = meshloom(*second, "--out", str(tmp_path / f"b{rank}"))
            assert result.returncode == 2, result.stderr
            assert told in result.stderr
            assert result.stderr.count("\n") == 1
    finally:
        first.kill()
        first.communicate()


def _meeting(rank: int, port: int, **changed: Any) -> Meeting:
    facts: dict[str, Any] = {"rank": rank, "world_size": 3, "port": port, "timeout_s": 60.0, "command": "x {rank}"}
    return Meeting(**{**facts, **changed})


def _come(meeting: Meeting, met: list[int]) -> None:
    with meet(meeting):
        met.append(meeting.rank)


def test_who_does_not_come_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    port = _free_port()
    with pytest.raises(RunFailed, match=rf"rank 0 of 3 waited 2 s on 127.0.0.1:{port} for ranks 1, 2, in vain"):
        _come(_meeting(0, port, timeout_s=1.5), [])
    assert "start each with `x 1`" in capsys.readouterr().err
    with pytest.raises(RunFailed, match="for rank 0, in vain"):
        _come(_meeting(1, _free_port(), timeout_s=0.1), [])


def test_a_place_is_free_again_after_a_failure() -> None:
    port = _free_port()
    met: list[int] = []
    threads = [threading.Thread(target=_come, args=(_meeting(rank, port), met), daemon=True) for rank in range(3)]
    threads[0].start()
    with pytest.raises(RunFailed, match="rank 2 of 3 waited"):
        _come(_meeting(2, port, timeout_s=1.0), [])
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(met) == [0, 1, 2]


def test_a_place_is_taken_once() -> None:
    store = HashStore()
    join(_meeting(1, 1), store)
    with pytest.raises(UsageError, match=f"rank 1 of 3 is there already, as process {os.getpid()}"):
        join(_meeting(1, 1), store)
    with pytest.raises(UsageError, match="expected the command of the other ranks, `x 2`, got `y 2`"):
        join(_meeting(2, 1, command="y {rank}"), store)
