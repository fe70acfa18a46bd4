"""From linked ops to a Chakra trace. No torch.

Which op did the work? The outermost one that is not composite, as a dispatcher below autograd would see it: that is
what synthesis sees too. What lies inside it, and what only encloses it, stays in the trace as host scopes. A c10d op
and the backend's event become one collective node.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from meshloom.capture.link import Op, TensorRef, link
from meshloom.chakra.build import Region, TraceBuilder
from meshloom.chakra.cost import Cost, Tensor, cost
from meshloom.chakra.file import write
from meshloom.chakra.trace import CommType
from meshloom.errors import TraceError

MODULE = "module:"  # prefixes of scopes that name what the ops inside belong to
PHASE = "phase:"

_HOST = Cost(0, 0, "host")
_NUMBER_DTYPES = ("float64", "int64", "bool")  # what PyTorch makes of Python numbers

# c10d op -> (what it is, index of the argument with this rank's input, of the one with its output)
_COLLECTIVES: dict[str, tuple[CommType, int, int]] = {
    "allreduce_": (CommType.ALL_REDUCE, 0, 0),
    "allreduce_coalesced_": (CommType.ALL_REDUCE, 0, 0),
    "broadcast_": (CommType.BROADCAST, 0, 0),
    "reduce_": (CommType.REDUCE, 0, 0),
    "allgather_": (CommType.ALL_GATHER, 1, 0),
    "_allgather_base_": (CommType.ALL_GATHER, 1, 0),
    "allgather_into_tensor_coalesced_": (CommType.ALL_GATHER, 1, 0),
    "reduce_scatter_": (CommType.REDUCE_SCATTER, 1, 0),
    "_reduce_scatter_base_": (CommType.REDUCE_SCATTER, 1, 0),
    "reduce_scatter_tensor_coalesced_": (CommType.REDUCE_SCATTER, 1, 0),
    "alltoall_": (CommType.ALL_TO_ALL, 1, 0),
    "alltoall_base_": (CommType.ALL_TO_ALL, 1, 0),
    "gather_": (CommType.GATHER, 1, 0),
    "scatter_": (CommType.SCATTER, 1, 0),
    "barrier": (CommType.BARRIER, 0, 0),
}


class Notes(msgspec.Struct, frozen=True, kw_only=True):
    """What the recorder knew besides PyTorch's files. `collectives`: (operation, group name), in order."""

    rank: int
    world_size: int
    step: int
    step_duration_ns: int
    groups: dict[str, list[int]]
    collectives: list[tuple[str, str]]
    axes: dict[str, str]  # ranks joined by commas -> axis of the plan
    composite_ops: list[str]
    facts: dict[str, Any]


def convert_rank(host: Path, device: Path, notes: Path, out: Path) -> Path:
    """Write the Chakra trace of one rank from its three files and return its path; raises TraceError, FolderError."""
    try:
        told = msgspec.json.decode(notes.read_bytes(), type=Notes)
    except (OSError, msgspec.DecodeError) as error:
        raise TraceError(f"{notes}: expected the recorder's notes, got '{error}'") from error
    return write(_Converter(link(host, device), told).trace(), out)


