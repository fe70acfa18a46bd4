"""A step as a sequence of parts, and what is the same in each: the proof that lets a few parts stand for many.

A part is one pass of one micro-batch through one stage, or something that runs once (the optimizer). Seen from its
part, a node depends on nodes of this part, of the part `delta` micro-batches before, or of a part that runs once. Two
parts that read alike in this way are the same, wherever they stand. No torch.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec

from meshloom.chakra.trace import Node, NodeType
from meshloom.parallel.schedule import SCHEDULES
from meshloom.plan import Axis, Plan


class NotAlike(Exception):
    """Parts that should repeat do not, for the reason that the message gives: they must be captured one by one."""


class Part(NamedTuple):
    """A pass of a micro-batch through the rank's stage number `chunk`; or, without micro-batch, what runs once."""

    kind: str
    chunk: int = 0
    micro_batch: int = -1

    @property
    def phase(self) -> str:
        """The phase that the step says it is in."""
        return _PHASES.get(self.kind, self.kind)

    def standing(self, standing: Sequence[int]) -> Part:
        """The captured part that is the same; `standing` names the micro-batch for each one."""
        return self if self.micro_batch < 0 else self._replace(micro_batch=standing[self.micro_batch])

    def __str__(self) -> str:
        return f"{self.kind} of micro-batch {self.micro_batch}" if self.micro_batch >= 0 else self.kind


_PHASES = {"start": "forward", "input": "backward", "weight": "backward", "reduce": "backward", "loss": "forward"}


