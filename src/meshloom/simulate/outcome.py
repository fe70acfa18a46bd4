"""What a predicted step comes to: where each rank's time goes, what holds the step up, memory, tokens, MFU. No torch.

Facts that traces do not carry are named in `unknown` and never made up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from meshloom.chakra.path import critical_path
from meshloom.chakra.timeline import Timeline
from meshloom.chakra.trace import Node, Trace
from meshloom.errors import UsageError
from meshloom.hardware.cluster import Cluster
from meshloom.simulate.change import Change
from meshloom.simulate.engine import on_device, play, prepare, timeline_of
from meshloom.simulate.program import COMMUNICATION, COMPUTE, Durations, Program

_POINTS = 1500  # of a memory curve: more than a screen has pixels


class Rank(NamedTuple):
    """Where a rank's time goes, in ns: the first four sum to the step.

    `exposed_communication_ns` is what computation does not cover of `communication_ns`; `bubble_ns` waits for a
    message of another pipeline stage, or for other stages after its last; `idle_ns` is all other waiting.
    """

    rank: int
    compute_ns: int
    exposed_communication_ns: int
    bubble_ns: int
    idle_ns: int
    communication_ns: int


class OnPath(NamedTuple):
    """An op on the critical path, and how long nothing on the path ran before it."""

    rank: int
    node: int
    name: str
    kind: str
    start_ns: int
    duration_ns: int
    waited_ns: int


class Usage(NamedTuple):
    """Memory in bytes of ranks that do the same: before the step, at the peak and when that is, and the curve
    [(ns, bytes)]."""

    ranks: list[int]
    held_bytes: int
    peak_bytes: int
    peak_at_ns: int
    curve: list[tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A predicted step. `ranks`, `memory` and `path` are of the ranks that have traces, one of each pipeline stage for
    a model without traces; `world_size` counts all. What is None cannot be told, and `unknown` says why.

    `mfu` counts three forward passes' products (Chowdhery et al. 2022, appendix B), `hfu` every product that runs.
    """

    timeline: Timeline
    world_size: int
    ranks: list[Rank]
    path: list[OnPath]
    memory: list[Usage]
    capacity_bytes: int
    tokens_per_second: float | None = None
    mfu: float | None = None
    hfu: float | None = None
    unknown: tuple[str, ...] = ()

    @property
    def step_ns(self) -> int:
        """How long the step takes."""
        return self.timeline.makespan_ns

    @property
    def fullest(self) -> Usage | None:
        """The rank with the highest peak."""
        return max(self.memory, key=lambda usage: usage.peak_bytes, default=None)


class Played(NamedTuple):
    """A program with its times; `name_of` and `node_of` tell a node's name and id, `is_message` which cross stages."""

    program: Program
    starts: Sequence[int]
    ends: Sequence[int]
    name_of: Callable[[int], str]
    node_of: Callable[[int], int]
    is_message: Callable[[int], bool]
    shown: Callable[[int], bool]


def predict(
    traces: Mapping[int, Trace],
    cluster: Cluster,
    *,
    durations: Durations = "model",
    wanted: Change | None = None,
    num_tokens: int | None = None,
) -> Outcome:
    """What the step of `traces` comes to on `cluster`; `num_tokens` of the whole step, where the traces do not tell.

    Raises what `simulate` raises, UsageError if `num_tokens` contradicts the traces.
    """
    program = prepare(traces, cluster, durations=durations, wanted=wanted)
    starts, ends = play(program)
    nodes = program.nodes
    played = Played(
        program, starts, ends, lambda number: nodes[number].name, lambda number: nodes[number].id,
        lambda number: nodes[number].get("comm_src") is not None, lambda number: on_device(program, number),
    )  # fmt: skip
    timeline = timeline_of(program, starts, ends, cluster=cluster, world_size=len(traces))
    world = max((int(trace.get("world_size", 0)) for trace in traces.values()), default=0) or len(traces)
    unknown: list[str] = []
    if world > len(traces) and not any(trace.get("role_size") for trace in traces.values()):
        unknown.append(f"{world - len(traces)} of {world} ranks have no trace: nothing waits for them")
    memory = [usage for usage in _memory(played, traces) if usage is not None]
    if not memory:
        unknown.append("memory: the traces do not say what ops allocate (those of `meshloom synth` do)")
    tokens = _tokens(traces, num_tokens)
    num_steps = max((int(trace.get("num_steps", 1)) for trace in traces.values()), default=1)
    tokens = tokens * num_steps if tokens else None
    if tokens is None:
        unknown.append("tokens/s: the traces do not say how many tokens a step has; give --tokens")
    model_flops, all_flops, dtype = _flops(program, traces)
    peak = cluster.device.flops_per_second.get(dtype, 0.0) * _represented(traces)
    seconds = timeline.makespan_ns / 1e9
    if not (all_flops and peak and seconds):
        unknown.append("MFU: the traces hold no products with FLOPs and dtype")
    elif not model_flops:
        unknown.append("MFU: the traces name no forward pass, so all products count (HFU)")
    known = bool(peak and seconds)
    return Outcome(
        timeline=timeline,
        world_size=world,
        ranks=shares_of(played),
        path=path_of(played),
        memory=memory,
        capacity_bytes=cluster.device.memory_bytes,
        tokens_per_second=tokens / seconds if tokens and seconds else None,
        mfu=model_flops / seconds / peak if known and model_flops else None,
        hfu=all_flops / seconds / peak if known and all_flops else None,
        unknown=tuple(unknown),
    )


