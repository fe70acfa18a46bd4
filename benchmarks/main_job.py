"""Wall time and peak memory of the main job: the demo, and GPT-2 and BERT at their real sizes on real SQuAD.

`python benchmarks/main_job.py` prints a table, `--json` the figures, `--write` puts the table into RESULTS.md.
The real sizes need ../shared/data and are left out, with a line that says so, where that is absent.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from results import machine, section, write_section

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
SQUAD = SHARED / "squad" / "squad-v1.1-train.rebuilt.json.gz"


def cases() -> dict[str, list[str]]:
    """Name -> the command line."""
    found = {"demo": ["demo"]}
    for model in ("gpt2", "bert-base-uncased"):
        if SQUAD.is_file():
            tokenizer = str(SHARED / "tokenizers" / model)
            found[f"train {model}, dp2, 3 steps of 128 tokens, one recorded"] = [
                "train", "--model", model, "--tokenizer", tokenizer, "--data", str(SQUAD), "--plan", "dp2",
                "--max-steps", "3", "--seq-length", "128", "--trace",
            ]  # fmt: skip
    return found


def measure(arguments: list[str]) -> dict[str, Any]:
    """Run the command line in a process of its own: wall seconds, peak memory of its largest process, its faults."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        begin = time.monotonic()
        command = [sys.executable, "-m", "meshloom.cli", *arguments, "--out", str(out)]
        subprocess.run(command, check=True, capture_output=True, cwd=folder)
        wall_s = time.monotonic() - begin
        peak_mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        told = subprocess.run(
            [sys.executable, "-m", "meshloom.cli", "check", str(out)], check=True, capture_output=True, text=True
        )
        losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {"wall_s": wall_s, "peak_mib": peak_mib, "first_loss": losses[0], "last_loss": losses[-1],
            "check": told.stdout.strip()}  # fmt: skip


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown."""
    rows = ["| what | wall s | peak MiB of one process | loss | check |", "|---|---|---|---|---|"]
    for name, told in results.items():
        loss = f"{told['first_loss']:.3f} → {told['last_loss']:.3f}"
        rows.append(f"| {name} | {told['wall_s']:.1f} | {told['peak_mib']:.0f} | {loss} | {told['check']} |")
    return "\n".join(rows)


def main() -> None:
    """Measure every case in a process of its own, so that each peak is its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(cases()[options.case])))
        return
    results = {}
    for name in cases():
        done = subprocess.run([sys.executable, __file__, "--case", name], check=True, capture_output=True, text=True)
        results[name] = json.loads(done.stdout)
    if not SQUAD.is_file():
        print("left out: the real sizes, which need ../shared/data", file=sys.stderr)
    if options.json:
        print(json.dumps({"machine": machine(), "results": results}))
        return
    text = section("The main job", "python benchmarks/main_job.py", table(results))
    print(text)
    if options.write:
        write_section(text)


if __name__ == "__main__":
    main()
