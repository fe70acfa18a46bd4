"""How long synthesis takes and what it needs: GPT-3 175B's training step on 1,024 and 8,192 ranks and Llama-3 70B's
generation on 8, as roles; `--all-ranks` also writes all 1,024 files.

Each case runs the command line in a process of its own; time and memory are those of that process and its children.
All files of the whole step would take 35 GB, so that case has 16 micro-batches a rank instead of 192: the same nodes,
fewer times. `--config … --plan … --global-batch …` measures another case; `--stage FOLDER` (a checkout of
github.com/astra-sim/symbolic_tensor_graph, with what it needs installed) runs STAGE beside; `--write` puts the table
into RESULTS.md.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from results import section, write_section

GPT3 = {"model_type": "gpt2", "n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048, "vocab_size": 51200}


class Case(NamedTuple):
    """A command line of `meshloom synth`, and what it is called in the table."""

    name: str
    plan: str
    options: Sequence[str]
    roles: bool = True


def training(name: str, model: str, plan: str, global_batch: int, seq_length: int, *, roles: bool = True) -> Case:
    """A training step with one sequence a micro-batch."""
    told = f"{name}, {global_batch:,} sequences"
    sizes = ["--micro-batch", "1", "--global-batch", str(global_batch), "--seq-length", str(seq_length)]
    return Case(told, plan, ["--model", model, "--plan", plan, *sizes], roles)


def goals(gpt3: str, *, all_ranks: bool) -> list[Case]:
    """What the goals are set for."""
    cases = [training("GPT-3 175B step", gpt3, plan, 1536, 2048) for plan in ("tp8.pp16.dp8", "tp8.pp16.dp64")]
    tokens = ["--num-input-tokens", "2048", "--num-output-tokens", "129", "--precision", "bf16"]
    told = "Llama-3 70B, 2,048 tokens and 128 more steps"
    cases.append(Case(told, "tp8", ["--inference", "--model", "llama-3-70b", "--plan", "tp8", *tokens]))
    if all_ranks:
        cases.append(training("GPT-3 175B step", gpt3, "tp8.pp16.dp8", 128, 2048, roles=False))
    return cases


def measure(case: Case, out: Path) -> dict[str, Any]:
    """Run `meshloom synth`; seconds of wall and processor, peak memory and what it told."""
    command = [
        sys.executable, "-m", "meshloom.cli", "synth", *case.options, "--out", str(out / "trace"), "--json",
        *(["--roles"] if case.roles else []),
    ]  # fmt: skip
    used = run(command, out)
    told = json.loads((out / "stdout").read_text())
    shutil.rmtree(out / "trace")
    names = ("num_ranks", "num_roles", "num_files", "num_nodes", "num_bytes", "num_flops", "notes")
    return {
        "name": case.name,
        "plan": case.plan,
        "written": "roles" if case.roles else "all ranks",
        **used,
        **{name: told[name] for name in names},
        "nodes_per_second": told["num_nodes"] / used["seconds"],
        "bytes_per_second": told["num_bytes"] / used["seconds"],
    }


def run(command: Sequence[str], out: Path, folder: Path | None = None) -> dict[str, Any]:
    """Run a command; what it used, with its children."""
    began = time.perf_counter()
    with (out / "stdout").open("wb") as stdout:
        process = subprocess.Popen(command, stdout=stdout, cwd=folder)
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return {
        "seconds": wall,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,  # of the largest process
    }


def beside_stage(folder: Path, gpt3: str, plan: dict[str, int], out: Path) -> list[dict[str, Any]]:
    """One micro-batch of GPT-3 175B on a plan, by STAGE and by `meshloom synth` with all ranks' files."""
    text = ".".join(f"{axis}{size}" for axis, size in plan.items())
    sizes = {"dmodel": 12288, "dff": 4 * 12288, "head": 96, "kvhead": 96, "num_stacks": 96, "seq": 2048,
             "dvocal": 51200, "batch": plan["dp"], "micro_batch": 1, **plan}  # fmt: skip
    command = [
        sys.executable, "main.py", "--output_dir", str(out / "stage"), "--output_name", "gpt.%d.et",
        "--model_type", "gpt", *(part for name, size in sizes.items() for part in (f"--{name}", str(size))),
    ]  # fmt: skip
    (out / "stage").mkdir()
    theirs = run(command, out, folder)
    files = list((out / "stage").glob("*.et"))
    shared = {"plan": text, "num_ranks": plan["tp"] * plan["pp"] * plan["dp"]}
    row = {"name": "STAGE", **shared, **theirs, "written": "all ranks", "num_files": len(files), "num_nodes": 0,
           "num_bytes": sum(file.stat().st_size for file in files)}  # fmt: skip
    shutil.rmtree(out / "stage")
    return [row, measure(training("GPT-3 175B step", gpt3, text, plan["dp"], 2048, roles=False), out)]


def table(rows: list[dict[str, Any]]) -> str:
    """The measurements in markdown."""
    lines = [
        "| step | plan | ranks | written | s | processor s | peak MB | nodes | MB | nodes/s | MB/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['name']} | {row['plan']} | {row['num_ranks']:,} | {row['written']}: {row['num_files']:,} files "
        f"| {row['seconds']:.1f} | {row['processor_seconds']:.1f} | {row['peak_bytes'] / 1e6:.0f} "
        f"| {row['num_nodes']:,} | {row['num_bytes'] / 1e6:,.0f} | {row['num_nodes'] / row['seconds']:,.0f} "
        f"| {row['num_bytes'] / 1e6 / row['seconds']:,.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, and show or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a config.json, instead of the cases of the goal")
    parser.add_argument("--plan", action="append", help="with --config; default: tp8.pp16.dp8")
    parser.add_argument("--global-batch", type=int, default=1536)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--all-ranks", action="store_true", help="also write every rank's file, not only the roles'")
    parser.add_argument("--stage", type=Path, metavar="FOLDER", help="a checkout of STAGE, to run beside ours")
    parser.add_argument("--folder", type=Path, help="where to write (and remove) traces; default: a temporary folder")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        gpt3 = folder / "gpt3.json"
        gpt3.write_text(json.dumps(GPT3))
        if options.config:
            sizes = options.global_batch, options.seq_length
            cases = [
                training(options.config.stem, str(options.config), plan, *sizes, roles=not options.all_ranks)
                for plan in options.plan or ["tp8.pp16.dp8"]
            ]
        else:
            cases = goals(str(gpt3), all_ranks=options.all_ranks)
        rows = [measure(case, folder) for case in cases]
        if options.stage:
            for plan in ({"tp": 8, "pp": 8, "dp": 1}, {"tp": 8, "pp": 8, "dp": 8}):
                rows += beside_stage(options.stage, str(gpt3), plan, folder)
    if options.json:
        print(json.dumps(rows))
        return
    given = " --all-ranks" * options.all_ranks + (" --stage …" if options.stage else "")
    title = "Synthesis" if options.config is None else f"Synthesis of a training step: {options.config.stem}"
    text = section(title, "python benchmarks/synth.py" + given, table(rows))
    print(text)
    if options.write:
        write_section(text)


if __name__ == "__main__":
    main()
