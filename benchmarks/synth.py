"""How long synthesis takes and what it needs: a training step of GPT-3 175B on 1,024 and 8,192 ranks, as roles.

Each case runs the command line in a process of its own; time and memory are those of that process and its children.
`--config … --plan … --global-batch …` measures another case; `--write` puts the table into RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from results import section, write_section

GPT3 = {"model_type": "gpt2", "n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048, "vocab_size": 51200}
CASES = (("tp8.pp16.dp8", 1536), ("tp8.pp16.dp64", 1536))


def measure(config: Path, plan: str, global_batch: int, seq_length: int, *, roles: bool, out: Path) -> dict[str, Any]:
    """Run `meshloom synth`; seconds of wall and processor, peak memory and what it told."""
    command = [
        sys.executable, "-m", "meshloom.cli", "synth", "--model", str(config), "--plan", plan, "--micro-batch", "1",
        "--global-batch", str(global_batch), "--seq-length", str(seq_length), "--out", str(out / "trace"), "--json",
    ]  # fmt: skip
    began = time.perf_counter()
    with (out / "stdout").open("wb") as stdout:
        process = subprocess.Popen([*command, *(["--roles"] if roles else [])], stdout=stdout)
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    told = json.loads((out / "stdout").read_text())
    shutil.rmtree(out / "trace")
    return {
        "plan": plan,
        "global_batch": global_batch,
        "written": "roles" if roles else "all ranks",
        "seconds": wall,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,  # of the largest process
        **{name: told[name] for name in ("num_ranks", "num_roles", "num_files", "num_nodes", "num_bytes", "notes")},
        "nodes_per_second": told["num_nodes"] / wall,
        "bytes_per_second": told["num_bytes"] / wall,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The measurements in markdown."""
    lines = [
        "| plan | ranks | global batch | written | s | processor s | peak MB | nodes | MB | nodes/s | MB/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['plan']} | {row['num_ranks']:,} | {row['global_batch']:,} "
        f"| {row['written']}: {row['num_files']:,} files "
        f"| {row['seconds']:.1f} | {row['processor_seconds']:.1f} | {row['peak_bytes'] / 1e6:.0f} "
        f"| {row['num_nodes']:,} | {row['num_bytes'] / 1e6:,.0f} | {row['nodes_per_second']:,.0f} "
        f"| {row['bytes_per_second'] / 1e6:,.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, and show or write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, help="a config.json, instead of GPT-3 175B")
    parser.add_argument("--plan", action="append", help="default: both plans of the goal")
    parser.add_argument("--global-batch", type=int, default=1536)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--all-ranks", action="store_true", help="write every rank's file, not only the roles'")
    parser.add_argument("--folder", type=Path, help="where to write (and remove) traces; default: a temporary folder")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        config = options.config or Path(folder) / "config.json"
        if options.config is None:
            config.write_text(json.dumps(GPT3))
        plans = options.plan or [plan for plan, _ in CASES]
        for plan in plans:
            out = Path(folder) / plan
            out.mkdir()
            rows.append(
                measure(config, plan, options.global_batch, options.seq_length, roles=not options.all_ranks, out=out)
            )
    if options.json:
        print(json.dumps(rows))
        return
    what = "GPT-3 175B" if options.config is None else options.config.stem
    title = f"Synthesis of a training step: {what}" + (", all files" if options.all_ranks else "")
    text = section(title, "python benchmarks/synth.py" + " --all-ranks" * options.all_ranks, table(rows))
    print(text)
    if options.write:
        write_section(text)


if __name__ == "__main__":
    main()
