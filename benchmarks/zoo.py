"""Every architecture of transformers' causal, masked and seq2seq heads, cut by each plan and held to the single model.

Tiny random models (zoo_configs.py); for each family and plan a certificate: loss and every gradient of the parallel
model against the unsharded one, on real gloo ranks. A family is refused, with the reason, before anything runs; or it
passes; or it is wrong, which must not be. Workers are started again where one hangs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from meshloom.errors import MeshloomError
from meshloom.parallel.apply import parallelize
from meshloom.parallel.certify import TOLERANCE, certify, rounding
from meshloom.parallel.mesh import make_mesh
from meshloom.plan import Plan
from results import machine, section, write_section
from zoo_configs import Size, batch, build, families

KINDS = ("causal", "masked", "seq2seq")
PLANS = ("tp2", "tp4", "pp2", "tp2.pp2.dp2")
LARGEST_OWN = 5e-4  # more is no rounding: a value has crossed a border and the forward has gone another way
MOST_OWN = 4  # times the single model's own rounding: the parallel one adds up in another order, once in each layer
PATIENCE_S = 180  # for one family on one plan


def check_family(
    kind: Any, family: str, plan: Plan, mesh: Any, size: Size, seed: int, dtype: torch.dtype
) -> dict[str, Any]:
    """What became of the family under the plan."""
    try:
        single = build(family, kind, size, seed).to(dtype)
        model = build(family, kind, size, seed).to(dtype)
        config = single.config
        one = batch(family, kind, config, seed, batch_size=1)
    except Exception as error:
        return {"result": "not built", "why": str(error).splitlines()[0][:200] if str(error) else repr(error)}
    try:
        parallel = parallelize(model, plan=plan, mesh=mesh, example=one)
    except MeshloomError as error:
        return {"result": "refused", "why": str(error)[:300]}
    batches = [batch(family, kind, config, seed + number) for number in range(plan.dp * plan.num_micro_batches)]
    told = certify(single, parallel, batches, mesh)
    result, own = "passes" if told.passes(TOLERANCE[dtype]) else "wrong", 0.0
    if result == "wrong" and dtype == torch.float32:
        own = rounding(single, batches)
        exact = check_family(kind, family, plan, mesh, size, seed, torch.float64)
        if exact["result"] == "passes" and own <= LARGEST_OWN and told.passes(MOST_OWN * own):
            result = "rounding"
    return {
        "result": result,
        "own": own,
        "loss": told.loss,
        "gradient": told.gradient,
        "parameter": told.parameter,
        "share": told.share,
    }


def work(rank: int, plan_text: str, tasks: list[tuple[str, str]], folder: str, options: dict[str, Any]) -> None:
    """What each rank of a world does: family after family."""
    torch.set_num_threads(1)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - transformers' own warnings, thousands of them
    plan = replace(Plan.parse(plan_text), num_micro_batches=2)
    store = dist.FileStore(f"{folder}/store", plan.world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=plan.world_size, timeout=timedelta(seconds=PATIENCE_S)
    )
    mesh = make_mesh(plan, torch.device("cpu"))
    size = Size(**options["size"])
    if plan.tp > 2:
        size = replace(size, kv_heads=min(2, size.kv_heads))
    dtype = getattr(torch, options["dtype"])
    for kind, family in tasks:
        if rank == 0:
            Path(folder, "raised").unlink(missing_ok=True)
        try:
            told = check_family(kind, family, plan, mesh, size, options["seed"], dtype)
        except Exception as error:
            told = {"result": "raised", "why": f"{type(error).__name__}: {error}"[:300]}
            with Path(folder, "raised").open("a") as file:  # the others may wait for this rank forever
                file.write(f"rank {rank}: {told['why']}\n")
        everyone: list[Any] = [None] * plan.world_size
        dist.all_gather_object(everyone, told)
        if rank == 0:
            order = ("wrong", "raised", "refused", "not built", "rounding", "passes")
            worst = min(everyone, key=lambda item: order.index(item["result"]))
            with Path(folder, "results.jsonl").open("a") as file:
                file.write(json.dumps({"kind": kind, "family": family, "plan": plan_text, **worst}) + "\n")
    os._exit(0)


def run_plan(plan: str, tasks: list[tuple[str, str]], options: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of all tasks on the plan; a world that hangs or dies is started again after the culprit."""
    results: list[dict[str, Any]] = []
    kept = Path(options["keep"]) if options["keep"] else None
    world_size = Plan.parse(plan).world_size
    context = multiprocessing.get_context("fork")
    while tasks:
        with tempfile.TemporaryDirectory() as folder:
            processes = [
                context.Process(target=work, args=(rank, plan, tasks, folder, options)) for rank in range(world_size)
            ]
            for process in processes:
                process.start()
            path = Path(folder, "results.jsonl")
            seen, since = 0, time.monotonic()
            while all(process.is_alive() for process in processes):
                lines = path.read_text().splitlines() if path.exists() else []
                if len(lines) > seen:
                    _keep(kept, lines[seen:])
                    seen, since = len(lines), time.monotonic()
                if time.monotonic() - since > PATIENCE_S:
                    break
                time.sleep(0.2)
            time.sleep(0.5)
            raised = Path(folder, "raised")
            why = raised.read_text().splitlines()[0] if raised.exists() else "no rank says why"
            lines = path.read_text().splitlines() if path.exists() else []
            _keep(kept, lines[seen:])
            done = [json.loads(line) for line in lines]
            for process in processes:
                process.kill()
                process.join()
        results += done
        tasks = tasks[len(done) :]
        if tasks:
            kind, family = tasks.pop(0)
            died = {"kind": kind, "family": family, "plan": plan, "result": "raised", "why": f"hung or died; {why}"}
            _keep(kept, [json.dumps(died)])
            results.append(died)
    return results


