"""From PyTorch's files to Chakra traces: CPU seconds and memory, against the reference package in the same run.

Makes its inputs by capturing real runs of a small GPT-2 (or takes `--host FILE --device FILE`), then runs each tool
in a process of its own: ours, from both files to the `.et`; the floor, only decoding both files with msgspec; and the
reference's converter on the host trace alone. Its linker is left out where its undeclared dependency et_replay cannot
be imported. `--json` prints the figures, `--write` puts them into RESULTS.md.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from results import machine, section, write_section

SIZES = {"small": 6, "large": 33}  # steps recorded: about 53,000 and 290,000 nodes


def capture(folder: Path, num_steps: int) -> None:
    """Record `num_steps` steps of a GPT-2 of 12 layers on one rank."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import meshloom

    model = GPT2LMHeadModel(GPT2Config(n_layer=12, n_head=4, n_embd=64, vocab_size=1000))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with meshloom.record(folder, wait=1, warmup=0, active=num_steps, model=model) as rec:
        for _ in range(1 + num_steps):
            ids = torch.randint(1000, (2, 32))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            rec.step()


def ours(host: Path, device: Path, out: Path) -> None:
    """Both files to the `.et`."""
    from meshloom.capture.convert import convert_rank

    notes = host.with_name("rank0.notes.json")
    convert_rank(host, device, out, notes=notes if notes.is_file() else None)


def floor(host: Path, device: Path, out: Path) -> None:
    """Only decode both files."""
    import msgspec

    gc.disable()  # as ours does: it would be most of the time
    for path in (host, device):
        msgspec.json.decode(path.read_bytes())


def reference(host: Path, device: Path, out: Path) -> None:
    """The reference's converter; the schema is renamed, because it lists 1.1.1 but cannot read it."""
    from chakra.src.converter.pytorch_converter import PyTorchConverter

    renamed = out.with_suffix(".json")
    renamed.write_text(host.read_text().replace('"1.1.1-chakra.0.0.4"', '"1.1.0-chakra.0.0.4"', 1))
    PyTorchConverter().convert(str(renamed), str(out), False)


def reference_linker(host: Path, device: Path, out: Path) -> None:
    """The reference's linker, where what it needs can be imported."""
    from chakra.src.trace_link.trace_linker import TraceLinker

    TraceLinker().link(0, str(host), str(device), str(out.with_suffix(".linked.json")))


TASKS: dict[str, Callable[[Path, Path, Path], None]] = {
    "ours": ours,
    "floor": floor,
    "reference converter": reference,
    "reference linker": reference_linker,
}


def measure(task: str, host: Path, device: Path, folder: Path) -> dict[str, float]:
    """CPU seconds (less those of an empty run of the same imports) and peak memory of a task in its own process."""
    command = [sys.executable, __file__, "--task", task, "--host", str(host), "--device", str(device), "--out",
               str(folder / "out.et")]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


def rates(host: Path, device: Path, folder: Path) -> dict[str, float]:
    """Nodes a CPU second of writing, reading and checking our file; medians of three."""
    from meshloom import Trace, check, read, write

    ours(host, device, folder / "rates.et")
    stored = read(folder / "rates.et")
    trace = Trace(nodes=list(stored.nodes), attrs=stored.attrs)
    found: dict[str, list[float]] = {"write": [], "read": [], "check": []}
    for _ in range(3):
        for name, work in (
            ("write", lambda: write(trace, folder / "again.et")),
            ("read", lambda: deque(read(folder / "rates.et").nodes, maxlen=0)),  # every node, decoded
            ("check", lambda: check(stored)),  # with decoding, as a file is checked
        ):
            begin = time.process_time()
            work()
            found[name].append(len(trace.nodes) / (time.process_time() - begin))
    return {"nodes": len(trace.nodes), **{name: median(values) for name, values in found.items()}}


def compare(host: Path, device: Path, *, with_reference: bool) -> dict[str, Any]:
    """All tasks on one pair, three times in turn; medians."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tasks = [task for task in TASKS if with_reference or not task.startswith("reference")]
        runs = {task: [] for task in tasks} if tasks else {}
        for _ in range(3):
            for task in tasks:
                runs[task].append(measure(task, host, device, folder))
        told = {task: {key: median(run[key] for run in all_of) for key in all_of[0]} for task, all_of in runs.items()}
        sizes = {"host_mb": host.stat().st_size / 1e6, "device_mb": device.stat().st_size / 1e6}
        return {**sizes, **rates(host, device, folder), "tasks": told}


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown."""
    rows = ["| input | tool | CPU s | µs a node | peak MiB |", "|---|---|---|---|---|"]
    for name, told in results.items():
        label = f"{name}: {told['nodes']:,} nodes, {told['host_mb']:.0f} + {told['device_mb']:.0f} MB"
        for task, run in told["tasks"].items():
            per_node = run["cpu_s"] / told["nodes"] * 1e6
            rows.append(f"| {label} | {task} | {run['cpu_s']:.2f} | {per_node:.1f} | {run['peak_mib']:.0f} |")
    rows += ["", "| input | write nodes/s | read nodes/s | check nodes/s |", "|---|---|---|---|"]
    rows += [f"| {name} | {told['write']:,.0f} | {told['read']:,.0f} | {told['check']:,.0f} |"
             for name, told in results.items()]  # fmt: skip
    if importlib.util.find_spec("et_replay") is None:
        rows += ["", "The reference's linker is left out: its undeclared dependency et_replay is not on PyPI. Its "
                 "converter reads the host trace alone."]  # fmt: skip
    return "\n".join(rows)


def main() -> None:
    """Capture, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", type=Path)
    parser.add_argument("--device", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--capture", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.capture:
        capture(options.out, options.capture)
        return
    if options.task:
        begin = time.process_time()
        TASKS[options.task](options.host, options.device, options.out)
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"cpu_s": time.process_time() - begin, "peak_mib": peak_mib}))
        return
    if importlib.util.find_spec("et_replay") is None:
        TASKS.pop("reference linker")
    with_reference = importlib.util.find_spec("chakra") is not None
    results = {}
    if options.host:
        results["given"] = compare(options.host, options.device, with_reference=with_reference)
    else:
        for name, num_steps in SIZES.items():
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, __file__, "--capture", str(num_steps), "--out", folder]
                subprocess.run(command, check=True, capture_output=True)
                pair = (Path(folder) / f"rank0.{kind}.json" for kind in ("host", "device"))
                results[name] = compare(*pair, with_reference=with_reference)
    text = section("From PyTorch's files to Chakra", "python benchmarks/convert.py", table(results))
    print(json.dumps({"machine": machine(), "results": results}) if options.json else text)
    if options.write:
        write_section(text)


if __name__ == "__main__":
    main()
