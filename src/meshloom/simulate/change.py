"""What if: a program with faster links, another device, or without some communication. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from meshloom.chakra.trace import Node
from meshloom.errors import UsageError
from meshloom.hardware.device import Device
from meshloom.simulate.compute import duration_ns
from meshloom.simulate.program import COMMUNICATION, Program


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Times as fast: `network`, `compute`, `host`; communication along axes of `without` takes no time.

    `device` and `instead` change what computes: each kernel by the ratio of what the model says of both.
    """

    network: float = 1.0
    compute: float = 1.0
    host: float = 1.0
    without: frozenset[str] = frozenset()
    device: Device | None = None
    instead: Device | None = None


def change(program: Program, wanted: Change) -> None:
    """Apply `wanted` to the durations of `program`; raises UsageError if an axis of `without` is not in it."""
    axes = {axis_of(node) for node, kind in zip(program.nodes, program.kind, strict=True) if kind == COMMUNICATION}
    unknown = sorted(wanted.without - axes)
    if unknown:
        known = ", ".join(sorted(axis for axis in axes if axis)) or "none"
        raise UsageError(
            f"--remove-comm: expected an axis that the traces communicate along ({known}), got {unknown[0]}"
        )
    for number, node in enumerate(program.nodes):
        if program.kind[number] == COMMUNICATION:
            factor = 0.0 if axis_of(node) in wanted.without else 1 / wanted.network
        elif node.get("is_cpu_op") or node.get("op_class") == "host":
            factor = 1 / wanted.host
        else:
            factor = _faster(node, wanted) / wanted.compute
        program.duration_ns[number] = round(program.duration_ns[number] * factor)
        program.lag_ns[number] = round(program.lag_ns[number] / wanted.host)  # Python and launches between nodes


def axis_of(node: Node) -> str:
    """The axis of the plan that a communication lies along: pp for messages, else what the trace says."""
    return str(node.get("comm_axis", "")) or ("pp" if node.get("comm_src") is not None else "")


def _faster(node: Node, wanted: Change) -> float:
    if wanted.device is None or wanted.instead is None:
        return 1.0
    before = duration_ns(node, wanted.device)
    return duration_ns(node, wanted.instead) / before if before else 1.0