def shares_of(played: Played) -> list[Rank]:
    """Where the time of each rank goes, by rank."""
    program, starts, ends = played.program, played.starts, played.ends
    by_role: list[list[int]] = [[] for _ in program.roles]
    for number, owner in enumerate(program.owner):
        if ends[number] > starts[number] and played.shown(number):
            by_role[owner].append(number)
    whole = max(ends, default=0)
    late = _waits_for_messages(played)
    found = []
    for ranks, numbers in zip(program.roles, by_role, strict=True):
        numbers.sort(key=starts.__getitem__)
        compute = _covered(played, [number for number in numbers if program.kind[number] != COMMUNICATION])
        communication = _covered(played, [number for number in numbers if program.kind[number] == COMMUNICATION])
        bubble = busy = reached = 0
        for number in numbers:
            if starts[number] > reached and number in late:
                bubble += starts[number] - reached
            busy += max(0, ends[number] - max(reached, starts[number]))
            reached = max(reached, ends[number])
        if any(played.is_message(number) for number in numbers):
            bubble += whole - reached
        found += [Rank(rank, compute, busy - compute, bubble, whole - busy - bubble, communication) for rank in ranks]
    return sorted(found)


def _waits_for_messages(played: Played) -> set[int]:
    """Messages, and what needs one of another rank: what they wait for is another stage."""
    program = played.program
    late = set()
    for number in range(len(program.owner)):
        if played.is_message(number):
            late.add(number)
            late.update(each for each in program.needed_by[number])
    return late


def _covered(played: Played, numbers: Sequence[int]) -> int:
    covered = reached = 0
    for number in numbers:  # by start
        covered += max(0, played.ends[number] - max(reached, played.starts[number]))
        reached = max(reached, played.ends[number])
    return covered


def path_of(played: Played) -> list[OnPath]:
    """The critical path: what the step would be shorter without, in order of time. What takes no time is left out."""
    program, starts, ends = played.program, played.starts, played.ends
    if not ends:
        return []
    needs: list[list[int]] = [[] for _ in ends]
    for number, followers in enumerate(program.needed_by):
        for follower in followers:
            needs[follower].append(number)
    order = sorted(range(len(ends)), key=lambda number: (starts[number], ends[number]))
    last: dict[tuple[int, int], int] = {}
    for number in order:  # a role computes one op at a time, and its port carries one communication at a time
        place = program.owner[number], program.kind[number]
        if program.kind[number] in (COMPUTE, COMMUNICATION) and ends[number] > starts[number]:
            if place in last:
                needs[number].append(last[place])
            last[place] = number
    met: dict[int, list[int]] = defaultdict(list)
    for number, place_ in enumerate(program.meeting):
        if place_ >= 0:
            met[place_].append(number)
    chain = critical_path(
        starts,
        ends,
        max(range(len(ends)), key=lambda number: (ends[number], number)),
        needs=needs.__getitem__,
        meets=lambda number: met[program.meeting[number]] if program.meeting[number] >= 0 else (number,),
    )
    found, waited = [], 0
    for number, before_ns in chain:
        waited += before_ns
        if ends[number] > starts[number]:
            kind = "communication" if program.kind[number] == COMMUNICATION else "compute"
            rank = program.roles[program.owner[number]][0]
            length = ends[number] - starts[number]
            found.append(
                OnPath(rank, played.node_of(number), played.name_of(number), kind, starts[number], length, waited)
            )
            waited = 0
    return found


