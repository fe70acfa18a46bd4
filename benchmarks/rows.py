"""From a measured training step to a `Job`: what each source says, and what it leaves out, as facts and not as fits.

What a row does not state is taken from the source's own scripts, which are named beside it.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from meshloom.hardware.cluster import Cluster, load_cluster
from meshloom.hardware.device import load_device
from meshloom.plan import Plan
from meshloom.simulate.shape import Job, Shape
from meshloom.simulate.stack import Stack

Row = dict[str, Any]

# Megatron-LM, examples/sc21/run_table_1.sh: (layers, hidden) -> micro-batch, model chunks a rank
_TABLE_1 = {
    (24, 2304): (16, 1), (30, 3072): (16, 1), (36, 4096): (16, 1), (40, 6144): (8, 1), (48, 8192): (4, 1),
    (60, 10240): (2, 3), (80, 12288): (2, 2), (96, 16384): (1, 2), (105, 20480): (1, 3), (128, 25600): (1, 1),
}  # fmt: skip


class Unpredictable(Exception):
    """The row lacks what a prediction needs, or is of a kind that the model does not know; says why."""


def read(path: Path) -> list[Row]:
    """Rows of a `.jsonl` or `.jsonl.gz` file."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def measured_seconds(row: Row) -> float:
    """Seconds of a step: stated, or derived from the throughput by the paper's own formula."""
    seconds = row["iteration_time_s"] or row.get("derived_iteration_time_s")
    if not seconds:
        raise Unpredictable("no step time")
    return float(seconds)


def cluster(name: str, **between: Any) -> Cluster:
    """A shipped cluster with as many hosts as any row needs, and another network between them."""
    found = load_cluster(name)
    network = replace(found.between_hosts, **between) if between else found.between_hosts
    return replace(found, num_hosts=4096, between_hosts=network)


def make_clusters() -> dict[str, Cluster]:
    """The systems of the sources, by a name of ours."""
    a100, h100, b200 = cluster("a100x1024"), cluster("h100x1024"), cluster("b200x1024")
    rack = cluster("gb200x576")
    gb300 = load_device("gb300")
    return {
        "selene": a100,
        "vtrain": cluster("a100x1024", bytes_per_second=12.5e9),  # 800 Gbit/s a host: vTrain's own config files
        "vtrain-host": a100,
        "a100-80": a100,
        "a100-40": replace(a100, device=load_device("a100-40gb-sxm")),
        "h100": h100,
        # Grand Teton of 500 W with HBM2e, 2.4 TB/s
        "h100-500w": replace(
            h100,
            device=replace(h100.device, sustained=h100.device.sustained * POWER_500W, memory_bytes_per_second=2.4e12),
        ),
        "p5": cluster("h100x1024", latency_ns=AWS_LATENCY_NS, efficiency=AWS_EFFICIENCY),
        "h200": cluster("h200x1024"),
        "v100": cluster("v100x32"),
        "b200": b200,
        "gb200": rack,
        "gb300": replace(rack, device=gb300, inside_host=replace(rack.inside_host, collectives=gb300.collectives)),
    }


POWER_500W = (500 / 700) ** (1 / 3)  # clocks go with the cube root of the power

# EFA between p5 hosts: latency of a hop and the part of 50 GB/s that rings reach; fitted, see accuracy.py
AWS_LATENCY_NS = 17_500
AWS_EFFICIENCY = 0.56


def shape_of(row: Row) -> Shape:
    """Dims of the row's model."""
    model = row["model"]
    if not model.get("hidden") or not model.get("vocab"):
        raise Unpredictable(f"{model['name']}: mixture of experts, dims not stated")
    if row["ep"] > 1:
        raise Unpredictable("expert parallelism")
    gated = model["arch"].startswith("llama")
    tied = bool(model.get("tied", not gated))
    return Shape(
        num_layers=model["layers"],
        hidden_size=model["hidden"],
        intermediate_size=model.get("ffn") or _width(model, tied),
        num_heads=model["heads"],
        num_kv_heads=model.get("kv_heads") or model["heads"],
        vocab_size=model["vocab"],
        gated=gated,
        tied=tied,
        learned_positions=0 if gated else row["seq"],
    )


def _width(model: Row, tied: bool) -> int:
    """The MLP's width of nanotron's llamas, which their number of parameters gives: a multiple of 256."""
    hidden, layers = model["hidden"], model["layers"]
    embeddings = (1 if tied else 2) * model["vocab"] * hidden
    layer = (model["params_b"] * 1e9 - embeddings) / layers
    return round((layer - 4 * hidden**2) / (3 * hidden) / 256) * 256


