"""Fits the constants that kernels cannot give (clocks under load, host times, networks) to a third of measured steps.

    python benchmarks/fit_steps.py DATA.jsonl.gz [--split NAME] [--rounds N]

The third is chosen by hashing each row with the split's name, so that order does not matter. Three groups, one after
the other; each prints what it found, ready to be written into hardware/specs/*.toml, simulate/stack.py and rows.py.
`--split other` shows how the constants and the errors move with another third.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

import rows as measured
from meshloom.simulate.calibrate import search
from meshloom.simulate.stack import STACKS
from meshloom.simulate.step import predict_step
from rows import Row

SPLIT = "meshloom-1"
CAP = 0.3  # beyond this a row is broken or of another kind, and must not bend the rest

# where.name.field -> start; `device` by a part of its name, `stack` with * for all that begin so, `network` by cluster
GROUPS: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "A100": (
        {"narayanan2021": 1, "korthikanti2022": 1, "vtrain": 2},
        {
            "device.A100.sustained": 0.82, "device.A100.memory_efficiency": 0.77,
            "stack.megatron-deepspeed.kernel_ns": 31_500, "stack.megatron-deepspeed.skew_ns": 590_000,
            "stack.megatron-deepspeed.micro_batch_ns": 850_000,
        },
    ),
    "H100": (
        {"nanotron-h100": 2, "llm-foundry": 1},
        {
            "device.H100.sustained": 0.74, "device.H100.memory_efficiency": 0.85,
            "stack.nanotron*.kernel_ns": 28_300, "stack.nanotron*.logit_bytes": 52,
            "stack.nanotron*.flash_efficiency": 0.58, "stack.nanotron.cross_ns": 550_000,
            "stack.nanotron-slow*.rank_ns": 2_150_000, "stack.nanotron-slow-ring-blocking.transfer_ns": 216_000_000,
            "network.p5.latency_ns": 18_000, "network.p5.efficiency": 0.6,
            "stack.fsdp*.hidden_bytes": 12, "stack.fsdp.flash_efficiency": 0.97,
            "stack.fsdp-hopper.flash_efficiency": 0.43,
        },
    ),
    "B200": (
        {"simumax-b200": 1, "megatron-bridge": 1},
        {"device.NVIDIA B200.sustained": 0.62, "device.GB200.sustained": 0.72, "device.GB300.sustained": 0.98},
    ),
}  # fmt: skip
LIMITS = {
    "device.A100.memory_efficiency": (0.5, 0.92), "device.H100.memory_efficiency": (0.5, 0.92),
    "device.GB300.sustained": (0.5, 1.0), "stack.fsdp*.hidden_bytes": (10, 30),
    "network.p5.efficiency": (0.3, 0.95),
}  # fmt: skip


def in_third(row: Row, split: str) -> bool:
    """Whether a row belongs to the third that is fitted."""
    text = split + json.dumps(row, sort_keys=True)
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 3 == 0


def with_constants(point: Mapping[str, float]) -> tuple[dict, dict]:
    """Clusters and stacks with constants of `point` in the place of the shipped ones."""
    clusters, stacks = measured.make_clusters(), dict(STACKS)
    for key, value in point.items():
        where, name, field = key.split(".")
        if where == "device":
            for system, cluster in clusters.items():
                if name in cluster.device.name:
                    less = measured.POWER_500W if system == "h100-500w" and field == "sustained" else 1.0
                    device = replace(cluster.device, **{field: value * less})
                    clusters[system] = replace(cluster, device=device)
        elif where == "network":
            cluster = clusters[name]
            clusters[name] = replace(cluster, between_hosts=replace(cluster.between_hosts, **{field: value}))
        else:
            for stack in stacks:
                if stack == name or (name.endswith("*") and stack.startswith(name[:-1])):
                    stacks[stack] = replace(stacks[stack], **{field: value})
    return clusters, stacks


def errors(point: Mapping[str, float], rows: list[Row]) -> dict[str, list[float]]:
    """|log(predicted / measured)| by source."""
    clusters, stacks = with_constants(point)
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        try:
            seconds = predict_step(measured.job_of(row, clusters, stacks)).step_s
            found[row["source"]].append(abs(math.log(seconds / measured.measured_seconds(row))))
        except measured.Unpredictable:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default=SPLIT)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    rows = measured.read(options.data)
    third = [row for row in rows if in_third(row, options.split)]
    found: dict[str, float] = {}
    for group, (weights, start) in GROUPS.items():
        mine = [row for row in third if row["source"] in weights]

        def loss(
            point: Mapping[str, float],
            mine: list[Row] = mine,
            weights: dict[str, float] = weights,
            before: Mapping[str, float] = dict(found),
        ) -> float:
            by_source = errors({**before, **point}, mine)
            return float(sum(weights[name] * np.minimum(each, CAP).mean() for name, each in by_source.items()))

        point = search(loss, start, limits=LIMITS, rounds=options.rounds, step=0.12)
        found |= point
        print(f"# {group}: {len(point)} constants on {len(mine)} rows")
        for key, value in point.items():
            print(f"{key} = {value:.4g}")
    for name, part in (("fitted", third), ("not fitted", [row for row in rows if not in_third(row, options.split)])):
        by_source = errors(found, part)
        for source, each in by_source.items():
            print(f"{name} {source}: median {np.median(each):.1%}, p90 {np.percentile(each, 90):.1%}, {len(each)} rows")
        together = [error for each in by_source.values() for error in each]
        print(f"{name} together: median {np.median(together):.1%}, {len(together)} rows")


if __name__ == "__main__":
    main()
