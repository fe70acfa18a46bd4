"""The file of a role as one run of bytes: parts encoded once, stamped out, and changed in place for each rank.

Ids and dependencies are varints of one width, so that a part's bytes are the same wherever it stands but for numbers at
known places; the wire format lets a varint have more bytes than it needs. Groups' names have ten digits, and ranks the
same width, so that the files of one role have one length. No torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from meshloom.chakra.attribute import AttributeEncoder, varint
from meshloom.chakra.build import group_id
from meshloom.chakra.trace import NodeType
from meshloom.chakra.wire import ATTR_FIELD, StoredNodes
from meshloom.plan import Plan
from meshloom.synth.parts import HERE, Captured, Group, Line, Message, NotAlike, Part, Source, parts_of, source_part
from meshloom.synth.wide import CONTROL, DATA, ID, NAME, TYPE, Bytes, Numbers, fill, wide, wide_all, width_for

_INT32, _INT64_LIST, _STRING = b"\x38", b"\x52", b"\xea\x01"  # values of an AttributeProto
_GROUP_DIGITS = 10

Places = dict[Any, tuple[list[int], list[int]]]


class _Peers(NamedTuple):
    """The two ends of messages, as places on the pipeline."""

    source: int
    destination: int


class _Mould(NamedTuple):
    """A part's bytes with what must be filled in: at each `at` the number `offset` more than the base `reference`."""

    data: Bytes
    at: Numbers
    offset: Numbers
    reference: Numbers
    ends: Numbers  # of each node, with its length before it
    heads: Numbers  # bytes of that length
    groups: Places  # where names and rank lists stand
    peers: Places  # where senders and receivers stand


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """The nodes of a role's trace in the bytes of its file, and where what differs between its ranks stands in them."""

    plan: Plan
    data: Bytes
    width: int
    begins: Numbers  # of each node's message
    ends: Numbers
    groups: dict[Group, tuple[Numbers, Numbers]]
    peers: dict[_Peers, tuple[Numbers, Numbers]]
    peak_bytes: int  # with what was there before

    @property
    def num_nodes(self) -> int:
        """How many nodes the trace has."""
        return len(self.ends)

    def turn_to(self, rank: int) -> Bytes:
        """The bytes as they are on `rank`, which must have this role; the same memory each time."""
        where = self.plan.coordinate(rank)
        for group, (names, lists) in self.groups.items():
            ranks = [self.plan.rank(**{**where, group.axis: place}) for place in group.places]
            name = group_id(ranks, self.plan.world_size).encode()
            _put(self.data, names, np.frombuffer(name, np.uint8))
            _put(self.data, lists, np.frombuffer(wide_all(ranks, self.width), np.uint8))
        for peers, (sources, destinations) in self.peers.items():
            for places, at in zip(peers, (sources, destinations), strict=True):
                other = self.plan.rank(**{**where, "pp": places})
                _put(self.data, at, np.frombuffer(wide(other, self.width), np.uint8))
        return self.data

    def nodes(self, rank: int) -> StoredNodes:
        """The nodes of `rank`, in memory of their own."""
        return StoredNodes(self.turn_to(rank).tobytes(), zip(self.begins.tolist(), self.ends.tolist()))


class Carry(NamedTuple):
    """From what was captured to the plan: the group that stands in the place of a group, and the path that a module of
    stage number `chunk` of the rank has."""

    group: Callable[[Group], Group]
    module: Callable[[str, int], str]


def stamp(step: Captured, plan: Plan, place: int, standing: Sequence[int], carry: Carry) -> Image:
    """The step on the ranks at `place` of `plan`'s pipeline: each part as the captured one that stands for it.

    `standing` names that one for each micro-batch. `step` may come from a plan with fewer stages of which its own place
    is like this one, and fewer data-parallel ranks; `carry` then gives groups and modules their names. Raises
    NotAlike where it cannot be carried over.
    """
    parts = parts_of(plan, place)
    model = {part: part.standing(standing) for part in parts}
    counts = [len(step.parts[model[part]]) for part in parts]
    firsts = dict(zip(parts, (1 + np.cumsum([0, *counts[:-1]])).tolist()))
    most = max(sum(counts) + 1, plan.world_size, plan.pp * plan.virtual_stages * plan.num_micro_batches * 16 + 16)
    press = _Press(step, plan, place, carry, width=width_for(most))
    lanes: dict[Hashable, int] = {}
    pressed = [press.part(part, model[part], firsts, lanes) for part in parts]
    return _joined(step, plan, press.width, [model[part] for part in parts], pressed)


