"""Start to first step: `meshloom train` on one, two and eight ranks of this host, in turns, each in a new process.

The clock runs from before the interpreter is started to the line of the first step; all runs find their data
tokenised. A rank has its share of the cores, so a step of eight ranks on two cores is itself four times as long: the
first step's own time is taken from the run's metrics and told beside.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import section, write_section

_TRAIN = ("--model", "gpt2-tiny", "--data", "sample", "--max-steps", "2", "--log-steps", "1", "--device", "cpu")


def start(plan: str, folder: Path) -> tuple[float, float]:
    """Seconds to the line of the first step, and those that the step itself took."""
    out = folder / f"{plan}.{time.time_ns()}"
    command = [sys.executable, "-u", "-m", "meshloom.cli", "train", *_TRAIN, "--plan", plan, "--out", str(out)]
    begin = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        seconds = next(time.monotonic() - begin for line in process.stdout if line.startswith("step 1/"))
        process.stdout.read()
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    return seconds, first["duration_ns"] / 1e9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", default="dp1,dp2,dp8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="put the result into RESULTS.md")
    options = parser.parse_args()
    plans = options.plans.split(",")
    found: dict[str, list[tuple[float, float]]] = {plan: [] for plan in plans}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MESHLOOM_CACHE_DIR"] = str(Path(folder) / "cache")
        start(plans[0], Path(folder))  # which tokenises, and warms the system's cache of files
        for _ in range(options.rounds):
            for plan in plans:
                found[plan].append(start(plan, Path(folder)))
    whole = {plan: statistics.median(seconds for seconds, _ in times) for plan, times in found.items()}
    lines = ["| plan | start to first step (s) | of which the step | against the first |", "|---|---|---|---|"]
    for plan, times in found.items():
        step = statistics.median(step for _, step in times)
        lines.append(f"| {plan} | {whole[plan]:.2f} | {step:.2f} | {whole[plan] / whole[plans[0]]:.2f} × |")
    command = f"python benchmarks/startup.py --plans {options.plans} --rounds {options.rounds}"
    text = section("Start to first step, gpt2-tiny on CPU", command, "\n".join(lines))
    print(text)
    if options.write:
        write_section(text)


if __name__ == "__main__":
    main()
