"""Step time of a Llama cut over two ranks: Meshloom against its peers, and what cutting costs the host.

All contenders of a table live in the same two processes and take turns, in another order each round; a round's time is
that of the slower rank. Medians, quartiles, and the ratio of ours to each peer's within the same round. They must
compute the same loss. A peer that cannot run is named with the reason. The host's share is measured in one process
with a fake process group, so that nothing is sent: the step of a cut model less that of a single model of the same
shapes as one rank's, a layer.

A step is forward, backward and fused AdamW; forward and backward alone stand beside it, and how long the busier rank's
processor worked, which tells little of who waits but is no longer on a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig
from transformers.utils import logging as transformers_logging

import parallel_peers as peers
from meshloom.parallel.mesh import Mesh, make_mesh
from meshloom.parallel.stages import find_stages
from meshloom.plan import Plan
from results import machine, section, write_section

OURS = "Meshloom"
KINDS = ("backward", "step", "cpu")
SIZES = {  # name -> (vocabulary, sequences a step, tokens a sequence), always 6 layers of 512
    "short": (2048, 4, 32),  # the host's time counts
    "long": (2048, 4, 256),  # products in layers do
    "wide": (32000, 4, 256),  # embedding and head do
}
_TINY_LAYERS = (2, 10)


def llama(vocab_size: int, layers: int = 6) -> LlamaConfig:
    """6 layers of 512, 8 heads."""
    return LlamaConfig(
        vocab_size=vocab_size, hidden_size=512, intermediate_size=1376, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=512, use_cache=False,
    )  # fmt: skip


def _batches(config: LlamaConfig, device: torch.device, num: int, sequences: int, length: int) -> list[peers.Batch]:
    random = torch.Generator().manual_seed(1)
    made = []
    for _ in range(num):
        ids = torch.randint(config.vocab_size, (sequences, length), generator=random).to(device)
        made.append({"input_ids": ids, "labels": ids})
    return made


def contenders(mesh: Mesh, size: str) -> dict[str, Callable[[], peers.Contender]]:
    """Name -> what makes it, for the plan of the mesh."""
    vocab_size, sequences, length = SIZES[size]
    config = llama(vocab_size)
    if mesh.plan.tp > 1:
        batches = _batches(config, mesh.device, 1, sequences, length)
        return {
            OURS: partial(peers.ours, config, mesh, batches),
            "DTensor, layers": partial(peers.dtensor_layers, config, mesh, batches),
            "DTensor, layers and ends": partial(peers.dtensor, config, mesh, batches),
            "transformers tp_plan": partial(peers.transformers_plan, config, mesh, batches),
        }
    batches = _batches(config, mesh.device, sequences, 1, length)
    stages = find_stages(peers.make(config, mesh.device), mesh.plan, batches[0])
    return {
        OURS: partial(peers.ours, config, mesh, batches),
        "torch.distributed.pipelining": partial(peers.torch_pipeline, config, mesh, batches, stages.bounds[1]),
    }


def _timed(one: peers.Contender, optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, float]:
    """Seconds of forward and backward, of the step, of the rank's processor in it, and the loss."""
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    begin, begin_cpu = time.perf_counter(), time.process_time()
    loss = one.backward()
    synchronise()
    middle = time.perf_counter()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    synchronise()
    end, end_cpu = time.perf_counter(), time.process_time()
    return {"backward": middle - begin, "step": end - begin, "cpu": end_cpu - begin_cpu, "loss": float(loss)}


def compete(mesh: Mesh, made: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Name -> milliseconds of each round, the slower rank's; all must go through the same losses."""
    running: dict[str, tuple[peers.Contender, torch.optim.Optimizer]] = {}
    failed: dict[str, str] = {}
    for name, build in made.items():
        try:
            one = build()
            running[name] = one, one.optimizer()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    times: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in KINDS} for name in running}
    warm = 3
    for number in range(rounds + warm):
        order = list(running)
        order = order[number % len(order) :] + order[: number % len(order)]
        losses = {}
        for name in order:
            dist.barrier()
            seconds = _timed(*running[name], mesh.device)
            told = torch.tensor([seconds[kind] for kind in KINDS], dtype=torch.float64, device=mesh.device)
            dist.all_reduce(told, dist.ReduceOp.MAX)
            losses[name] = seconds["loss"]
            if number >= warm:
                for kind, value in zip(KINDS, told.tolist()):
                    times[name][kind].append(1000 * value)
        # the first losses are of the same weights; later ones go through as many updates
        tolerance = 1e-5 if number == 0 else 1e-3
        for name, loss in losses.items():
            assert abs(loss - losses[OURS]) <= tolerance * losses[OURS], (number, name, loss, losses[OURS])
    return {"times": times, "failed": failed, "loss": losses[OURS]}


def _rank(rank: int, device: str, folder: str, jobs: list[tuple[str, str, str]], rounds: int) -> None:
    """What each of the two ranks does."""
    _quiet()
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    chosen = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=2)
    for plan_text, schedule, size in jobs:
        plan = replace(Plan.parse(plan_text), schedule=schedule, num_micro_batches=4 if "pp" in plan_text else 1)
        mesh = make_mesh(plan, chosen)
        told = compete(mesh, contenders(mesh, size), rounds)
        if rank == 0:
            with Path(folder, "told.jsonl").open("a") as file:
                file.write(json.dumps({"plan": plan_text, "schedule": schedule, "size": size, **told}) + "\n")
    dist.barrier()
    os._exit(0)  # gloo's threads may outlive the interpreter