def _joined(
    step: Captured, plan: Plan, width: int, parts: Sequence[Part], pressed: Sequence[tuple[_Mould, Numbers]]
) -> Image:
    """The moulds one after the other, each with its numbers, which count from its bases."""
    moulds = [mould for mould, _ in pressed]
    bounds = np.cumsum([0, *(len(mould.data) for mould in moulds)])
    data, offsets = np.empty(bounds[-1], np.uint8), bounds[:-1]
    for (mould, bases), begin, end in zip(pressed, bounds, bounds[1:]):
        piece = data[begin:end]
        piece[:] = mould.data
        fill(piece, mould.at, mould.offset + bases[mould.reference], width)
    ends = np.concatenate([mould.ends + offset for mould, offset in zip(moulds, offsets)])
    starts = np.concatenate(([0], ends[:-1]))
    tables: list[dict[Any, tuple[list[Numbers], list[Numbers]]]] = []
    for name in ("groups", "peers"):
        table: dict[Any, tuple[list[Numbers], list[Numbers]]] = defaultdict(lambda: ([], []))
        for mould, offset in zip(moulds, offsets):
            for key, (first, second) in getattr(mould, name).items():
                table[key][0].append(np.asarray(first, np.int64) + offset)
                table[key][1].append(np.asarray(second, np.int64) + offset)
        tables.append(table)
    groups, peers = (
        {key: (np.concatenate(first), np.concatenate(second)) for key, (first, second) in table.items()}
        for table in tables
    )
    return Image(
        plan=plan,
        data=data,
        width=width,
        begins=starts + np.concatenate([mould.heads for mould in moulds]),
        ends=ends,
        groups=groups,
        peers=peers,
        peak_bytes=peak_bytes(step, plan, parts),
    )


def held_bytes(step: Captured, plan: Plan) -> int:
    """Bytes that live before a step of `plan`."""
    return step.held_bytes + plan.num_micro_batches * step.batch_bytes


def peak_bytes(step: Captured, plan: Plan, parts: Sequence[Part]) -> int:
    """The most bytes that live at one time, if the parts run in this order."""
    known: dict[Part, tuple[int, int]] = {}  # what a part adds, and the most that it adds on its way
    live = most = 0
    for part in parts:
        if part not in known:
            added = highest = 0
            for line in step.parts[part]:
                added += line.node.attrs.get("memory_allocated", 0)
                highest = max(highest, added)
                added -= line.node.attrs.get("memory_released", 0)
            known[part] = added, highest
        added, highest = known[part]
        most = max(most, live + highest)
        live += added
    return held_bytes(step, plan) + most


class _Press:
    """Makes moulds of parts, and keeps them."""

    def __init__(self, step: Captured, plan: Plan, place: int, carry: Carry, *, width: int) -> None:
        self.width = width
        self._step, self._plan, self._place, self._carry = step, plan, place, carry
        self._encoder = AttributeEncoder(ATTR_FIELD)
        self._moulds: dict[Any, _Mould] = {}
        self._sources: dict[Part, list[Source]] = {}  # what its nodes need outside of it; HERE comes first
        self._tags: dict[Part, list[Message]] = {}
        self._ends: dict[Part, tuple[dict[Hashable, int], dict[Hashable, int]]] = {}  # lane -> first, last node

    def part(
        self, part: Part, model: Part, firsts: dict[Part, int], lanes: dict[Hashable, int]
    ) -> tuple[_Mould, Numbers]:
        """The mould of `part`, which is as `model` was captured, and the bases of its numbers; moves `lanes` on."""
        self._learn(model)
        lines, first = self._step.parts[model], firsts[part]
        bases = []
        for source in self._sources[model]:
            needed = source_part(part, source, self._plan.num_micro_batches)
            if needed not in firsts:
                raise NotAlike(f"{part} needs what {needed} did, which is no part of the step")
            bases.append(firsts[needed])
        stage = part.chunk * self._plan.pp + self._place
        for message in self._tags[model]:
            number = (stage + message.stage) * self._plan.num_micro_batches + part.micro_batch
            bases.append(number * 16 + message.place)
        begins, ends = self._ends[model]
        before = []
        for lane, index in begins.items():
            previous = lanes.get(lane, 0)
            known = any(
                bases[self._sources[model].index(source)] + number == previous for source, number in lines[index].data
            )
            before.append(bool(previous) and not known)
            bases.append(previous)
        for lane, index in ends.items():
            lanes[lane] = first + index
        key = model, tuple(before)
        if key not in self._moulds:
            self._moulds[key] = self._mould(model, dict(zip(begins.values(), before)))
        return self._moulds[key], np.asarray(bases, np.int64)

    def _learn(self, model: Part) -> None:
        if model in self._sources:
            return
        lines = self._step.parts[model]
        self._sources[model] = list(dict.fromkeys([HERE, *(source for line in lines for source, _ in line.data)]))
        self._tags[model] = list(dict.fromkeys(line.message for line in lines if line.message is not None))
        first: dict[Hashable, int] = {}
        last: dict[Hashable, int] = {}
        for index, line in enumerate(lines):
            first.setdefault(line.lane, index)
            last[line.lane] = index
        self._ends[model] = first, last

    def _mould(self, model: Part, before: dict[int, bool]) -> _Mould:
        """The part's bytes; `before` tells of the first node of each lane whether it needs the one before."""
        sources = {source: number for number, source in enumerate(self._sources[model])}
        tags = {message: len(sources) + number for number, message in enumerate(self._tags[model])}
        clay = _Clay(self.width, self._plan.world_size)
        lanes: dict[Hashable, int] = {}
        for index, line in enumerate(self._step.parts[model]):
            clay.begin(line.node.name, int(line.node.type), index)
            data = [(number, sources[source]) for source, number in line.data]
            control: list[tuple[int, int]] = []
            if line.lane in lanes:
                control = [(lanes[line.lane], 0)]
            elif before[index]:
                control = [(0, len(sources) + len(tags) + list(before).index(index))]
            lanes[line.lane] = index
            clay.needs(CONTROL, [need for need in control if need not in data])
            clay.needs(DATA, data)
            attrs = line.node.attrs
            if "module" in attrs:
                attrs = {**attrs, "module": self._carry.module(attrs["module"], model.chunk)}
            clay.body += self._encoder.all(attrs)
            if line.group is not None:
                clay.group(self._carry.group(line.group))
            if line.message is not None:
                clay.message(self._peers(line, line.message), tags[line.message])
            clay.end()
        return clay.mould()

    def _peers(self, line: Line, message: Message) -> _Peers:
        other = (self._place + message.step) % self._plan.pp
        sends = line.node.type is NodeType.COMM_SEND
        return _Peers(self._place, other) if sends else _Peers(other, self._place)


