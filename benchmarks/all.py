"""Runs the scripts of this folder one after another at sizes for two cores; each rewrites its part of RESULTS.md.

    python benchmarks/all.py --write
    python benchmarks/all.py --write --only main_job,convert
    python benchmarks/all.py --write --data ../shared/data

A script that needs inputs that are not here is named and left out, and the rest goes on; one that fails makes this
fail in the end. Each has a limit, at which it ends with all that it started, and all together have 40 minutes.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOTAL_S = 40 * 60
# script -> its arguments for two cores, and its limit in seconds
SCRIPTS: dict[str, tuple[list[str], float]] = {
    "main_job": ([], 240),
    "startup": (["--plans", "dp1,dp2", "--rounds", "3"], 150),
    "plan": (["--rounds", "1"], 180),
    "simulate": ([], 120),
    "accuracy": (["--data", "{data}/measurements/training_steps.jsonl.gz"], 120),
    "synth": (["--plan", "tp8.pp16.dp8"], 90),
    "view": (["--data", "{data}"], 150),
    "convert": ([], 240),
    "record": (["--rounds", "10"], 90),
    "memory": (["--size", "gpt2-medium", "--plans", "tp2"], 120),
    "data": (["--rounds", "1"], 180),
    "train": (["--steps", "100"], 180),
    "parity": (["--steps", "8"], 150),
    "generate": (["--smallest", "--rounds", "3"], 180),
    "parallel": (["--rounds", "10", "--only", "tp2"], 180),
    "kill_ranks": (["--plans", "dp2", "--kills", "3"], 90),
    "kill_saves": (["--kills", "10", "--plans", "dp1"], 120),
}


def run(command: list[str], limit_s: float) -> str:
    """How the command ended: done, its exit code, or its limit, at which its whole session is killed: ranks, too."""
    process = subprocess.Popen(command, cwd=HERE.parent, start_new_session=True)
    try:
        code = process.wait(limit_s)
        return "done" if not code else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        return f"took longer than its limit of {limit_s:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main() -> None:
    """Print a line a script; exit with 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of scripts joined by commas")
    parser.add_argument("--write", action="store_true", help="put the results into RESULTS.md")
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data", help="the real inputs")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else [*SCRIPTS]
    if unknown := [name for name in chosen if name not in SCRIPTS]:
        parser.error(f"expected scripts of {', '.join(SCRIPTS)}, got {unknown[0]}")
    begin, failed = time.monotonic(), []
    for name in chosen:
        arguments, limit_s = SCRIPTS[name]
        if any("{data}" in each for each in arguments) and not options.data.is_dir():
            print(f"{name}: left out, {options.data} is not there", flush=True)
            continue
        left_s = TOTAL_S - (time.monotonic() - begin)
        started = time.monotonic()
        given = [each.format(data=options.data) for each in arguments]
        command = [sys.executable, str(HERE / f"{name}.py"), *given, *(["--write"] if options.write else [])]
        said = run(command, min(limit_s, left_s)) if left_s > 0 else "no time was left"
        if said != "done":
            failed.append(name)
        print(f"{name}: {said}, {time.monotonic() - started:.0f} s", flush=True)
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}; RESULTS.md keeps their older parts")


if __name__ == "__main__":
    main()
