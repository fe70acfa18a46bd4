"""A folder that ASTRA-sim's analytical backend runs: traces, network, system, memory and groups. No torch.

The files follow ASTRA-sim 2's documentation: `workload.<rank>.et`, `network.yml` (a dimension inside hosts, one between
them), `system.json`, `memory.json`, `comm_group.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshloom.chakra.file import whole_file, write
from meshloom.chakra.trace import NodeType, Trace
from meshloom.errors import TraceError
from meshloom.hardware.cluster import Cluster
from meshloom.simulate.program import ranks_of


def export_astra_sim(traces: Mapping[int, Trace], cluster: Cluster, out: Path) -> list[Path]:
    """Write the folder `out` for traces of all ranks on `cluster`; returns the files.

    Raises HardwareError if the cluster is too small, TraceError if ranks are missing, FolderError.
    """
    world = max(int(trace.get("world_size", 0)) or rank + 1 for rank, trace in traces.items())
    cluster.check_fits(world)
    missing = next((rank for rank in range(world) if rank not in traces), None)
    if missing is not None:
        raise TraceError(f"export: expected a trace of each of {world} ranks, rank {missing} has none; record it too")
    hosts, per_host = -(-world // cluster.devices_per_host), min(world, cluster.devices_per_host)
    if world > per_host and world % cluster.devices_per_host:
        raise TraceError(
            f"export: expected whole hosts of {cluster.devices_per_host} ranks, got {world} ranks; "
            "ASTRA-sim's networks are regular"
        )
    files = [write(trace, out / f"workload.{rank}.et") for rank, trace in sorted(traces.items())]
    for name, text in {
        "network.yml": _network(cluster, hosts, per_host),
        "system.json": json.dumps(_system(cluster, 2 if hosts > 1 else 1), indent=2),
        "memory.json": json.dumps({"memory-type": "NO_MEMORY_EXPANSION"}, indent=2),
        "comm_group.json": json.dumps(groups(traces), indent=2),
    }.items():
        with whole_file(out / name) as file:
            file.write((text + "\n").encode())
        files.append(out / name)
    return files


def groups(traces: Mapping[int, Trace]) -> dict[str, list[int]]:
    """Every process group of the traces, by its name."""
    found: dict[str, list[int]] = {}
    for _, trace in sorted(traces.items()):
        for node in trace.nodes:
            if node.type == NodeType.COMM_COLL and node.get("pg_name") is not None:
                found.setdefault(str(node.get("pg_name")), list(ranks_of(node)))
    return found


def _network(cluster: Cluster, hosts: int, per_host: int) -> str:
    parts = [(cluster.inside_host, per_host)] + ([(cluster.between_hosts, hosts)] if hosts > 1 else [])
    rows: dict[str, list[str] | list[int] | list[float]] = {
        "topology": ["Switch" for _ in parts],
        "npus_count": [count for _, count in parts],
        "bandwidth": [round(network.bytes_per_second * network.efficiency / 1e9, 3) for network, _ in parts],  # GB/s
        "latency": [float(network.latency_ns) for network, _ in parts],
    }
    return "\n".join(f"{name}: [ {', '.join(str(value) for value in values)} ]" for name, values in rows.items())


def _system(cluster: Cluster, dimensions: int) -> dict[str, Any]:
    device = cluster.device
    peak = max(device.flops_per_second.get(dtype, 0.0) for dtype in ("bfloat16", "float16", "float32"))
    return {
        "scheduling-policy": "LIFO",
        "endpoint-delay": 10,
        "active-chunks-per-dimension": 1,
        "preferred-dataset-splits": 4,
        "all-reduce-implementation": ["ring"] * dimensions,
        "all-gather-implementation": ["ring"] * dimensions,
        "reduce-scatter-implementation": ["ring"] * dimensions,
        "all-to-all-implementation": ["direct"] * dimensions,
        "collective-optimization": "localBWAware",
        "local-mem-bw": round(device.memory_bytes_per_second * device.memory_efficiency / 1e9, 3),  # GB/s
        "boost-mode": 0,
        "roofline-enabled": 1,
        "peak-perf": round(peak * device.gemm.efficiency * device.sustained / 1e12, 3),  # TFLOP/s
    }
