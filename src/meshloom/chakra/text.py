"""Text workloads of ASTRA-sim 1: a header, the number of layers, and a line of times and collectives for each.

A line is: name, -1, then time, collective and bytes of the forward pass, of the input gradient and of the weight
gradient, and the time of the update. Times are microseconds, as ASTRA-sim's own converter takes them. A collective of
the forward pass or the input gradient holds up what follows; that of a weight gradient holds up the next pass only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from meshloom.chakra.build import TraceBuilder
from meshloom.chakra.cost import Cost
from meshloom.chakra.trace import CommType, Trace
from meshloom.errors import TraceError

# header -> the axes of the plan along which the forward pass and input gradients, and weight gradients, communicate
_AXES = {
    "MICRO": ("dp", "dp"),
    "DATA": ("tp", "dp"),
    "MODEL": ("tp", "dp"),
    "HYBRID_DATA_MODEL": ("tp", "dp"),
    "HYBRID_MODEL_DATA": ("tp", "dp"),
    "HYBRID_TRANSFORMER": ("tp", "dp"),
    "HYBRID_TRANSFORMER_FWD_IN_BCKWD": ("tp", "dp"),
}
_COLLECTIVES = {
    "ALLREDUCE": CommType.ALL_REDUCE,
    "ALLTOALL": CommType.ALL_TO_ALL,
    "ALLGATHER": CommType.ALL_GATHER,
    "REDUCESCATTER": CommType.REDUCE_SCATTER,
}
_LARGEST = 1 << 50  # bytes, or microseconds, which are 35 years
_UNKNOWN_WORK = Cost(0, 0, "memory")  # a text workload tells times, not FLOPs and bytes


class Pass(NamedTuple):
    """One pass of a layer: how long it computes, what it then communicates (None: nothing) and how many bytes."""

    duration_micros: int
    collective: CommType | None
    num_bytes: int


class Layer(NamedTuple):
    """A line of the workload."""

    name: str
    forward: Pass
    input_gradient: Pass
    weight_gradient: Pass
    update_micros: int


class Workload(NamedTuple):
    """A text workload: its header's first word, and its layers."""

    parallelism: str
    layers: list[Layer]


def read_workload(path: Path) -> Workload:
    """The text workload in `path`; raises TraceError naming the line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: expected a text workload of ASTRA-sim, got '{error}'") from error
    header = lines[0].split() if lines else []
    if not header or header[0] not in _AXES:
        raise TraceError(
            f"{path}: line 1: expected one of {', '.join(_AXES)}, got {header[0] if header else 'nothing'!r}"
        )
    try:
        count = int(lines[1])
    except (IndexError, ValueError) as error:
        raise TraceError(f"{path}: line 2: expected the number of layers") from error
    rows = [(number, line.split()) for number, line in enumerate(lines[2:], start=3) if line.strip()]
    if len(rows) != count:
        raise TraceError(f"{path}: line 2: expected {count} layers, as it says, got {len(rows)}")
    return Workload(header[0], [_layer(row, path, number) for number, row in rows])


def _layer(row: Sequence[str], path: Path, number: int) -> Layer:
    try:
        name, _, *columns = row
        forward, input_gradient, weight_gradient = (_pass(*columns[begin : begin + 3]) for begin in (0, 3, 6))
        return Layer(name, forward, input_gradient, weight_gradient, _count(columns[9]))
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise TraceError(
            f"{path}: line {number}: expected name, -1, three times (time, collective, bytes) and the update's time; "
            f"collectives are NONE, {', '.join(_COLLECTIVES)}"
        ) from error


def _pass(time: str, collective: str, size: str) -> Pass:
    kind = None if collective == "NONE" else _COLLECTIVES[collective.partition("_")[0]]
    return Pass(_count(time), kind, _count(size))


def _count(text: str) -> int:
    if not 0 <= (number := int(text)) < _LARGEST:
        raise ValueError(f"{text}: out of range")
    return number


def workload_trace(
    workload: Workload, *, rank: int, world_size: int, groups: Mapping[str, Sequence[int]], num_passes: int = 1
) -> Trace:
    """The trace of `rank`: `groups` holds its ranks along the axes `tp` and `dp`; `num_passes` steps one after another.

    A collective whose group has one rank is left out, as there is nothing to communicate.
    """
    builder = TraceBuilder(
        rank=rank, world_size=world_size, source="synth", model=workload.parallelism, num_steps=num_passes
    )
    inner, outer = _AXES[workload.parallelism]
    updated: dict[str, list[int]] = {}  # layer -> what its next forward pass waits for
    previous: list[int] = []

    def run(
        layer: Layer, phase: str, what: str, work: Pass, after: list[int], axis: str
    ) -> tuple[list[int], list[int]]:
        """The nodes after which the compute, and the communication, of the pass are over."""
        facts: dict[str, Any] = {"phase": phase, "module": layer.name}
        done = after
        if work.duration_micros:
            done = [
                builder.compute(
                    f"{layer.name}.{what}",
                    cost=_UNKNOWN_WORK,
                    lane="compute",
                    after=after,
                    duration_ns=work.duration_micros * 1000,
                    **facts,
                )
            ]
        ranks = groups[axis]
        if work.collective is None or not work.num_bytes or len(ranks) < 2:
            return done, done
        output = work.num_bytes * {CommType.ALL_GATHER: len(ranks)}.get(work.collective, 1)
        node = builder.collective(
            work.collective.name.lower(),
            comm_type=work.collective,
            ranks=list(ranks),
            num_bytes=work.num_bytes,
            output_bytes=output // len(ranks) if work.collective is CommType.REDUCE_SCATTER else output,
            axis=axis,
            after=done,
            **facts,
        )
        return done, [node]

    for _ in range(num_passes):
        for layer in workload.layers:
            after = [*previous, *updated.get(layer.name, [])]
            _, previous = run(layer, "forward", "forward", layer.forward, after, inner)
        for layer in reversed(workload.layers):
            computed, gradient = run(layer, "backward", "weight_gradient", layer.weight_gradient, previous, outer)
            update = Pass(layer.update_micros, None, 0)
            _, updated[layer.name] = run(layer, "optimizer", "update", update, gradient, outer)
            _, previous = run(layer, "backward", "input_gradient", layer.input_gradient, computed, inner)
    return builder.finish()
