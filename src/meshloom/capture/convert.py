"""From linked ops and kernels to a Chakra trace. No torch.

Which op did the work? On a device its kernels did. On the CPU it is the outermost op that is not composite, as a
dispatcher below autograd would see it: that is what synthesis sees too. What lies inside it, and what only encloses
it, stays in the trace as host scopes. A c10d op and what the backend ran for it become one collective node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from meshloom.capture.alone import link_alone
from meshloom.capture.collectives import C10D, collective_named, is_communication, reduction_named
from meshloom.capture.device import Args, Kernel, Launch
from meshloom.capture.host import TensorRef, written
from meshloom.capture.link import Launched, Linked, Op, backend_events, in_order, link, longest_kernels, own_times
from meshloom.capture.notes import Notes, notes_of, read_notes
from meshloom.capture.storages import Storages
from meshloom.capture.tensors import ITEMSIZES, num_bytes, numbers, tensor
from meshloom.capture.waits import PARAMS, NotedWaits
from meshloom.capture.working import Working
from meshloom.chakra.build import TraceBuilder
from meshloom.chakra.cost import Cost, cost
from meshloom.chakra.file import paused_collection, write
from meshloom.chakra.trace import CommType, Trace
from meshloom.errors import TraceError

MODULE = "module:"  # prefixes of scopes that name what the ops inside belong to
PHASE = "phase:"
MESSAGE = "message:"  # names the ranks of a message, as in message:0>2

_HOST = Cost(0, 0, "host")
_PART = Cost(0, 0, "memory")  # a further kernel of an op whose cost another one carries


def convert_rank(
    host: Path, device: Path | None, out: Path, *, notes: Path | None = None, rank: int | None = None
) -> tuple[Trace, list[str]]:
    """Write the Chakra trace of one rank to `out`; returns it, and what had to be repaired or left out.

    Without `device`, `host` may be either of PyTorch's files alone. Without `notes`, rank and groups are taken from
    the device file. Raises TraceError, FolderError.
    """
    with paused_collection():
        linked = link(host, device) if device is not None else link_alone(host)
        told = read_notes(notes) if notes is not None else notes_of(linked, rank)
        trace = convert(linked, told)
        write(trace, out)
    return trace, linked.warnings


def convert(linked: Linked, notes: Notes) -> Trace:
    """The trace of one rank; what had to be left out is added to `linked.warnings`."""
    return _Converter(linked, notes).trace()


class _Group(NamedTuple):
    ranks: list[int]
    name: str | None  # pg_name where the ranks are not known


class _Converter:
    """Walks the ops and kernels of one rank in the order in which the host started and launched them."""

    def __init__(self, linked: Linked, notes: Notes) -> None:
        self.ops, self.notes, self.warnings = linked.ops, notes, linked.warnings
        self.linked = linked
        self.working = Working(linked.ops, notes.composite_ops)
        self.storages = Storages(linked.ops)
        starts = [op.start_ns for op in linked.ops[:1]] + [item.kernel.start_ns for item in linked.kernels[:1]]
        self.base_ns = min(starts, default=0)
        self.builder = TraceBuilder(
            rank=notes.rank,
            world_size=notes.world_size,
            source="capture",
            step=notes.step,
            step_duration_ns=notes.step_duration_ns,
            **notes.facts,
        )
        self.nodes: list[int | None] = [None] * len(self.ops)  # op -> node
        self.inside_work = [False] * len(self.ops)
        self.labels: list[tuple[str, str]] = [("", "")] * len(self.ops)  # op -> (phase, module)
        self.module_of_sequence: dict[int, str] = {}
        self.own_ns = own_times(self.ops)
        self.has_device = bool(linked.kernels)
        self.longest = longest_kernels(linked.kernels)
        self.backend_events = backend_events(self.ops)
        self.backend_threads = {self.ops[index].thread for index in self.backend_events.values()} - {
            op.thread for op in self.ops if op.name.startswith("c10d::")
        }
        self.carried = {self._c10d_of(item.op) for item in linked.kernels if is_communication(item.kernel.name)}
        self.next_collective = 0
        self.last_kernel: dict[int, int] = {}  # stream -> node
        self.last_host: int | None = None
        self.started_threads: set[int] = set()
        self.waited: dict[int, list[int]] = {}  # thread -> kernels that it has waited for
        self.stream_waits: dict[int, list[int]] = {}  # stream -> kernels of others that its next one waits for
        told = any(call.wait_record >= 0 for call in linked.waits)  # by the driver, which knows best
        self.noted_waits = None if told else NotedWaits()
        self.recorded: dict[int, dict[int, int]] = {}  # correlation of an event's note -> last kernels at that moment

    def trace(self) -> Trace:
        """The trace of all ops and kernels."""
        for item in in_order(self.linked):
            try:
                if isinstance(item, int):
                    self._host(item, self.ops[item])
                elif isinstance(item, Launched):
                    self._kernel(item)
                else:
                    self._order(item)
            except (TypeError, ValueError, IndexError, OverflowError) as error:
                raise TraceError(
                    f"rank {self.notes.rank}: {_name(item, self.ops)}: expected arguments as PyTorch writes them, "
                    f"got others ({error})"
                ) from error
        return self.builder.finish()

    # -- the host

    def _host(self, index: int, op: Op) -> None:
        self._label(index, op)
        if self.noted_waits is not None:
            self.noted_waits.note(op)
        # What a backend's own thread does is part of the collective it serves.
        if (
            op.name.startswith((PHASE, MODULE, MESSAGE))
            or op.thread in self.backend_threads
            or op.name.startswith("gloo:")
        ):
            return
        inside = op.parent >= 0 and self.inside_work[op.parent]
        if self.working.hands_on(index):
            self._scope(index, op)
            return
        if self.has_device or not inside:  # what lies inside is no news
            self.storages.begin(op)
        if op.name.startswith("c10d::") and self._communicates(index, op):
            self._communicate(index, op)
        elif self.has_device or inside:
            self.inside_work[index] = not self.has_device
            self._scope(index, op)
        elif op.name.startswith("_c10d_functional::"):
            # It copies its input for the c10d op inside to change: the copy is part of the communication.
            self.inside_work[index] = True
            self._scope(index, op, moves=True)
        elif op.schema and self.working.is_whole(index) and (work := self._work(op)).op_class != "host":
            self.inside_work[index] = True
            self._compute(index, op, work)
        else:
            self._scope(index, op)

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

    def _before(self, op: Op) -> list[int]:
        """What the host does first: the enclosing op; a thread's first op comes after what started it; and waits."""
        before = self.waited.pop(op.thread, [])
        if op.thread not in self.started_threads:
            self.started_threads.add(op.thread)
            before = [*before, *([self.last_host] if self.last_host is not None else [])]
        parent = self._parent_node(op)
        return before if parent is None else [*before, parent]

    def _parent_node(self, op: Op) -> int | None:
        """The node of the innermost op around it; not a collective's, whose backend may run after what lies inside."""
        while op.parent >= 0:
            node = self.nodes[op.parent]
            if node is not None and not self.ops[op.parent].name.startswith("c10d::"):
                return node
            op = self.ops[op.parent]
        return None

    def _scope(self, index: int, op: Op, *, moves: bool = False) -> None:
        self.nodes[index] = self.last_host = self.builder.compute(
            op.name,
            cost=_HOST,
            is_cpu_op=True,
            scope=True,
            lane=("thread", op.thread),
            after=self._before(op),
            reads=self.storages.regions([ref for refs in op.inputs for ref in refs]) if moves else (),
            writes=self.storages.regions(op.outputs) if moves else (),
            duration_ns=self.own_ns[index],
            **self._attrs(index, op),
        )

    def _work(self, op: Op) -> Cost:
        return cost(
            op.name,
            [tensor(ref) for ref in self._inputs(op)],
            [tensor(ref) for ref in written(op.inputs, op.outputs, op.schema)],
        )

    def _inputs(self, op: Op) -> list[TensorRef]:
        """The op's input tensors without Python numbers."""
        return [ref for refs in op.inputs for ref in refs if not self.storages.is_number(ref)]

    def _tensors(self, op: Op) -> dict[str, Any]:
        """What the node of an op's work tells of its tensors."""
        inputs, changed = self._inputs(op), written(op.inputs, op.outputs, op.schema)
        return {
            "inputs": [tensor(ref) for ref in inputs],
            "outputs": [tensor(ref) for ref in changed],
            "reads": self.storages.regions(inputs),
            "writes": self.storages.regions(changed),
            "dtype": (changed or inputs)[0].dtype if changed or inputs else "",
        }

    def _compute(self, index: int, op: Op, work: Cost) -> None:
        # Host threads hand over to each other in time; the ops of a step stand in one lane.
        self.nodes[index] = self.last_host = self.builder.compute(
            op.name,
            cost=work,
            lane="compute",
            after=self._before(op),
            is_cpu_op=True,
            duration_ns=op.duration_ns,
            **self._tensors(op),
            **self._attrs(index, op),
        )

    # -- the device

    def _order(self, call: Launch) -> None:
        """A call that notes an event, lets a stream wait for one, or lets the host wait for an event or for streams."""
        if call.wait_record >= 0:
            noted = self.recorded.get(call.wait_record, self.last_kernel)
            kernels = [noted[call.wait_stream]] if call.wait_stream in noted else []
        else:
            streams = [call.stream] if call.stream in self.last_kernel else list(self.last_kernel)
            kernels = [self.last_kernel[stream] for stream in streams]
        if "Synchronize" in call.name:
            self.waited[call.thread] = kernels
        elif call.wait_record >= 0:
            self.stream_waits.setdefault(call.stream, []).extend(kernels)
        else:
            self.recorded[call.correlation] = dict(self.last_kernel)

    def _kernel(self, item: Launched) -> None:
        kernel = item.kernel
        lane = ("stream", kernel.stream)
        attrs: dict[str, Any] = {
            "stream": kernel.stream,
            "start_ns": kernel.start_ns - self.base_ns,
            "duration_ns": kernel.duration_ns,
        }
        after = []
        if item.op >= 0:
            phase, module = self.labels[item.op]
            attrs.update(phase=phase, module=module, rf_id=self.ops[item.op].rf_id)
            launcher = self.nodes[item.op] or self._parent_node(self.ops[item.op])
            after = [launcher] if launcher is not None else []
        elif not item.launched:
            self._warn_once(
                f"{kernel.name.partition('(')[0]}: no launch of it is in the device file; it depends on its stream only"
            )
        after += self.stream_waits.pop(kernel.stream, [])
        communicates = is_communication(kernel.name)
        thread = self.ops[item.op].thread if item.op >= 0 else -1
        if self.noted_waits is not None:
            after += self.noted_waits.before(thread, kernel, communicates=communicates)
        node = self._communication_kernel(item, after, attrs) if communicates else None
        if node is None:
            op = self._working_op(item.op)
            told = self._tensors(op) if op is not None else {}
            work = self._work(op) if op is not None and self.longest.get(item.op) is item else _PART
            work = _PART if work.op_class == "host" else work
            node = self.builder.compute(kernel.name, cost=work, lane=lane, after=after, **told, **attrs)
        self.last_kernel[kernel.stream] = node
        if self.noted_waits is not None:
            params = next((op for op in self._chain(item.op) if op.name == PARAMS), None)
            self.noted_waits.ran(thread, kernel, node, params, communicates=communicates)

    def _working_op(self, index: int) -> Op | None:
        """The innermost op of the dispatcher around a launch: kernels do its work."""
        while index >= 0 and not self.ops[index].schema:
            index = self.ops[index].parent
        return self.ops[index] if index >= 0 else None

    def _communication_kernel(self, item: Launched, after: list[int], attrs: dict[str, Any]) -> int | None:
        """The node of a collective's or message's kernel; None if nothing tells what it is."""
        kernel, chain = item.kernel, list(self._chain(item.op))
        c10d = next((op for op in chain if op.name.startswith("c10d::")), None)
        params = next((op for op in chain if op.name == PARAMS), None)
        name = c10d.name.removeprefix("c10d::") if c10d is not None else ""
        previous = [self.last_kernel[kernel.stream]] if kernel.stream in self.last_kernel else []
        after = [*after, *previous]
        if kernel.args.source >= 0 and kernel.args.destination >= 0:
            return self._told_message(kernel, after, attrs)
        if c10d is not None and name in ("send", "recv_") and len(c10d.scalars) > 3:
            return self._message(c10d, name, after, attrs)
        names = [
            kernel.args.collective,
            *(str(value) for value in (params.scalars if params else []) if isinstance(value, str)),
            name,
            *(op.name for op in chain if op.name.startswith("nccl:")),
            kernel.name,
        ]
        kind = collective_named(*names)
        if kind is None:
            self._warn_once(
                f"{kernel.name.partition('(')[0]}: expected its name, its arguments or its op to tell what it "
                "communicates, they do not; it stays a kernel"
            )
            return None
        _, source, target = C10D.get(name, (kind, 0, 0))
        sent, received = (c10d.inputs[source], c10d.inputs[target]) if c10d is not None and c10d.inputs else ([], [])
        if not sent:  # device files alone tell the shape only in NCCL's own scope
            sent = next((op.inputs[0] for op in chain if op.name.startswith("nccl:") and op.inputs), [])
        return self._collective(
            kernel.name,
            kind,
            self._group_of_kernel(kernel.args, params),
            sent,
            received,
            after,
            attrs,
            reduction=reduction_named(kernel.name),
            args=kernel.args,
        )

    def _told_message(self, kernel: Kernel, after: list[int], attrs: dict[str, Any]) -> int:
        """A send or receive of which the device file tells both ends."""
        args = kernel.args
        return self.builder.message(
            kernel.name,
            source=args.source,
            destination=args.destination,
            tag=0,
            num_bytes=max(args.num_sent, args.num_received) * ITEMSIZES.get(args.dtype, 1),
            after=after,
            **attrs,
        )

    def _chain(self, index: int) -> Iterator[Op]:
        while index >= 0:
            yield self.ops[index]
            index = self.ops[index].parent

    def _c10d_of(self, index: int) -> int:
        while index >= 0 and not self.ops[index].name.startswith("c10d::"):
            index = self.ops[index].parent
        return index

    def _group_of_kernel(self, args: Args, params: Op | None) -> _Group:
        ranks = numbers(args.group_ranks)
        if ranks:
            return _Group(ranks, None)
        name = args.group_name
        if name in self.notes.groups:
            return _Group(self.notes.groups[name], None)
        size = args.group_size or (params.scalars[-1] if params is not None and params.scalars else None)
        if size == self.notes.world_size:
            return _Group(list(range(self.notes.world_size)), None)
        told = f"of {size} ranks" if size else "of unknown size"
        self._warn_once(f"a process group {told} is not listed in the device file; its ranks are left out")
        key = name or str(params.scalars[2] if params is not None and len(params.scalars) > 2 else size)
        return _Group([], str(2 + crc32(key.encode()) % ((1 << 31) - 3)))

    # -- communication

    def _communicates(self, index: int, op: Op) -> bool:
        if not self.has_device or index in self.backend_events:
            return True
        if index not in self.carried:
            self._warn_once(f"{op.name}: the device file holds no kernel of it; it stays a host op")
        return False

    def _communicate(self, index: int, op: Op) -> None:
        name = op.name.removeprefix("c10d::")
        self.inside_work[index] = True
        event = self.ops[self.backend_events[index]] if index in self.backend_events else op
        attrs = {**self._attrs(index, op), "start_ns": event.start_ns - self.base_ns, "duration_ns": event.duration_ns}
        after = self._before(op)
        if name in ("send", "recv_"):
            self.nodes[index] = self._message(op, name, after, attrs)
            return
        if name not in C10D:
            raise TraceError(f"rank {self.notes.rank}: {op.name} is a c10d op that the converter does not know")
        kind, source, target = C10D[name]
        self.nodes[index] = self._collective(
            op.name, kind, self._noted_group(op), op.inputs[source], op.inputs[target], after, attrs
        )

    def _noted_group(self, op: Op) -> _Group:
        """The ranks of the op's group: the recorder noted every collective's group, in the order of their issue."""
        if self.next_collective >= len(self.notes.collectives):
            if len(set(map(tuple, self.notes.groups.values()))) <= 1:  # there is only one group it can be
                return _Group(next(iter(self.notes.groups.values()), list(range(self.notes.world_size))), None)
            raise TraceError(
                f"rank {self.notes.rank}: expected a note of the group of {op.name}, which PyTorch's "
                "files omit on gloo; record with meshloom, which notes it"
            )
        _, group = self.notes.collectives[self.next_collective]
        self.next_collective += 1
        if group not in self.notes.groups:
            raise TraceError(
                f"rank {self.notes.rank}: {op.name} ran in group {group!r}, which the recorder does not know"
            )
        return _Group(self.notes.groups[group], None)

    def _collective(
        self,
        name: str,
        kind: CommType,
        group: _Group,
        sent: Sequence[TensorRef],
        received: Sequence[TensorRef],
        after: list[int],
        attrs: dict[str, Any],
        *,
        reduction: str = "",
        args: Args | None = None,
    ) -> int:
        size, output = num_bytes(sent), num_bytes(received)
        dtype = sent[0].dtype if sent else ""
        if not size and args:  # newer device files tell what the host trace may lack
            itemsize = ITEMSIZES.get(args.dtype, 1)
            size = args.num_sent * itemsize
            output = args.num_received * itemsize
        if group.name is not None:
            attrs = {**attrs, "pg_name": group.name}
        return self.builder.collective(
            name,
            comm_type=kind,
            ranks=group.ranks,
            num_bytes=size,
            output_bytes=output,
            dtype=dtype,
            reduction=reduction,
            axis=self.notes.axis_of(group.ranks),
            reads=self.storages.regions(sent),
            writes=self.storages.regions(received),
            after=after,
            **attrs,
        )

    def _message(self, op: Op, name: str, after: list[int], attrs: dict[str, Any]) -> int:
        refs = op.inputs[0]
        peer, tag = int(op.scalars[2]), int(op.scalars[3])
        source, destination = (self.notes.rank, peer) if name == "send" else (peer, self.notes.rank)
        scope = next((outer.name for outer in self._chain(op.parent) if outer.name.startswith(MESSAGE)), None)
        if scope is not None:
            source, destination = (int(end) for end in scope.removeprefix(MESSAGE).split(">"))
        elif any(len(ranks) < self.notes.world_size for ranks in self.notes.groups.values()):
            self._warn_once(
                "messages: their peers are counted in their groups, which the files do not name; taken as ranks"
            )
        places = self.storages.regions(refs)
        return self.builder.message(
            op.name,
            source=source,
            destination=destination,
            tag=tag,
            num_bytes=num_bytes(refs),
            dtype=refs[0].dtype if refs else "",
            comm_axis=self.notes.axis_of([source, destination]),
            reads=places if name == "send" else (),
            writes=() if name == "send" else places,
            after=after,
            **attrs,
        )

    def _warn_once(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


def _name(item: int | Launched | Launch, ops: Sequence[Op]) -> str:
    """What the op, kernel or call is called."""
    if isinstance(item, int):
        return ops[item].name
    return item.kernel.name if isinstance(item, Launched) else item.name
