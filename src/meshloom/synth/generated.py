"""What some ranks of a generation run alike: the steps that were captured, and those that are stamped out after them.

Nothing of a stamped step is held: its bytes are made when they are asked for. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np

from meshloom.chakra.build import group_id
from meshloom.chakra.trace import Node, NodeType, Trace
from meshloom.chakra.wire import StoredNodes, whole_frames
from meshloom.plan import Plan
from meshloom.synth.repeat import Repeated
from meshloom.synth.series import encode_steps
from meshloom.synth.wide import Numbers, width_for

_PRODUCTS = ("gemm", "attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What some ranks of a plan run alike, as the first of them does: `nodes`, and then `lines` in each of `places`."""

    ranks: tuple[int, ...]
    plan: Plan
    nodes: Sequence[Node]
    held_bytes: int  # weights
    lines: Sequence[Repeated] = ()
    places: range = range(0)  # steps after the one that the lines tell of
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def num_nodes(self) -> int:
        """How many nodes its traces have."""
        return len(self.nodes) + len(self.lines) * len(self.places)

    @property
    def num_flops(self) -> int:
        """Floating-point operations of products and attention on each of its ranks."""
        captured: int = sum(node.attrs.get("num_ops", 0) for node in self.nodes if _is_product(node))
        products = [line for line in self.lines if _is_product(line.node)]
        return captured + int(self._grown(products, "num_ops").sum())

    @property
    def peak_bytes(self) -> int:
        """The most bytes that live at one time, with the weights."""
        names = ("memory_allocated", "memory_released")
        captured = [np.array([node.attrs.get(name, 0) for node in self.nodes], np.int64) for name in names]
        allocated, released = (
            np.concatenate((before, self._grown(self.lines, name).ravel())) for before, name in zip(captured, names)
        )
        live = np.cumsum(allocated - released) + released  # before an op releases what it does
        return self.held_bytes + int(live.max(initial=0))

    def _grown(self, lines: Sequence[Repeated], name: str) -> Numbers:
        """A number of each line (column) in each of the stamped steps (row)."""
        first = [line.node.attrs.get(name, 0) for line in lines]
        by = [line.attrs[name].by if name in line.attrs else 0 for line in lines]
        return np.array(first, np.int64) + np.array(self.places, np.int64)[:, None] * np.array(by, np.int64)

    def encoded(self) -> bytes:
        """The nodes of its first rank, as they stand in a file."""
        width = width_for(self.num_nodes + 1)
        return bytes(StoredNodes.of(self.nodes).framed()) + encode_steps(self.lines, self.places, width)

    def on(self, rank: int) -> Generated:
        """The same as `rank` has it, which is one of its ranks; itself if nothing is another."""
        if rank == self.ranks[0]:
            return self
        nodes = [self._of(node, rank) for node in self.nodes]
        if all(mine is theirs for mine, theirs in zip(self.nodes, nodes)):
            return self
        lines = [line._replace(node=self._of(line.node, rank)) for line in self.lines]
        return replace(self, nodes=nodes, lines=lines)

    def attrs(self, rank: int) -> dict[str, Any]:
        """The facts of the trace of `rank`."""
        return {**self.facts, "rank": rank, "memory_held": self.held_bytes, "memory_peak": self.peak_bytes}

    def trace(self, rank: int) -> Trace:
        """The trace of `rank`, one of its ranks."""
        data = self.on(rank).encoded()
        return Trace(nodes=StoredNodes(data, whole_frames(data)), attrs=self.attrs(rank))

    def _of(self, node: Node, rank: int) -> Node:
        """The node as another place of tp has it: its groups along pp, and its messages, are those of that place."""
        if not node.is_comm or (node.type is NodeType.COMM_COLL and node.get("comm_axis") == "tp"):
            return node
        place = self.plan.coordinate(rank)["tp"]

        def beside(other: int) -> int:
            return self.plan.rank(**{**self.plan.coordinate(other), "tp": place})

        attrs = dict(node.attrs)
        for name in ("comm_src", "comm_dst"):
            if name in attrs:
                attrs[name] = beside(attrs[name])
        if "comm_ranks" in attrs:
            attrs["comm_ranks"] = [beside(other) for other in attrs["comm_ranks"]]
            attrs["pg_name"] = group_id(attrs["comm_ranks"], self.plan.world_size)
        return msgspec.structs.replace(node, attrs=attrs)


def _is_product(node: Node) -> bool:
    return node.attrs.get("op_class") in _PRODUCTS
