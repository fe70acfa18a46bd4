"""Planning time and peak memory: all that `meshloom parallelize --explain` finds out, on a model without data.

Each case runs in a fresh process: imports first, by themselves, then the model on meta, its cut and its stages.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from statistics import median
from typing import Any

from results import machine, section, write_section

PLANS = ("tp2", "tp8", "pp4", "tp8.pp4")
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2 124M": ("gpt2", {}),
    "Llama 70B": ("llama", {
        "num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8,
        "intermediate_size": 28672, "vocab_size": 128256,
    }),
}  # fmt: skip


def measure(model_name: str, plan_text: str) -> dict[str, Any]:
    """Seconds and bytes of imports and of planning, in this process."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    from transformers import AutoConfig, AutoModelForCausalLM

    from meshloom.errors import PlanError
    from meshloom.model.build import build_model, example_batch, num_parameters
    from meshloom.parallel.apply import find_cut
    from meshloom.parallel.explain import explain
    from meshloom.plan import Plan

    kind, sizes = MODELS[model_name]
    config = AutoConfig.for_model(kind, **sizes)
    AutoModelForCausalLM._model_mapping[type(config)]  # imports the model's own file
    told: dict[str, Any] = {
        "import_s": time.perf_counter() - begin,
        "import_cpu_s": time.process_time() - begin_cpu,
        "import_bytes": _peak_bytes(),
    }
    begin, begin_cpu = time.perf_counter(), time.process_time()
    model = build_model(config, "causal", seed=0, device="meta")
    try:
        example = example_batch("causal", micro_batch=1, seq_length=8, device="meta")
        found, stages = find_cut(model, Plan.parse(plan_text), example)
        decisions = explain(found, Plan.parse(plan_text).tp)
        num_cut = sum(decision.style != "whole" for decision in decisions)
        told["found"] = f"{num_cut} of {len(decisions)} layers cut" if decisions else ""
        told["found"] += f"{', ' * bool(decisions)}{len(stages.layers)} stages" if stages else ""
    except PlanError as error:
        told["found"] = f"refused: {error}"
    told["plan_s"] = time.perf_counter() - begin
    told["plan_cpu_s"] = time.process_time() - begin_cpu
    told["peak_bytes"] = _peak_bytes()
    told["num_parameters"] = num_parameters(model)
    return told


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(results: list[dict[str, Any]]) -> str:
    """A line a model and plan; what is said of imports is the median of all."""
    rows = [
        "| model | plan | CPU s | wall s | peak MB, imports included | found |",
        "|---|---|---|---|---|---|",
    ]
    for told in results:
        name = f"{told['model']} ({told['num_parameters'] / 1e9:.2f} G parameters)"
        numbers = f"{told['plan_cpu_s']:.2f} | {told['plan_s']:.2f} | {told['peak_bytes'] / 1e6:.0f}"
        rows.append(f"| {name} | {told['plan']} | {numbers} | {told['found']} |")
    cpu, wall, peak = (median(told[name] for told in results) for name in ("import_cpu_s", "import_s", "import_bytes"))
    rows += [
        "",
        f"Before that, importing torch and transformers takes {cpu:.2f} CPU s, {wall:.2f} s and {peak / 1e6:.0f} MB "
        "(medians).",
    ]
    return "\n".join(rows)


def main() -> None:
    """Measure every case in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="Of each case the median by CPU seconds is told.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(*options.case)))
        return
    results = []
    for model in MODELS:
        for plan in PLANS:
            runs = []
            for _ in range(options.rounds):
                command = [sys.executable, __file__, "--case", model, plan]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                runs.append(json.loads(done.stdout))
            runs.sort(key=lambda told: float(told["plan_cpu_s"]))
            results.append({"model": model, "plan": plan, **runs[len(runs) // 2]})
    if options.json:
        print(json.dumps({"machine": machine(), "results": results}))
        return
    text = section("Planning", "python benchmarks/plan.py", table(results))
    print(text)
    if options.write:
        write_section(text)


if __name__ == "__main__":
    main()
