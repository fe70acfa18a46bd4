"""Start to first step: `meshloom train` on one, two and eight ranks of this host, in turns, each in a new process.

The clock runs from before the interpreter is started to the line of the first step; all runs find their data
tokenised. Three parts: until the ranks are started (the interpreter, imports, checks), which is paid once however many
there are; what each rank does before its first step (its part of the model, its groups); and the step itself. With more
ranks than cores the last two are shared out: eight ranks on two cores take four times as long for them.
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


def start(plan: str, folder: Path) -> tuple[float, float, float]:
    """Seconds to the line of the first step, those until the ranks are started, and those of the step itself."""
    out = folder / f"{plan}.{time.time_ns()}"
    command = [sys.executable, "-u", "-m", "meshloom.cli", "train", *_TRAIN, "--plan", plan, "--out", str(out)]
    begin = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        ready = seconds = 0.0
        for line in process.stdout:
            if line.startswith("run folder:"):
                ready = time.monotonic() - begin
            elif line.startswith("step 1/"):
                seconds = time.monotonic() - begin
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    return seconds, ready, first["duration_ns"] / 1e9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", default="dp1,dp2,dp8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="put the result into RESULTS.md")
    options = parser.parse_args()
    plans = options.plans.split(",")
    found: dict[str, list[tuple[float, float, float]]] = {plan: [] for plan in plans}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MESHLOOM_CACHE_DIR"] = str(Path(folder) / "cache")
        start(plans[0], Path(folder))  # which tokenises, and warms the system's cache of files
        for _ in range(options.rounds):
            for plan in plans:
                found[plan].append(start(plan, Path(folder)))
    parts = {plan: [statistics.median(part) for part in zip(*times)] for plan, times in found.items()}
    lines = [
        "| plan | start to first step (s) | until ranks are started | before the step | the step | against the first |",
        "|---|---|---|---|---|---|",
    ]
    for plan, (whole, ready, step) in parts.items():
        rest, ratio = whole - ready - step, whole / parts[plans[0]][0]
        lines.append(f"| {plan} | {whole:.2f} | {ready:.2f} | {rest:.2f} | {step:.2f} | {ratio:.2f} × |")
    command = f"python benchmarks/startup.py --plans {options.plans} --rounds {options.rounds}"
    text = section("Start to first step, gpt2-tiny on CPU", command, "\n".join(lines))
    print(text)
    if options.write:
        write_section(text)


if __name__ == "__main__":
    main()