class _Converter:
    """Walks the ops of one rank in the order of their starts."""

    def __init__(self, ops: list[Op], notes: Notes) -> None:
        self.ops = ops
        self.notes = notes
        self.composite = set(notes.composite_ops)
        self.base_ns = ops[0].start_ns if ops else 0
        self.builder = TraceBuilder(
            rank=notes.rank,
            world_size=notes.world_size,
            source="capture",
            step=notes.step,
            step_duration_ns=notes.step_duration_ns,
            **notes.facts,
        )
        self.nodes: list[int | None] = [None] * len(ops)  # op -> node
        self.inside_work = [False] * len(ops)
        self.labels: list[tuple[str, str]] = [("", "")] * len(ops)  # op -> (phase, module)
        self.module_of_sequence: dict[int, str] = {}
        self.own_ns = _own_times(ops)
        self.backend_events = _backend_events(ops)
        self.backend_threads = {ops[index].thread for index in self.backend_events.values()} - {
            op.thread for op in ops if op.name.startswith("c10d::")
        }
        self.next_collective = 0
        self.written_storages = {ref.storage for op in ops for ref in op.outputs if op.schema}

    def trace(self) -> Any:
        """The trace of all ops."""
        for index, op in enumerate(self.ops):
            self._label(index, op)
            # What a backend's own thread does is part of the collective it serves.
            if op.name.startswith((PHASE, MODULE)) or self._is_backend(index, op):
                continue
            if op.name.startswith("c10d::"):
                self._communicate(index, op)
            elif op.parent >= 0 and self.inside_work[op.parent]:
                self.inside_work[index] = True
                self._scope(index, op)
            elif op.name.startswith("_c10d_functional::"):
                # It copies its input for the c10d op inside to change: the copy is part of the communication.
                self.inside_work[index] = True
                self._scope(index, op, moves=True)
            elif op.schema and op.name not in self.composite and (work := self._work(op)).op_class != "host":
                self.inside_work[index] = True
                self._compute(index, op, work)
            else:
                self._scope(index, op)
        return self.builder.finish()

    def _is_backend(self, index: int, op: Op) -> bool:
        return op.thread in self.backend_threads or op.name.startswith(("gloo:", "nccl:"))

    def _label(self, index: int, op: Op) -> None:
        phase, module = self.labels[op.parent] if op.parent >= 0 else ("", "")
        if op.name.startswith(PHASE):
            phase = op.name.removeprefix(PHASE)
        elif op.name.startswith(MODULE):
            module = op.name.removeprefix(MODULE)
        elif phase == "backward":
            module = self.module_of_sequence.get(op.sequence, module)
        elif op.sequence >= 0:
            self.module_of_sequence[op.sequence] = module
        self.labels[index] = phase, module

    def _attrs(self, index: int, op: Op) -> dict[str, Any]:
        phase, module = self.labels[index]
        return {
            "phase": phase,
            "module": module,
            "rf_id": op.rf_id,
            "thread": op.thread,
            "start_ns": op.start_ns - self.base_ns,
        }

    def _parent_node(self, op: Op) -> list[int]:
        while op.parent >= 0:
            node = self.nodes[op.parent]
            if node is not None:
                return [node]
            op = self.ops[op.parent]
        return []

    def _scope(self, index: int, op: Op, *, moves: bool = False) -> None:
        self.nodes[index] = self.builder.compute(
            op.name,
            cost=_HOST,
            is_cpu_op=True,
            scope=True,
            after=self._parent_node(op),
            reads=[_region(ref) for refs in op.inputs for ref in refs] if moves else (),
            writes=[_region(ref) for ref in op.outputs] if moves else (),
            duration_ns=self.own_ns[index],
            **self._attrs(index, op),
        )

    def _work(self, op: Op) -> Cost:
        return cost(op.name, [_tensor(ref) for ref in self._inputs(op)], [_tensor(ref) for ref in _written(op)])

    def _inputs(self, op: Op) -> list[TensorRef]:
        """The op's input tensors without Python numbers, which reach an op as tensors () that nobody has written."""
        return [
            ref
            for refs in op.inputs
            for ref in refs
            if ref.shape or ref.dtype not in _NUMBER_DTYPES or ref.storage in self.written_storages
        ]

    def _compute(self, index: int, op: Op, work: Cost) -> None:
        inputs, written = self._inputs(op), _written(op)
        self.nodes[index] = self.builder.compute(
            op.name,
            cost=work,
            inputs=[_tensor(ref) for ref in inputs],
            outputs=[_tensor(ref) for ref in written],
            reads=[_region(ref) for ref in inputs],
            writes=[_region(ref) for ref in written],
            # Host threads hand over to each other in time; the ops of a step stand in one lane.
            lane="compute",
            after=self._parent_node(op),
            is_cpu_op=True,
            duration_ns=op.duration_ns,
            dtype=(written or inputs)[0].dtype if written or inputs else "",
            **self._attrs(index, op),
        )

    def _communicate(self, index: int, op: Op) -> None:
        name = op.name.removeprefix("c10d::")
        self.inside_work[index] = True
        event = self.ops[self.backend_events[index]] if index in self.backend_events else op
        attrs = {**self._attrs(index, op), "start_ns": event.start_ns - self.base_ns}
        after = self._parent_node(op)
        if name in ("send", "recv_"):
            refs = op.inputs[0]
            peer, tag = int(op.scalars[2]), int(op.scalars[3])
            source, destination = (self.notes.rank, peer) if name == "send" else (peer, self.notes.rank)
            regions = [_region(ref) for ref in refs]
            self.nodes[index] = self.builder.message(
                op.name,
                source=source,
                destination=destination,
                tag=tag,
                num_bytes=_num_bytes(refs),
                reads=regions if name == "send" else (),
                writes=() if name == "send" else regions,
                after=after,
                duration_ns=event.duration_ns,
                **attrs,
            )
            return
        if name not in _COLLECTIVES:
            raise TraceError(f"rank {self.notes.rank}: {op.name} is a c10d op that the converter does not know")
        comm_type, source_arg, target_arg = _COLLECTIVES[name]
        ranks = self._ranks(op)
        sent, received = op.inputs[source_arg], op.inputs[target_arg]
        self.nodes[index] = self.builder.collective(
            op.name,
            comm_type=comm_type,
            ranks=ranks,
            num_bytes=_num_bytes(sent),
            output_bytes=_num_bytes(received),
            dtype=sent[0].dtype if sent else "",
            axis=self.notes.axes.get(",".join(map(str, ranks)), ""),
            reads=[_region(ref) for ref in sent],
            writes=[_region(ref) for ref in received],
            after=after,
            duration_ns=event.duration_ns,
            **attrs,
        )

    def _ranks(self, op: Op) -> list[int]:
        """The ranks of the op's group: the recorder noted every collective's group, in the order of their issue."""
        if self.next_collective >= len(self.notes.collectives):
            raise TraceError(
                f"rank {self.notes.rank}: expected a note of the group of {op.name}, the recorder noted "
                f"{len(self.notes.collectives)} collectives only"
            )
        _, group = self.notes.collectives[self.next_collective]
        self.next_collective += 1
        if group not in self.notes.groups:
            raise TraceError(
                f"rank {self.notes.rank}: {op.name} ran in group {group!r}, which the recorder does not know"
            )
        return self.notes.groups[group]