def _quiet() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def two_ranks(device: str, jobs: list[tuple[str, str, str]], rounds: int) -> list[dict[str, Any]]:
    """What the contenders of each job took."""
    context = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_rank, args=(rank, device, folder, jobs, rounds)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit("a rank failed; its traceback is above")
        return [json.loads(line) for line in Path(folder, "told.jsonl").read_text().splitlines()]


# -- what the host adds


def tiny(layers: int, *, share: int = 1) -> LlamaConfig:
    """A Llama whose products take next to no time; `share` 2 has the shapes of one of two ranks."""
    return LlamaConfig(
        vocab_size=64, hidden_size=64, head_dim=16, num_hidden_layers=layers, num_attention_heads=4 // share,
        num_key_value_heads=4 // share, intermediate_size=128 // share, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip


def _host_alone(folder: str, rounds: int) -> None:
    """In a process of its own: name -> milliseconds a layer, of each round."""
    _quiet()
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    mesh = make_mesh(Plan(tp=2), torch.device("cpu"))
    made: dict[str, list[peers.Contender]] = {}
    failed = {}
    ways: dict[str, Any] = {
        "single": lambda config: peers.single(config, mesh, batches),
        OURS: lambda config: peers.ours(config, mesh, batches),
        "DTensor, layers": lambda config: peers.dtensor_layers(config, mesh, batches),
        "transformers tp_plan": lambda config: peers.transformers_plan(config, mesh, batches),
    }
    batches = _batches(tiny(1), mesh.device, 1, 1, 8)
    for name, make in ways.items():
        try:
            share = 2 if name == "single" else 1
            made[name] = [make(tiny(layers, share=share)) for layers in _TINY_LAYERS]
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    few, many = _TINY_LAYERS
    times: dict[str, list[list[float]]] = {name: [[], []] for name in made}
    for number in range(rounds + 5):
        for name, both in made.items():
            for column, one in zip(times[name], both):
                begin = time.process_time()
                one.backward()
                if number >= 5:
                    column.append(1000 * (time.process_time() - begin))
                for parameter in one.parameters:
                    parameter.grad = None
    layer = {
        name: [(long - short) / (many - few) for short, long in zip(*both, strict=True)] for name, both in times.items()
    }
    Path(folder, "host.json").write_text(json.dumps({"layer": layer, "failed": failed}))
    os._exit(0)


def host(rounds: int) -> dict[str, Any]:
    """Milliseconds a layer takes the host, forward and backward, and what each way of cutting adds."""
    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("fork").Process(target=_host_alone, args=(folder, rounds))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit("the host's measurement failed; its traceback is above")
        told: dict[str, Any] = json.loads(Path(folder, "host.json").read_text())
    told["added"] = {
        name: [cut - alone for cut, alone in zip(values, told["layer"]["single"], strict=True)]
        for name, values in told["layer"].items()
        if name != "single"
    }
    return told


# -- tables


def _spread(values: list[float], digits: int = 1) -> str:
    low, _, high = quantiles(values, n=4)
    return f"{median(values):.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def table(told: dict[str, Any]) -> str:
    """One job as Markdown."""
    vocab_size, sequences, length = SIZES[told["size"]]
    schedule = f", {told['schedule']}, {sequences} micro-batches" if "pp" in told["plan"] else ""
    rows = [
        f"**{told['plan']}{schedule}; {sequences} × {length} tokens, vocabulary {vocab_size}**",
        "",
        "| ms, median (quartiles) | forward + backward | step | processor | ours to it: step | ours to it: processor |",
        "|---|---|---|---|---|---|",
    ]
    for name, kinds in told["times"].items():
        ratios = ["", ""]
        if name != OURS:
            ours = told["times"][OURS]
            ratios = [
                _spread([mine / its for mine, its in zip(ours[kind], kinds[kind], strict=True)], 2)
                for kind in ("step", "cpu")
            ]
        rows.append("| " + " | ".join([name, *(_spread(kinds[kind]) for kind in KINDS), *ratios]) + " |")
    rows += [f"| {name} | cannot run: {why} | | | | |" for name, why in told["failed"].items()]
    return "\n".join(rows)


def host_table(told: dict[str, Any]) -> str:
    """The host's time as Markdown."""
    rows = [
        "**Processor time a layer, forward + backward, eager, nothing sent and next to nothing computed**",
        "",
        "| | ms a layer (quartiles) | added by cutting, ms a layer (quartiles) |",
        "|---|---|---|",
    ]
    for name, values in told["layer"].items():
        added = _spread(told["added"][name], 3) if name in told["added"] else ""
        rows.append(f"| {name} | {_spread(values, 3)} | {added} |")
    rows += [f"| {name} | cannot run: {why} | |" for name, why in told["failed"].items()]
    return "\n".join(rows)


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", choices=["tp2", "pp2", "host"])
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    jobs = [
        (plan, schedule, size)
        for plan, schedule in (("tp2", "1f1b"), ("pp2", "1f1b"), ("pp2", "gpipe"))
        for size in options.sizes.split(",")
        if options.only in (None, plan)
    ]
    cut = two_ranks(options.device, jobs, options.rounds) if jobs else []
    alone = host(4 * options.rounds) if options.only in (None, "host") else None
    if options.json:
        print(json.dumps({"machine": machine(), "cut": cut, "host": alone}))
        return
    body = "\n\n".join([*map(table, cut), *([host_table(alone)] if alone else [])])
    command = "python benchmarks/parallel.py" + (f" --device {options.device}" if options.device != "cpu" else "")
    text = section("Step time on two ranks", command, body)
    print(text)
    if options.write:
        if options.only or options.sizes != ",".join(SIZES):
            print("not written: only a part was measured", file=sys.stderr)
        else:
            write_section(text)


if __name__ == "__main__":
    main()
