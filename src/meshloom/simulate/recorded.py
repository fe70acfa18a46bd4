"""A device's constants from recorded traces: what its products, copies and collectives really took. No torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, replace
from statistics import median
from typing import Any, NamedTuple

import tomli_w

from meshloom.chakra.trace import CommType, Node, NodeType, Trace
from meshloom.errors import TraceError
from meshloom.hardware.curves import CollectiveCurve, Op
from meshloom.hardware.device import Device
from meshloom.simulate.calibrate import Collected, fit_collective, predict_collectives
from meshloom.simulate.compute import Gemm, gemm_seconds

_OPS: dict[CommType, Op] = {
    CommType.ALL_REDUCE: "all_reduce",
    CommType.ALL_GATHER: "all_gather",
    CommType.REDUCE_SCATTER: "reduce_scatter",
    CommType.ALL_TO_ALL: "all_to_all",
}
_SHORT_NS = 5_000  # shorter kernels are mostly launch
_SIZES_FOR_A_FIT = 6


class Found(NamedTuple):
    """A calibrated device, and what it was calibrated on."""

    device: Device
    notes: list[str]


def calibrate(traces: Mapping[int, Trace], device: Device, name: str) -> Found:
    """`device` with the speed that recorded traces show: `sustained` from products, `memory_efficiency` from other
    kernels, collectives from the shortest of each meeting's ranks (the others wait inside).

    A collective recorded in fewer than six sizes scales the curve that the device has. Raises TraceError if the traces
    hold no measured device kernels.
    """
    nodes = [node for trace in traces.values() for node in trace.nodes if not node.get("is_cpu_op")]
    timed = [node for node in nodes if node.duration_ns > _SHORT_NS and node.type == NodeType.COMP]
    if not timed:
        raise TraceError("calibrate: expected traces with measured device kernels, these hold none; record on a device")
    notes: list[str] = []
    products: dict[tuple[Gemm, str], list[int]] = defaultdict(list)
    for node in timed:
        if node.get("gemm"):
            batch, m, n, k = node.get("gemm")
            products[(batch, m, n, k), node.get("dtype", "float16")].append(node.duration_ns)
    if products:
        ratios = [
            gemm_seconds((gemm,), device, dtype)[0] * 1e9 / median(times)
            for (gemm, dtype), times in products.items()
            if dtype in device.flops_per_second
        ]
        device = replace(device, sustained=float(f"{min(1.0, median(ratios)):.3g}"))
        notes.append(f"sustained {device.sustained} from {len(ratios)} shapes of products")
    moved = [node for node in timed if node.get("op_class") == "memory" and int(node.get("tensor_size", 0)) > 10**7]
    if moved:
        speeds = [int(node.get("tensor_size")) / node.duration_ns * 1e9 for node in moved]
        share = min(1.0, median(speeds) / device.memory_bytes_per_second)
        device = replace(device, memory_efficiency=float(f"{share:.3g}"))
        notes.append(f"memory_efficiency {device.memory_efficiency} from {len(moved)} kernels")
    curves = dict(device.collectives)
    for op, samples in _collectives(traces).items():
        curves[op] = _curve(device, op, samples)
        notes.append(f"{op} from {len(samples)} meetings of {len({each.num_bytes for each in samples})} sizes")
    return Found(replace(device, name=name, collectives=curves), notes)


def _collectives(traces: Mapping[int, Trace]) -> dict[Op, list[Collected]]:
    meetings: dict[tuple[str, int], list[Node]] = defaultdict(list)
    for trace in traces.values():
        counts: dict[str, int] = defaultdict(int)
        for node in trace.nodes:
            if node.type == NodeType.COMM_COLL and node.duration_ns:
                group = str(node.get("pg_name"))
                meetings[group, counts[group]].append(node)
                counts[group] += 1
    found: dict[Op, list[Collected]] = defaultdict(list)
    for nodes in meetings.values():
        op, size = _OPS.get(CommType(nodes[0].get("comm_type"))), len(nodes[0].get("comm_ranks") or ())
        if op is not None and size > 1:
            whole = int(nodes[0].get("comm_size", 0)) * (size if op == "all_gather" else 1)
            found[op].append(Collected(op, size, float(whole), min(node.duration_ns for node in nodes) * 1e-9))
    return found


def _curve(device: Device, op: Op, samples: list[Collected]) -> CollectiveCurve:
    known = device.collectives.get(op)
    if len({sample.num_bytes for sample in samples}) >= _SIZES_FOR_A_FIT or known is None:
        return fit_collective(device, samples)
    slower = median(
        sample.seconds / predicted
        for sample, predicted in zip(samples, predict_collectives(device, samples, known), strict=True)
    )
    return replace(
        known,
        start_ns=known.start_ns * slower,
        hop_ns=known.hop_ns * slower,
        root_ns=known.root_ns * slower,
        wire_bytes_per_second=known.wire_bytes_per_second / slower,
        local_bytes_per_second=known.local_bytes_per_second / slower,
    )


def device_toml(device: Device) -> str:
    """The device as a TOML file; what is left at its default is left out."""
    table: dict[str, Any] = asdict(device)
    for key in ("gemm", "attention"):
        table[key] = {name: value for name, value in table[key].items() if value}
    table["collectives"] = {
        op: {name: value for name, value in curve.items() if value} for op, curve in table["collectives"].items()
    }
    text: str = tomli_w.dumps(table)
    return text