def job_of(row: Row, clusters: dict[str, Cluster], stacks: dict[str, Stack]) -> Job:
    """The row as a `Job`; raises Unpredictable."""
    source = row["source"]
    shape = shape_of(row)
    micro_batch, chunks = row["micro_batch"], row["interleave"] or 1
    stack, system, dtype = _system(row, clusters, stacks)
    if source == "narayanan2021" and not micro_batch:
        micro_batch, chunks = _TABLE_1.get((shape.num_layers, shape.hidden_size), (1, 1))
    if not micro_batch:
        micro_batch = 1  # torchtitan 4D: a micro-batch of one sequence is its default
    count = max(1, row["global_batch"] // (row["dp"] * micro_batch))
    recompute = "none"
    if row["recompute"]:
        recompute = next(
            (mode for mode in ("full", "selective") if mode in row["recompute"].replace("SAC", "selective")), "none"
        )
    if source == "vtrain" and row["set"] == "single":
        # Its configs say full recomputation. With it the runs would sustain 205 TFLOP/s at h = 2048 with unfused
        # attention, where Megatron-LM measured 137 on the same device: these rows did not recompute.
        recompute = "none"
    if source == "vtrain" and row["tp"] == 1:
        # without tp these runs take 50257 as it is: their logits cost what unaligned products cost
        stack = replace(stack, vocab_multiple=1)
    plan = Plan(
        tp=row["tp"], cp=row["cp"], pp=row["pp"], dp=row["dp"],
        sequence_parallel=bool(row.get("sequence_parallel")) or (row["tp"] > 1 and source in _SEQUENCE_PARALLEL),
        schedule="interleaved" if chunks > 1 else "1f1b", num_micro_batches=count, virtual_stages=chunks,
        recompute=recompute,
    )  # fmt: skip
    zero = row.get("zero_stage")
    if zero is None:
        zero = 3 if row.get("fsdp") else 1 if source in ("megatron-bridge", "simumax-b200") else 0
    return Job(
        shape=shape, plan=plan, cluster=system, stack=stack, seq_length=row["seq"],
        global_batch=micro_batch * count * row["dp"], zero_stage=zero, dtype=dtype,
    )  # fmt: skip


_SEQUENCE_PARALLEL = ("torchtitan", "megatron-bridge", "simumax-b200")


def _system(row: Row, clusters: dict[str, Cluster], stacks: dict[str, Stack]) -> tuple[Stack, Cluster, str]:
    """Software, cluster and dtype of the products."""
    source, gpu, text = row["source"], row["gpu"].lower(), str(row["precision"]).lower()
    dtype = "float4" if "fp4" in text else "float8" if "8" in text else "float16" if text == "fp16" else "bfloat16"
    if source == "narayanan2021":
        if row.get("zero_stage") == 3:
            return stacks["deepspeed-zero3-2021"], clusters["selene"], dtype
        stack = stacks["megatron-2021"]
        return replace(stack, overlap_gradients=row["pp"] == 1), clusters["selene"], dtype
    if source == "korthikanti2022":
        return stacks["megatron-2022"], clusters["selene"], dtype
    if source == "vtrain":
        return stacks["megatron-deepspeed"], clusters["vtrain" if row["set"] == "multi" else "vtrain-host"], dtype
    if source == "nanotron-h100":
        variant = nanotron_variant(row)
        return stacks[variant], clusters["p5"], dtype
    if source == "llm-foundry":
        name = {"a100_80gb": "a100-80", "a100_40gb": "a100-40"}.get(gpu, "h100")
        return stacks["fsdp-hopper" if name == "h100" else "fsdp"], clusters[name], dtype
    if source == "torchtitan":
        return stacks["torchtitan"], clusters["h200" if "h200" in gpu else "h100-500w"], dtype
    if source == "dlperf-gpt":
        return replace(stacks["megatron-2021"], overlap_gradients=row["pp"] == 1), clusters["v100"], dtype
    if source in ("simumax-b200", "megatron-bridge"):
        name = next(name for name in ("gb300", "gb200", "b200", "h100") if name in gpu)
        return stacks["megatron-core" if source == "simumax-b200" else source], clusters[name], dtype
    if source in ("llm.c", "nanoGPT"):
        return stacks["fused" if source == "llm.c" else "eager"], clusters["a100-80"], dtype
    raise Unpredictable(f"unknown source {source}")


# Rows of nanotron carry the all-reduce bandwidth that each job measured at its start. It falls into two states with
# nothing between: the later campaign's follows 1 / (1/900 + n/6800) GB/s, a ring whose hops are slow, the earlier
# one's lies above. The same state slows every collective of tp, so it chooses the variant.
def nanotron_variant(row: Row) -> str:
    """`nanotron`, `nanotron-slow-ring`, or that before the project's fix of pipeline messages."""
    ring = 1 / (1 / 900 + row["n_gpus"] / 6800)
    if row["allreduce_gbps"] > _FAST.get(row["n_gpus"], 1.25 * ring):
        return "nanotron"
    return "nanotron-slow-ring" if row["after_pp_fix"] else "nanotron-slow-ring-blocking"


_FAST = {8: 440.0, 16: 380.0, 32: 178.0}  # where the two states lie close, the gap between them