class _Clay:
    """A mould that is being made, node by node; `body` is the message of the one that began last."""

    def __init__(self, width: int, world_size: int) -> None:
        self._width, self._world_size = width, world_size
        self._out = bytearray()
        self._slots: list[tuple[int, int, int]] = []
        self._ends: list[tuple[int, int]] = []
        self._tables: tuple[Places, Places] = ({}, {})
        self.body = bytearray()
        self._mine: list[tuple[int, int, int]] = []  # slots of the body
        self._ours: list[tuple[int, Any, int, int]] = []  # table, key, which of its lists, place in the body

    def begin(self, name: str, kind: int, index: int) -> None:
        """A node begins, number `index` of its part."""
        self.body, self._mine, self._ours = bytearray(ID), [], []
        self._wide(index, 0)
        self.body += NAME + varint(len(name.encode())) + name.encode()
        self.body += TYPE + varint(kind) if kind else b""

    def needs(self, tag: bytes, needs: Sequence[tuple[int, int]]) -> None:
        """Its dependencies of one kind."""
        if needs:
            self.body += tag + varint(len(needs) * self._width)
            for offset, reference in needs:
                self._wide(offset, reference)

    def group(self, group: Group) -> None:
        """The group of a collective."""
        digits = 1 if len(group.places) == self._world_size else _GROUP_DIGITS
        self.body += _attribute("pg_name", _STRING + varint(digits) + bytes(digits))
        self._ours.append((0, group, 0, len(self.body) - digits))
        size = len(group.places) * self._width
        packed = b"\x0a" + varint(size) + bytes(size)
        self.body += _attribute("comm_ranks", _INT64_LIST + varint(len(packed)) + packed)
        self._ours.append((0, group, 1, len(self.body) - size))

    def message(self, peers: _Peers, tag: int) -> None:
        """The ends of a message, and the base of its tag."""
        for number, name in enumerate(("comm_src", "comm_dst")):
            self.body += _attribute(name, _INT32 + bytes(self._width))
            self._ours.append((1, peers, number, len(self.body) - self._width))
        self.body += _attribute("comm_tag", _INT32 + bytes(self._width))
        self._mine.append((len(self.body) - self._width, 0, tag))

    def end(self) -> None:
        """The node is whole."""
        head = varint(len(self.body))
        shift = len(self._out) + len(head)
        self._slots += [(shift + at, offset, reference) for at, offset, reference in self._mine]
        for table, key, number, at in self._ours:
            self._tables[table].setdefault(key, ([], []))[number].append(shift + at)
        self._out += head + self.body
        self._ends.append((len(self._out), len(head)))

    def mould(self) -> _Mould:
        """All of it."""
        slots = np.array(self._slots, np.int64).reshape(-1, 3)
        ends = np.array(self._ends, np.int64).reshape(-1, 2)
        data = np.frombuffer(bytes(self._out), np.uint8)
        groups, peers = self._tables
        return _Mould(data, slots[:, 0], slots[:, 1], slots[:, 2], ends[:, 0], ends[:, 1], groups, peers)

    def _wide(self, offset: int, reference: int) -> None:
        self._mine.append((len(self.body), offset, reference))
        self.body += bytes(self._width)


def _attribute(name: str, value: bytes) -> bytes:
    body = b"\x0a" + varint(len(name)) + name.encode() + value
    return bytes([ATTR_FIELD << 3 | 2]) + varint(len(body)) + body


def _put(data: Bytes, places: Numbers, text: Bytes) -> None:
    """Write `text` at each place."""
    data[places[:, None] + np.arange(len(text))] = text
