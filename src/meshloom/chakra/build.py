"""`TraceBuilder`: the one place where traces are made, from real runs and imagined ones alike.

The caller says what ran, which bytes of which storage it read and wrote, and in which lane (a host thread, a device
stream, a process group) it stood. The builder derives dependencies from that: on the last writers of every byte read
or overwritten (data), and on the predecessor in the lane (control). Views and in-place writes need no special case,
because regions are bytes of a storage, never tensor ids. Write-after-read order is left to the lanes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple
from zlib import crc32

import msgspec

import meshloom
from meshloom.chakra.cost import Cost, Tensor
from meshloom.chakra.trace import CommType, Node, NodeType, Trace
from meshloom.chakra.wire import StoredNodes

Lane = Hashable
_FIRST_GROUP = 1_000_000_000  # readers hold it in 31 bits


class Region(NamedTuple):
    """Bytes `begin` to `end` (exclusive) of a storage."""

    storage: Hashable
    begin: int
    end: int


def group_id(ranks: Sequence[int], world_size: int) -> str:
    """The `pg_name` of the group of `ranks`: 1 for the world, else an integer that every rank derives alike.

    A checksum needs no agreement between ranks; two groups that share one are found by `check`. All but the world's
    have ten digits, so that the files of ranks which run the same thing have one length.
    """
    if len(ranks) == world_size:
        return "1"
    return str(_FIRST_GROUP + crc32(",".join(map(str, ranks)).encode()) % ((1 << 31) - _FIRST_GROUP))


class TraceBuilder:
    """Builds the trace of one rank, node by node, in an order in which each node comes after those it needs."""

    def __init__(self, *, rank: int, world_size: int, source: str, **facts: Any) -> None:
        self.rank = rank
        self.world_size = world_size
        facts = {name: value for name, value in facts.items() if value is not None}
        self._facts = {
            "source": source,
            "rank": rank,
            "world_size": world_size,
            **facts,
            "meshloom_version": meshloom.__version__,
        }
        self._nodes = StoredNodes()
        self._writers: dict[Hashable, list[tuple[int, int, int]]] = {}  # storage -> (begin, end, node)
        self._lanes: dict[Lane, int] = {}

    def compute(
        self,
        name: str,
        *,
        cost: Cost,
        inputs: Sequence[Tensor] = (),
        outputs: Sequence[Tensor] = (),
        reads: Iterable[Region] = (),
        writes: Iterable[Region] = (),
        lane: Lane = None,
        after: Iterable[int] = (),
        is_cpu_op: bool = False,
        start_ns: int = 0,
        duration_ns: int = 0,
        **attrs: Any,
    ) -> int:
        """Add an op and return its id. `after` adds control dependencies; `attrs` are those of `ATTRIBUTES`."""
        attrs = {
            "is_cpu_op": is_cpu_op,
            "num_ops": max(1, cost.flops),
            "tensor_size": max(1, cost.num_bytes),
            "op_class": cost.op_class,
            "input_shapes": _shapes(inputs),
            "output_shapes": _shapes(outputs),
            **attrs,
        }
        if cost.gemm is not None:
            attrs["gemm"] = list(cost.gemm)
        return self._add(name, NodeType.COMP, reads, writes, lane, after, start_ns, duration_ns, attrs)

    def collective(
        self,
        name: str,
        *,
        comm_type: CommType,
        ranks: Sequence[int],
        num_bytes: int,
        output_bytes: int,
        dtype: str = "",
        reduction: str = "",
        axis: str = "",
        reads: Iterable[Region] = (),
        writes: Iterable[Region] = (),
        after: Iterable[int] = (),
        start_ns: int = 0,
        duration_ns: int = 0,
        **attrs: Any,
    ) -> int:
        """Add a collective of the group `ranks` and return its id.

        `num_bytes` are those of this rank's input tensor, which is what ASTRA-sim and the reference tools mean.
        Collectives of one group stand in one lane, because every rank must reach them in the same order.
        """
        attrs = {
            "is_cpu_op": False,
            "comm_type": int(comm_type),
            "comm_size": num_bytes,
            "comm_output_size": output_bytes,
            "comm_reduction": reduction,
            "pg_name": group_id(ranks, self.world_size),
            "comm_ranks": list(ranks) or "",  # left out where it is not known
            "comm_axis": axis,
            "dtype": dtype,
            **attrs,
        }
        lane = ("group", attrs["pg_name"])
        return self._add(name, NodeType.COMM_COLL, reads, writes, lane, after, start_ns, duration_ns, attrs)

    def message(
        self,
        name: str,
        *,
        source: int,
        destination: int,
        tag: int,
        num_bytes: int,
        reads: Iterable[Region] = (),
        writes: Iterable[Region] = (),
        after: Iterable[int] = (),
        start_ns: int = 0,
        duration_ns: int = 0,
        **attrs: Any,
    ) -> int:
        """Add a send (if this rank is the source) or a receive and return its id."""
        attrs = {
            "is_cpu_op": False,
            "comm_size": num_bytes,
            "comm_src": source,
            "comm_dst": destination,
            "comm_tag": tag,
            **attrs,
        }
        kind = NodeType.COMM_SEND if source == self.rank else NodeType.COMM_RECV
        lane = ("messages", kind, source, destination)
        return self._add(name, kind, reads, writes, lane, after, start_ns, duration_ns, attrs)

    def finish(self, **facts: Any) -> Trace:
        """The trace; `facts` are added to those of the file."""
        return Trace(nodes=self._nodes, attrs={**self._facts, **facts})

    def _add(
        self,
        name: str,
        kind: NodeType,
        reads: Iterable[Region],
        writes: Iterable[Region],
        lane: Lane,
        after: Iterable[int],
        start_ns: int,
        duration_ns: int,
        attrs: dict[str, Any],
    ) -> int:
        node = len(self._nodes) + 1
        writes = list(writes)
        data: dict[int, None] = {}  # a set that keeps its order
        for region in (*reads, *writes):
            for begin, end, writer in self._writers.get(region.storage, ()):
                if begin < region.end and region.begin < end:
                    data[writer] = None
        for region in writes:
            kept = [piece for old in self._writers.get(region.storage, ()) for piece in _without(old, region)]
            self._writers[region.storage] = [*kept, (region.begin, region.end, node)]
        control = dict.fromkeys(after)
        if lane is not None:
            if lane in self._lanes:
                control[self._lanes[lane]] = None
            self._lanes[lane] = node
        for dependency in data:
            control.pop(dependency, None)
        self._nodes.append(
            Node(
                id=node,
                name=name,
                type=kind,
                data_deps=list(data),
                ctrl_deps=list(control),
                start_ns=start_ns,
                duration_ns=duration_ns,
                attrs={name: value for name, value in attrs.items() if value != ""},
            )
        )
        return node


def _without(piece: tuple[int, int, int], region: Region) -> list[tuple[int, int, int]]:
    """What is left of a written piece once `region` is written over it."""
    begin, end, writer = piece
    if end <= region.begin or region.end <= begin:
        return [piece]
    left = [(begin, region.begin, writer)] if begin < region.begin else []
    right = [(region.end, end, writer)] if region.end < end else []
    return left + right


def _shapes(tensors: Sequence[Tensor]) -> str:
    return msgspec.json.encode([tensor.shape for tensor in tensors]).decode() if tensors else ""