def _keep(path: Path | None, lines: list[str]) -> None:
    if path is not None:
        with path.open("a") as file:
            file.writelines(f"{line}\n" for line in lines)


def kept_results(path: Path | None) -> list[dict[str, Any]]:
    """What an earlier call has found; the last word of each family and plan."""
    lines = path.read_text().splitlines() if path is not None and path.exists() else []
    return [*{(item["kind"], item["family"], item["plan"]): item for item in map(json.loads, lines)}.values()]


def table(results: list[dict[str, Any]]) -> str:
    """A line a kind and plan."""
    names = ("passes", "rounding", "refused", "wrong", "raised", "not built")
    rows = [
        "| heads | plan | families | within 2e-6 | equal in float64, further in float32 | refused | wrong | raised | "
        "not built |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        for plan in dict.fromkeys(item["plan"] for item in results):
            some = [item for item in results if item["kind"] == kind and item["plan"] == plan]
            if some:
                counts = Counter(item["result"] for item in some)
                told = " | ".join(str(counts[name]) for name in names)
                rows.append(f"| {kind} | {plan} | {len(some)} | {told} |")
    return "\n".join(rows)


NOTE = f"""Within 2e-6: loss and every gradient against the single model's, in float32. Where that is missed, both
run again in float64: if they are equal to 1e-12 there, and the float32 difference is at most {MOST_OWN} times that of
the single model's own float32 gradients from its float64 ones, it is rounding. Everything else is wrong."""


def shipped(kinds: Sequence[str]) -> str:
    """For how many families the installed transformers has a plan of its own, in a sentence."""
    told = []
    for kind in kinds:
        plans: Counter[str] = Counter()
        for family in families(kind):
            try:
                model = build(family, kind, Size(), 0)
            except ValueError:
                continue
            plans.update(name for name in ("tp", "pp") if getattr(model, f"_{name}_plan", None))
        told.append(f"{plans['tp']} of {len(families(kind))} {kind} (pipeline: {plans['pp']})")
    return (
        f"transformers {transformers.__version__} itself ships a tensor-parallel plan for {', '.join(told)}; whether "
        "they are right is not tried here."
    )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", help="Names joined by commas.  [default: all]")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--plans", default=",".join(PLANS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    for name, default in (("hidden", 32), ("heads", 4), ("kv-heads", 4), ("vocab", 96), ("layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--keep", type=Path, metavar="FILE", help="Results go there at once; what it has is not run.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="Name every family that does not pass.")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    size = {name: getattr(options, name) for name in ("hidden", "heads", "kv_heads", "vocab", "layers")}
    wanted = options.families.split(",") if options.families else None
    tasks = [(kind, family) for kind in options.kinds.split(",") for family in families(kind)
             if wanted is None or family in wanted]  # fmt: skip
    given = {"size": size, "seed": options.seed, "dtype": options.dtype, "keep": options.keep}
    results = kept_results(options.keep)
    there = {(item["kind"], item["family"], item["plan"]) for item in results}
    for plan in options.plans.split(","):
        results += run_plan(plan, [task for task in tasks if (*task, plan) not in there], given)
    if options.json:
        print(json.dumps({"machine": machine(), "results": results}))
        return
    if options.verbose:
        for item in results:
            if item["result"] != "passes":
                told = item.get("why") or (
                    f"loss {item['loss']:.1e}, gradient {item['gradient']:.1e} of {item['parameter']}, "
                    f"own rounding {item['own']:.1e}"
                )
                print(f"{item['plan']:12} {item['kind']:8} {item['family']:28} {item['result']:9} {told}")
    told = "\n\n".join((table(results), NOTE, shipped(options.kinds.split(","))))
    text = section("The zoo", f"python benchmarks/zoo.py --plans {options.plans}", told)
    print(text)
    if options.write:
        write_section(text)


if __name__ == "__main__":
    main()
