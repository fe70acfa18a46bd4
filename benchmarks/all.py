"""Runs the scripts of this folder one after another at sizes for two cores; each rewrites its part of RESULTS.md.

    python benchmarks/all.py --write
    python benchmarks/all.py --write --only main_job,convert

A script that needs inputs or a peer that are not here is named and left out, and the rest goes on; one that fails
makes this fail in the end. Each has a limit, and all together have 40 minutes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOTAL_S = 40 * 60
# script -> its arguments for two cores, and its limit in seconds
SCRIPTS: dict[str, tuple[list[str], float]] = {
    "train": (["--steps", "300"], 180),
    "startup": (["--plans", "dp1,dp2", "--rounds", "3"], 180),
    "plan": (["--rounds", "1"], 300),
    "simulate": ([], 180),
    "convert": ([], 300),
    "record": (["--rounds", "10"], 120),
    "memory": (["--size", "gpt2-medium", "--plans", "tp2"], 180),
    "data": (["--rounds", "1"], 300),
    "generate": (["--smallest", "--rounds", "3"], 240),
    "parallel": (["--rounds", "10", "--only", "tp2"], 300),
    "kill_saves": (["--kills", "10", "--plans", "dp1"], 180),
    "kill_ranks": (["--plans", "dp2", "--kills", "2"], 180),
    "parity": (["--steps", "20"], 240),
    "main_job": ([], 420),
}


def main() -> None:
    """Print a line a script; exit with 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of scripts joined by commas")
    parser.add_argument("--write", action="store_true", help="put the results into RESULTS.md")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else [*SCRIPTS]
    if unknown := [name for name in chosen if name not in SCRIPTS]:
        parser.error(f"expected scripts of {', '.join(SCRIPTS)}, got {unknown[0]}")
    begin, failed = time.monotonic(), []
    for name in chosen:
        arguments, limit_s = SCRIPTS[name]
        left_s = TOTAL_S - (time.monotonic() - begin)
        started = time.monotonic()
        command = [sys.executable, str(HERE / f"{name}.py"), *arguments, *(["--write"] if options.write else [])]
        try:
            code = subprocess.run(
                command, cwd=HERE.parent, timeout=max(1.0, min(limit_s, left_s)), check=False
            ).returncode
            said = "done" if not code else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            said = "took longer than its limit"
        if said != "done":
            failed.append(name)
        print(f"{name}: {said}, {time.monotonic() - started:.0f} s", flush=True)
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}; RESULTS.md keeps their older parts")


if __name__ == "__main__":
    main()