def path_parts(path: Sequence[OnPath]) -> dict[str, int]:
    """Nanoseconds of the path by what they were; where two overlap the later counts for the rest."""
    parts = {"compute": 0, "communication": 0, "waiting": 0}
    reached = 0
    for op in path:
        parts["waiting"] += op.waited_ns
        parts[op.kind] += max(0, op.start_ns + op.duration_ns - max(reached, op.start_ns))
        reached = max(reached, op.start_ns + op.duration_ns)
    return parts


def path_ops(path: Sequence[OnPath]) -> list[tuple[str, str, int, int]]:
    """(name, kind, how many, ns) of the ops on the path, longest first."""
    table: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for op in path:
        table[op.name, op.kind][0] += 1
        table[op.name, op.kind][1] += op.duration_ns
    rows = [(name, kind, count, time_ns) for (name, kind), (count, time_ns) in table.items()]
    return sorted(rows, key=lambda row: (-row[3], row[0]))


def _memory(played: Played, traces: Mapping[int, Trace]) -> list[Usage | None]:
    """Memory of each role: what lived before the step, what ops allocate when they start and let go
    of when they end."""
    program = played.program
    changes: list[list[tuple[int, int]]] = [[] for _ in program.roles]
    for number, node in enumerate(program.nodes):
        allocated, released = int(node.get("memory_allocated", 0)), int(node.get("memory_released", 0))
        mine = changes[program.owner[number]]
        if allocated:
            mine.append((played.starts[number], allocated))
        if released:
            mine.append((played.ends[number], -released))
    return [
        usage_of(ranks, int(traces[ranks[0]].get("memory_held", 0)), mine)
        if mine or traces[ranks[0]].get("memory_held") is not None
        else None
        for ranks, mine in zip(program.roles, changes, strict=True)
    ]


def usage_of(ranks: list[int], held_bytes: int, changes: list[tuple[int, int]]) -> Usage:
    """Memory of ranks from what it holds and its changes [(ns, bytes)]; at one time releases come first."""
    changes.sort()
    alive = peak = held_bytes
    peak_at = 0
    curve = [(0, held_bytes)]
    for when, change in changes:
        alive += change
        if alive > peak:
            peak, peak_at = alive, when
        if curve[-1][0] == when:
            curve[-1] = (when, alive)
        else:
            curve.append((when, alive))
    return Usage(ranks, held_bytes, peak, peak_at, _thinned(curve))


def _thinned(curve: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """At most about 1,500 points: the highest of each equal stretch of time, and the last."""
    if len(curve) <= _POINTS:
        return curve
    end = max(1, curve[-1][0])
    best: dict[int, tuple[int, int]] = {}
    for when, value in curve[:-1]:
        slot = when * _POINTS // end
        if slot not in best or value > best[slot][1]:
            best[slot] = (when, value)
    return [*best.values(), curve[-1]]


def _tokens(traces: Mapping[int, Trace], given: int | None) -> int | None:
    told = next((int(trace.get("num_tokens")) for trace in traces.values() if trace.get("num_tokens")), None)
    if given is not None and told is not None and given != told:
        raise UsageError(f"--tokens {given}: the traces are of a step of {told} tokens; leave it out")
    return given or told


def _represented(traces: Mapping[int, Trace]) -> int:
    """How many ranks the traces stand for."""
    return sum(int(trace.get("role_size", 0)) or 1 for trace in traces.values())


def _flops(program: Program, traces: Mapping[int, Trace]) -> tuple[float, float, str]:
    """(FLOPs that the model asks for, FLOPs that run, the dtype of most of them) on the ranks that traces stand for.

    A forward pass counts three times where there is a backward pass, once where there is none; recomputation counts
    as run, not as asked for.
    """
    forward = whole = 0.0
    trains = False
    dtypes: dict[str, float] = defaultdict(float)
    for number, node in enumerate(program.nodes):
        if node.get("op_class") not in ("gemm", "attention"):
            continue
        ranks = program.roles[program.owner[number]]
        flops = _real_flops(node) * sum(int(traces[rank].get("role_size", 0)) or 1 for rank in ranks)
        whole += flops
        dtypes[str(node.get("dtype", ""))] += flops
        phase = node.get("phase")
        forward += flops if phase == "forward" else 0.0
        trains = trains or phase == "backward"
    return forward * (3 if trains else 1), whole, max(dtypes, key=dtypes.__getitem__, default="")


def _real_flops(node: Node) -> int:
    flops = int(node.get("num_ops", 0))
    return flops if flops > 1 else 0  # 1 stands for none
