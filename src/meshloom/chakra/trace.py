"""The noun `Trace`: what ran on one rank, and the attributes that our dialect of Chakra gives each node.

A node is data only: it does not know how it is stored. Times are integer nanoseconds. The table `ATTRIBUTES` is the
one list of attributes that Meshloom writes; `docs/trace-format.md` is held against it by a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Literal, NamedTuple

import msgspec

SCHEMA_VERSION = "0.0.4"


class NodeType(IntEnum):
    """Chakra's node types."""

    INVALID = 0
    METADATA = 1
    MEM_LOAD = 2
    MEM_STORE = 3
    COMP = 4
    COMM_SEND = 5
    COMM_RECV = 6
    COMM_COLL = 7


class CommType(IntEnum):
    """Chakra's collective types."""

    ALL_REDUCE = 0
    REDUCE = 1
    ALL_GATHER = 2
    GATHER = 3
    SCATTER = 4
    BROADCAST = 5
    ALL_TO_ALL = 6
    REDUCE_SCATTER = 7
    REDUCE_SCATTER_BLOCK = 8
    BARRIER = 9


Kind = Literal[
    "double",
    "float",
    "int32",
    "int64",
    "uint32",
    "uint64",
    "sint32",
    "sint64",
    "fixed32",
    "fixed64",
    "sfixed32",
    "sfixed64",
    "bool",
    "string",
    "bytes",
]


class Attribute(NamedTuple):
    """How one attribute is written: its protobuf kind (a list of it if `many`), its unit, its meaning."""

    kind: Kind
    many: bool
    unit: str
    meaning: str


def _one(kind: Kind, unit: str, meaning: str) -> Attribute:
    return Attribute(kind, False, unit, meaning)


def _many(kind: Kind, unit: str, meaning: str) -> Attribute:
    return Attribute(kind, True, unit, meaning)


ATTRIBUTES: dict[str, Attribute] = {
    # what every consumer of Chakra reads
    "is_cpu_op": _one("bool", "", "true if the host ran it, false if a device did; always false on communication"),
    "num_ops": _one("int64", "FLOP", "floating-point operations; at least 1, because ASTRA-sim hangs on 0"),
    "tensor_size": _one("uint64", "byte", "bytes read and written; at least 1, because ASTRA-sim drops nodes of 0"),
    "comm_type": _one("int64", "enum", "which collective, Chakra's CollectiveCommType"),
    "comm_size": _one("int64", "byte", "bytes of this rank's input tensor (of the message, for send and receive)"),
    "comm_src": _one("int32", "rank", "sender"),
    "comm_dst": _one("int32", "rank", "receiver"),
    "comm_tag": _one("int32", "", "tag; both ends agree on it"),
    "pg_name": _one("string", "", "process group: an integer above 0 as text, the world group too"),
    # ours
    "start_ns": _one("int64", "ns", "start, exact; start_time_micros holds it rounded down"),
    "duration_ns": _one("int64", "ns", "duration, exact; duration_micros holds it rounded up"),
    "op_class": _one("string", "", "gemm, attention, memory (bound by bandwidth) or host (moves no tensor data)"),
    "gemm": _many("int64", "", "batch, m, n, k of a matrix product"),
    "phase": _one("string", "", "forward, backward, optimizer, or empty"),
    "module": _one("string", "", "path of the module that the op belongs to"),
    "dtype": _one("string", "", "element type of the first output, or of the message"),
    "input_shapes": _one("string", "", "JSON: the shape of each input tensor"),
    "output_shapes": _one("string", "", "JSON: the shape of each output tensor"),
    "comm_output_size": _one("int64", "byte", "bytes of this rank's output tensor"),
    "comm_reduction": _one("string", "", "sum, avg, min, max or product"),
    "comm_ranks": _many("int64", "rank", "the ranks of the group, in their order"),
    "comm_axis": _one("string", "", "the axis of the plan along which the group lies"),
    "thread": _one("int64", "", "host thread"),
    "stream": _one("int64", "", "device stream"),
    "memory_allocated": _one("int64", "byte", "bytes of the storages that the op allocates"),
    "memory_released": _one("int64", "byte", "bytes of the storages that nobody holds once the op is over"),
    "rf_id": _one("uint64", "", "PyTorch's record-function id, which its host and device files share"),
    "scope": _one("bool", "", "true on a node that only encloses others: its duration is its own part"),
    # of the file as a whole
    "source": _one("string", "", "capture or synth"),
    "rank": _one("int64", "rank", "the rank that the file belongs to"),
    "world_size": _one("int64", "rank", "how many ranks there are"),
    "plan": _one("string", "", "the plan, in its text form"),
    "model": _one("string", "", "the model, as it was named"),
    "num_steps": _one("int64", "", "how many steps were recorded, where that was asked for"),
    "step": _one("int64", "", "which step was recorded, counted from 0"),
    "step_start_ns": _one("int64", "ns", "start of the recorded step, on the clock of start_ns"),
    "step_duration_ns": _one("int64", "ns", "measured length of the recorded step"),
    "role_size": _one("int64", "rank", "of how many ranks this trace is that of the first, where others are left out"),
    "num_tokens": _one("int64", "", "tokens of one step, of all replicas and micro-batches together"),
    "memory_held": _one("int64", "byte", "bytes that live before the step: weights, optimizer states, batches"),
    "memory_peak": _one("int64", "byte", "the most bytes that live at one time during the step, those included"),
    "meshloom_version": _one("string", "", "the version of Meshloom that wrote the file"),
}


class Typed(NamedTuple):
    """An attribute value of a foreign file whose protobuf kind is not the one our dialect would choose."""

    kind: Kind
    many: bool
    value: Any


class Node(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One node. `attrs` holds plain Python values under the names of `ATTRIBUTES` and any foreign ones.

    `inputs` and `outputs` are Chakra's IOInfo (values, shapes, types), kept as text for files of others.
    """

    id: int
    name: str
    type: NodeType
    data_deps: list[int] = []
    ctrl_deps: list[int] = []
    start_ns: int = 0
    duration_ns: int = 0
    attrs: dict[str, Any] = {}
    inputs: tuple[str, str, str] | None = None
    outputs: tuple[str, str, str] | None = None

    @property
    def is_comm(self) -> bool:
        """Whether it is a collective, a send or a receive."""
        return self.type >= NodeType.COMM_SEND

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute's plain value, whatever kind a foreign file stored it as."""
        value = self.attrs.get(name, default)
        return value.value if isinstance(value, Typed) else value


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """What ran on one rank: facts about the file (`attrs`) and nodes, dependencies before those that need them.

    `nodes` may be a list; in traces that were read or made here they are decoded whenever they are asked for, so keep
    those that you need more than once.
    """

    nodes: Sequence[Node]
    attrs: dict[str, Any] = {}
    version: str = SCHEMA_VERSION

    def get(self, name: str, default: Any = None) -> Any:
        """The plain value of a fact about the file."""
        value = self.attrs.get(name, default)
        return value.value if isinstance(value, Typed) else value

    @property
    def rank(self) -> int:
        """The rank that the trace belongs to (0 where the file does not say)."""
        return int(self.get("rank", 0))
