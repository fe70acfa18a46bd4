"""A trace as columns: one pass over its nodes, then arrays that rules and sums work on at numpy's speed.

A million nodes take about 100 MB. What only a few nodes have (communication) stays as nodes.
"""

from __future__ import annotations

from array import array
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from meshloom.chakra.trace import ATTRIBUTES, Node, Trace, Typed


class Edges(msgspec.Struct, frozen=True, kw_only=True):
    """Dependencies of one kind: `owners` (row of the node) and `needed` (id of what it needs), row by row."""

    owners: NDArray[np.int64]
    needed: NDArray[np.uint64]


class Columns(msgspec.Struct, frozen=True, kw_only=True):
    """The nodes of `trace`, row by row; `streams` is -1 where a node has none, or the host ran it."""

    trace: Trace
    ids: NDArray[np.uint64]
    types: NDArray[np.uint8]
    starts_ns: NDArray[np.int64]
    durations_ns: NDArray[np.int64]
    streams: NDArray[np.int64]
    data: Edges
    control: Edges
    communication: list[Node]
    mistyped: list[tuple[int, str]]  # (row, attribute) where its protobuf kind is not the one of our dialect

    def rows_of(self, ids: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The first row of each id, -1 where no node has it."""
        order = np.argsort(self.ids, kind="stable")
        if not len(order):
            return np.full(len(ids), -1, dtype=np.int64)
        places = np.minimum(np.searchsorted(self.ids, ids, sorter=order), len(order) - 1)
        rows = order[places]
        return np.where(self.ids[rows] == ids, rows, -1)


def columns(trace: Trace) -> Columns:
    """The columns of a trace; raises TraceError where a node is damaged."""
    ids, types, streams = array("Q"), array("B"), array("q")
    starts, durations = array("q"), array("q")
    data, data_counts, control, control_counts = array("Q"), array("L"), array("Q"), array("L")
    communication: list[Node] = []
    mistyped: list[tuple[int, str]] = []
    for row, node in enumerate(trace.nodes):
        ids.append(node.id)
        types.append(node.type)
        starts.append(node.start_ns)
        durations.append(node.duration_ns)
        data.extend(node.data_deps)
        data_counts.append(len(node.data_deps))
        control.extend(node.ctrl_deps)
        control_counts.append(len(node.ctrl_deps))
        attrs = node.attrs
        stream = attrs.get("stream")
        streams.append(stream if type(stream) is int and not attrs.get("is_cpu_op") else -1)
        if node.is_comm:
            communication.append(node)
        if Typed in map(type, attrs.values()):
            mistyped += [
                (row, name) for name, value in attrs.items() if isinstance(value, Typed) and name in ATTRIBUTES
            ]
    return Columns(
        trace=trace,
        ids=_numbers(ids, np.uint64),
        types=_numbers(types, np.uint8),
        starts_ns=_numbers(starts, np.int64),
        durations_ns=_numbers(durations, np.int64),
        streams=_numbers(streams, np.int64),
        data=_edges(data_counts, data),
        control=_edges(control_counts, control),
        communication=communication,
        mistyped=mistyped,
    )


def _numbers(values: array[int], kind: Any) -> NDArray[Any]:
    return np.frombuffer(values, dtype=kind) if values else np.empty(0, dtype=kind)


def _edges(counts: array[int], needed: array[int]) -> Edges:
    num_needed = np.asarray(counts, dtype=np.int64)
    return Edges(owners=np.repeat(np.arange(len(num_needed)), num_needed), needed=_numbers(needed, np.uint64))
