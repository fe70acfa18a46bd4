"""Holds predicted training steps, memory and kernels against measured ones; uses the shipped constants, fits nothing.

    python benchmarks/accuracy.py --data DATA.jsonl.gz [--reference reference.json] [--json] [--every] [--write]

By source: median, 90th percentile and worst of |predicted / measured - 1| in logarithms, so that halves and doubles
count alike. Rows of the third that `fit_steps.py` used are told apart where the data are those it used (`--all` counts
them together, as for data that nothing was fitted to). Rows that cannot be predicted are counted and said why.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

import rows as measured
from fit_steps import SPLIT, in_third
from meshloom.plan import Plan
from meshloom.simulate.memory import layer_activation_bytes, predict_memory, stage_memory
from meshloom.simulate.shape import Job, Shape
from meshloom.simulate.stack import STACKS
from meshloom.simulate.step import predict_step
from results import section, write_section
from rows import Row

GIB = 2**30
# Korthikanti et al. 2022, figure 1: layers, hidden, heads, pp, chunks, micro-batch
_FIGURE_1 = {
    "22B": (48, 6144, 64, 1, 1, 4), "175B": (96, 12288, 96, 8, 3, 1), "530B": (105, 20480, 128, 35, 3, 1),
    "1T": (128, 25600, 160, 64, 1, 1),
}  # fmt: skip


def label(row: Row) -> str:
    """The row in words."""
    cut = ".".join(f"{axis}{row[axis]}" for axis in ("tp", "cp", "pp", "dp") if row[axis] > 1) or "1 rank"
    model = row["model"]
    return (
        f"{model['name']} h{model.get('hidden')} L{model['layers']} {cut} mb{row['micro_batch']} "
        f"gb{row['global_batch']} s{row['seq']} {row['precision']} {row['gpu']}"
    )


def judge(row: Row, clusters: dict[str, Any]) -> dict[str, Any]:
    """Predicted and measured of one row; raises Unpredictable."""
    job = measured.job_of(row, clusters, STACKS)
    seconds, step = measured.measured_seconds(row), predict_step(job)
    found = {
        "source": row["source"], "row": label(row), "measured_s": seconds, "predicted_s": step.step_s,
        "error": math.log(step.step_s / seconds), "limit": step.limit, "warnings": list(step.warnings),
    }  # fmt: skip
    memory = predict_memory(job)
    found["predicted_reserved_gib"] = memory.reserved_bytes / GIB
    found["fits"] = memory.reserved_bytes <= job.cluster.device.memory_bytes
    if row.get("mem_alloc_gb"):  # nanotron logs rank 0 between steps, in GiB
        found["memory_error"] = math.log(stage_memory(job, 0).static_bytes / GIB / row["mem_alloc_gb"])
    if row.get("measured_alloc_gib"):
        found["memory_error"] = math.log(memory.allocated_bytes / GIB / row["measured_alloc_gib"])
    return found


def korthikanti_memory(figures: list[Row]) -> list[tuple[str, float]]:
    """Errors against figure 1, whose bars leave embeddings out: an inner stage's states, the first one's layers."""
    found = []
    for figure in figures:
        layers, hidden, heads, pp, chunks, micro_batch = _FIGURE_1[figure["model"]]
        cut = figure["mode"] == "seqsel"
        shape = Shape(
            num_layers=layers, hidden_size=hidden, intermediate_size=4 * hidden, num_heads=heads, num_kv_heads=heads,
            vocab_size=51200,
        )  # fmt: skip
        plan = Plan(
            tp=8, pp=pp, sequence_parallel=cut, num_micro_batches=max(64, 2 * pp), virtual_stages=chunks,
            recompute="selective" if cut else "none", schedule="interleaved" if chunks > 1 else "1f1b",
        )  # fmt: skip
        job = Job(
            shape=shape, plan=plan, cluster=measured.make_clusters()["selene"], stack=STACKS["megatron-2022"],
            seq_length=2048, global_batch=micro_batch * plan.num_micro_batches,
        )  # fmt: skip
        states = shape.layer_parameters * layers / pp / 8 * sum(job.stack.state_bytes) / GIB
        flight = pp * (1 + (pp - 1) / (pp * chunks)) if chunks > 1 else pp
        activations = layer_activation_bytes(job) * layers / pp * flight / GIB
        name = f"{figure['model']} {figure['mode']}"
        found.append((f"{name} states", states / figure["weights_and_optimizer_gib"] - 1))
        found.append((f"{name} activations", activations / figure["activations_gib"] - 1))
    return found


def summary(errors: list[float]) -> str:
    """Median, 90th percentile and worst of absolute errors."""
    each = np.abs(errors)
    return f"{np.median(each):.1%} | {np.percentile(each, 90):.1%} | {each.max():.1%} | {len(each)}"


def table(results: list[dict[str, Any]], title: str) -> list[str]:
    """Rows of Markdown by source, the worst one named, and all together."""
    by_source: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        by_source[result["source"]].append(result)
    lines = [f"| {title} | median | p90 | worst | rows | worst row |", "|---|---|---|---|---|---|"]
    megatron = [r for r in results if r["source"] in ("narayanan2021", "korthikanti2022")]
    groups = {**by_source, "Megatron-LM (both papers)": megatron, "**together**": results}
    for source, group in groups.items():
        if group:
            worst = max(group, key=lambda result: abs(result["error"]))
            named = f"{worst['row']}: {worst['measured_s']:.3g} s, predicted {worst['predicted_s']:.3g} s"
            lines.append(f"| {source} | {summary([r['error'] for r in group])} | {named} |")
    return lines


def report(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """Every row's result, and the report."""
    rows, clusters = measured.read(options.data), measured.make_clusters()
    results, refused = [], Counter()
    for row in rows:
        try:
            result = judge(row, clusters)
        except measured.Unpredictable as reason:
            refused[f"{row['source']}: {reason}"] += 1
            continue
        results.append({**result, "fitted": not options.all and in_third(row, SPLIT)})
    rest = [result for result in results if not result["fitted"]]
    lines = table(rest, "step time, rows not fitted" if not options.all else "step time")
    if not options.all:
        lines += ["", *table([result for result in results if result["fitted"]], "step time, the fitted third")]
    lines += ["", "| memory | median | p90 | worst | rows |", "|---|---|---|---|---|"]
    by_source: dict[str, list[float]] = defaultdict(list)
    for result in results:
        if "memory_error" in result:
            by_source[result["source"]].append(result["memory_error"])
    lines += [f"| {source}, allocated | {summary(errors)} |" for source, errors in by_source.items()]
    carried = [result for result in results if "memory_error" in result]
    if carried:
        fit = sum(result["fits"] for result in carried) / len(carried)
        lines.append(
            f"\nFits its device, of the {len(carried)} rows with measured memory (all of which ran): {fit:.1%}"
        )
    if options.reference:
        figures = json.loads(options.reference.read_text())["memory"]
        errors = korthikanti_memory(figures)
        name, worst = max(errors, key=lambda item: abs(item[1]))
        lines.append(
            f"Korthikanti et al. 2022, figure 1: {summary([e for _, e in errors])} (worst {name} {worst:+.1%})"
        )
    outside = sum(bool(result["warnings"]) for result in results)
    lines.append(f"Outside the calibrated range, and said so: {outside} of {len(results)} rows.")
    lines += [f"Not predicted: {count} × {reason}" for reason, count in refused.items()]
    return results, lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--reference", type=Path, help="reference.json with memory figures")
    parser.add_argument("--all", action="store_true", help="count the fitted third with the rest")
    parser.add_argument("--every", action="store_true", help="print every row")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md and accuracy.csv")
    options = parser.parse_args()
    results, lines = report(options)
    if options.json:
        print(json.dumps(results))
        return
    if options.every:
        for result in sorted(results, key=lambda result: (result["source"], result["row"])):
            note = f"; {'; '.join(result['warnings'])}" if result["warnings"] else ""
            print(
                f"{result['error']:+.3f} {result['source']} {result['row']}: {result['measured_s']:.4g} s, "
                f"predicted {result['predicted_s']:.4g} s, limit {result['limit']}{note}"
            )
    print("\n".join(lines))
    if options.write:
        write_section(section("Predicted steps", "python benchmarks/accuracy.py --data DATA --write", "\n".join(lines)))
        path = Path(__file__).with_name("accuracy.csv")
        order = sorted(results, key=lambda result: (result["source"], result["row"]))
        text = "".join(
            f"{r['source']},{r['row'].replace(',', ' ')},{r['predicted_s']:.5g},{r['error']:+.3f},{int(r['fitted'])}\n"
            for r in order
        )
        path.write_text("source,row,predicted_s,error,fitted\n" + text)


if __name__ == "__main__":
    main()
