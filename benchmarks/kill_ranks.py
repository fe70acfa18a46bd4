"""Ranks killed with SIGKILL at random steps: each run goes on by itself, and ends as one that nobody disturbed.

For each plan a run without disturbance; then runs with --max-restarts, of which a random rank is killed as a random
step is told. Losses of all steps and the final weights are compared to the bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from meshloom.plan import Plan
from results import section, write_section

STEPS = 12
TRAIN = (
    "--model", "gpt2-tiny", "--data", "sample", "--seq-length", "32", "--gradient-accumulation", "2", "--log-steps",
    "1", "--max-steps", str(STEPS), "--save-steps", "3", "--device", "cpu",
)  # fmt: skip


def start(plan: str, out: Path, *more: str) -> subprocess.Popen[str]:
    """A run, whose output comes line by line."""
    command = [sys.executable, "-u", "-m", "meshloom.cli", "train", *TRAIN, "--plan", plan, "--out", str(out), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def killed(plan: str, out: Path, rank: int, step: int) -> float:
    """A run whose rank is killed once the step is told; seconds from then to the next step that is told."""
    at = 0.0
    back = None
    with start(plan, out, "--max-restarts", "1") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(f"step {step}/") and not at:
                ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                os.kill(int(ranks[rank]), signal.SIGKILL)
                at = time.monotonic()
            elif line.startswith("a rank died"):
                back = 0.0
            elif line.startswith("step ") and back == 0.0:
                back = time.monotonic() - at
    if process.returncode or back is None:
        raise SystemExit(f"{out}: exit code {process.returncode}; the run did not go on")
    return back


def same(one: Path, other: Path) -> tuple[bool, bool]:
    """Whether the losses are the same, and whether the final weights are."""
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)
    ]
    mine, theirs = (
        load_file(run / "checkpoints" / f"checkpoint-{STEPS}" / "model.safetensors") for run in (one, other)
    )
    return losses[0] == losses[1], all(torch.equal(mine[name], theirs[name]) for name in theirs)


def main() -> None:
    """Kill and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", default="dp2,tp2,pp2,tp2.pp2")
    parser.add_argument("--kills", type=int, default=10, help="for each plan")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="put the result into RESULTS.md")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    lines = ["| plan | killed | same losses | same weights | back after, median (s) |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for plan in options.plans.split(","):
            straight = Path(folder) / plan
            with start(plan, straight) as process:
                process.communicate()
            size = Plan.parse(plan).world_size
            found, times = [], []
            for number in range(options.kills):
                run = Path(folder) / f"{plan}.{number}"
                times.append(killed(plan, run, chance.randrange(size), chance.randint(1, STEPS - 2)))
                found.append(same(run, straight))
            counts = [sum(part) for part in zip(*found)]
            lines.append(
                f"| {plan} | {options.kills} | {counts[0]} | {counts[1]} | {sorted(times)[len(times) // 2]:.1f} |"
            )
    command = f"python benchmarks/kill_ranks.py --plans {options.plans} --kills {options.kills}"
    text = section("Ranks killed at random steps, gpt2-tiny in float32", command, "\n".join(lines))
    print(text)
    if options.write:
        write_section(text)


if __name__ == "__main__":
    main()