def parts_of(plan: Plan, place: int) -> list[Part]:
    """The parts of a training step on the ranks at `place` of the pipeline, in their order."""
    count = plan.num_micro_batches
    if plan.pp == 1:
        passes = [Part(kind, 0, mb) for mb in range(count) for kind in ("forward", "backward")]
        return [*passes, Part("optimizer")]
    actions = SCHEDULES[plan.schedule](plan.pp, count, plan.virtual_stages)[place]
    passes = [Part(action.kind, action.stage // plan.pp, action.micro_batch) for action in actions]
    return [Part("start"), *passes, Part("reduce"), Part("loss"), Part("optimizer")]


class Source(NamedTuple):
    """Where a node stands that another needs, seen from the other's part.

    `delta`: so many micro-batches before; None: in the part that runs once; "last": of the last micro-batch, "first":
    of the first; "here": in the same part.
    """

    kind: str
    chunk: int = 0
    delta: int | str | None = None


HERE = Source("", delta="here")


class Group(NamedTuple):
    """The ranks of a collective as places on an axis; on the other axes they are where this rank is."""

    axis: Axis
    places: tuple[int, ...]


class Message(NamedTuple):
    """A send or receive: whether the other end is the next stage's rank (1) or the one before (-1); the tag is that of
    the stage `stage` after the part's own, and tensor number `place`."""

    step: int
    stage: int
    place: int


class Line(msgspec.Struct, frozen=True, gc=False):
    """A node as its part sees it. `node` has no dependencies, and no ranks if it is communication."""

    node: Node
    data: list[tuple[Source, int]]  # where, and the node's number in that part
    lane: Hashable
    group: Group | None = None
    message: Message | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """The parts of a step that was captured on the ranks at `place` of `plan`'s pipeline, each with its lines."""

    plan: Plan
    place: int
    parts: Mapping[Part, list[Line]]
    held_bytes: int  # before the step, without batches
    batch_bytes: int  # of each micro-batch


_OF_RANKS = ("comm_ranks", "pg_name", "comm_src", "comm_dst", "comm_tag")


def captured(
    nodes: Sequence[Node], marks: Sequence[tuple[str, int]], plan: Plan, rank: int, *, held_bytes: int, batch_bytes: int
) -> Captured:
    """The parts of a captured step, from its nodes and from where each phase began; raises NotAlike if it has others.

    Nodes that come before the first phase or after the last belong to that.
    """
    place = plan.coordinate(rank)["pp"]
    parts = parts_of(plan, place)
    if [part.phase for part in parts] != [phase for phase, _ in marks]:
        raise NotAlike("the step has other phases than its schedule")
    begins = [0, *(begin for _, begin in marks[1:]), len(nodes)]
    owner = [number for number, (begin, end) in enumerate(pairwise(begins)) for _ in range(end - begin)]
    lines: dict[Part, list[Line]] = {}
    for number, part in enumerate(parts):
        lines[part] = [
            _line(node, number, parts, begins, owner, plan, rank) for node in nodes[begins[number] : begins[number + 1]]
        ]
    return Captured(plan=plan, place=place, parts=lines, held_bytes=held_bytes, batch_bytes=batch_bytes)


def _line(
    node: Node, number: int, parts: Sequence[Part], begins: Sequence[int], owner: Sequence[int], plan: Plan, rank: int
) -> Line:
    data = []
    for needed in node.data_deps:  # ids count from 1
        other = owner[needed - 1]
        data.append((_source(parts[number], parts[other], plan), needed - 1 - begins[other]))
    attrs: dict[str, Any] = {name: value for name, value in node.attrs.items() if name not in _OF_RANKS}
    bare = msgspec.structs.replace(node, id=0, data_deps=[], ctrl_deps=[], attrs=attrs)
    if node.type is NodeType.COMM_COLL:
        axis: Axis = node.attrs["comm_axis"]
        group = Group(axis, tuple(plan.coordinate(other)[axis] for other in node.attrs["comm_ranks"]))
        return Line(bare, data, ("group", group), group=group)
    if node.is_comm:
        message = _message(node, parts[number], plan, rank)
        return Line(bare, data, ("message", node.type, message.step % plan.pp), message=message)
    return Line(bare, data, "compute")


def _source(mine: Part, other: Part, plan: Plan) -> Source:
    if mine == other:
        return HERE
    if other.micro_batch < 0:
        return Source(other.kind, other.chunk)
    if mine.micro_batch >= 0:
        return Source(other.kind, other.chunk, mine.micro_batch - other.micro_batch)
    if other.micro_batch == plan.num_micro_batches - 1:
        return Source(other.kind, other.chunk, "last")
    if other.micro_batch == 0:
        return Source(other.kind, other.chunk, "first")
    raise NotAlike(f"{mine} needs what {other} did")


def _message(node: Node, part: Part, plan: Plan, rank: int) -> Message:
    place = plan.coordinate(rank)["pp"]
    sends = node.type is NodeType.COMM_SEND
    peer = plan.coordinate(node.attrs["comm_dst" if sends else "comm_src"])["pp"]
    number, tensor = divmod(node.attrs["comm_tag"], 16)
    stage = number // plan.num_micro_batches - (part.chunk * plan.pp + place)
    forward = part.kind == "forward"
    # Forward passes receive from the stage before and send to the next one, backward passes the other way round.
    step = 1 if forward == sends else -1
    if (place + step) % plan.pp != peer or number % plan.num_micro_batches != part.micro_batch:
        raise NotAlike(f"{part} sends to rank {peer} of the pipeline with tag {node.attrs['comm_tag']}")
    return Message(step, stage, tensor)


def source_part(part: Part, source: Source, num_micro_batches: int) -> Part:
    """The part that `source` means, seen from `part` in a step of so many micro-batches."""
    if source.delta == "here":
        return part
    if source.delta is None:
        return Part(source.kind, source.chunk)
    if source.delta == "last":
        return Part(source.kind, source.chunk, num_micro_batches - 1)
    if source.delta == "first":
        return Part(source.kind, source.chunk, 0)
    assert isinstance(source.delta, int)
    return Part(source.kind, source.chunk, part.micro_batch - source.delta)


def enough_micro_batches(plan: Plan) -> int:
    """How many micro-batches show all that differs: the first, whose gradients are new; the second, which adds to them;
    two that must be alike; and the last where gradients are averaged while it runs backward."""
    fewest = 4 + _last_differs(plan)
    if plan.schedule == "interleaved" or plan.virtual_stages > 1:
        fewest += -fewest % plan.pp
    return min(plan.num_micro_batches, fewest)


def _last_differs(plan: Plan) -> bool:
    return plan.pp == 1 and plan.dp > 1


def standing_for(step: Captured, num_micro_batches: int) -> list[int]:
    """For each micro-batch of a step of so many: the captured one that it is the same as.

    Raises NotAlike, naming what differs, if those in the middle are not the same.
    """
    count, last = step.plan.num_micro_batches, _last_differs(step.plan)
    if num_micro_batches == count:
        return list(range(count))
    middle = range(2, count - last)
    if len(middle) < 2:
        raise NotAlike("too few micro-batches were captured to see that they repeat")
    for part, lines in step.parts.items():
        if part.micro_batch in middle:
            first = step.parts[part._replace(micro_batch=2)]
            if lines != first:
                raise NotAlike(f"{part}: {_difference(first, lines)}")
    return [0, 1, *([2] * (num_micro_batches - 2 - last)), *([count - 1] * last)]


def _difference(first: Sequence[Line], second: Sequence[Line]) -> str:
    for index, (mine, theirs) in enumerate(zip(first, second)):
        if mine != theirs:
            told = {name: (mine.node.attrs.get(name), theirs.node.attrs.get(name))
                    for name in {**mine.node.attrs, **theirs.node.attrs}
                    if mine.node.attrs.get(name) != theirs.node.attrs.get(name)}  # fmt: skip
            what = ", ".join(f"{name} {before} then {now}" for name, (before, now) in told.items())
            return f"node {index}, {theirs.node.name}, differs from micro-batch 2's {mine.node.name}" + (
                f": {what}" if what else " in what it depends on"
            )
    return f"{len(second)} nodes, the micro-batch before has {len(first)}"