def _own_times(ops: Sequence[Op]) -> list[int]:
    """Each op's duration without that of the ops directly inside it."""
    own = [op.duration_ns for op in ops]
    for op in ops:
        if op.parent >= 0:
            own[op.parent] -= op.duration_ns
    return [max(0, duration) for duration in own]


def _backend_events(ops: Sequence[Op]) -> dict[int, int]:
    """c10d op -> the backend's event that did it: the first with a higher id, before the next c10d op's id."""
    issued = sorted((op.rf_id, index) for index, op in enumerate(ops) if op.name.startswith("c10d::"))
    events = sorted((op.rf_id, index) for index, op in enumerate(ops) if op.name.startswith(("gloo:", "nccl:")))
    found: dict[int, int] = {}
    for (rf_id, index), (next_id, _) in pairwise([*issued, (1 << 62, -1)]):
        event = next((event for event_id, event in events if rf_id < event_id < next_id), None)
        if event is not None:
            found[index] = event
    return found


def _written(op: Op) -> list[TensorRef]:
    """What the op writes: its outputs, and the arguments that its schema marks with an exclamation mark."""
    written = {(ref.storage, ref.begin, ref.end): ref for ref in op.outputs}
    for argument, refs in zip(_argument_texts(op.schema), op.inputs):
        if "!" in argument.split(" ")[0]:
            written.update({(ref.storage, ref.begin, ref.end): ref for ref in refs})
    return list(written.values())


def _argument_texts(schema: str) -> list[str]:
    """`aten::add_(Tensor(a!) self, Scalar other) -> …`: the text of each argument."""
    inside = schema.partition("(")[2].rpartition(") -> ")[0]
    return [text for text in inside.replace("*, ", "").split(", ") if text]


def _tensor(ref: TensorRef) -> Tensor:
    return Tensor(ref.shape, ref.itemsize)


def _region(ref: TensorRef) -> Region:
    return Region(ref.storage, ref.begin, ref.end)


def _num_bytes(refs: Sequence[TensorRef]) -> int:
    return sum(_tensor(ref).num_bytes for ref in refs)
