"""Play a program against a cluster: a deterministic event heap, from nodes to a `Timeline`. No torch.

Each rank computes one op at a time and communicates one message or collective at a time; the two overlap. A
collective starts when every rank of its group that has a trace has reached it. Ties are broken by the order in which
nodes became ready, so that equal inputs give equal timelines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heappop, heappush, heappushpop

from meshloom.chakra.timeline import Span, Timeline
from meshloom.chakra.trace import Trace
from meshloom.errors import SimulationError
from meshloom.hardware.cluster import Cluster
from meshloom.simulate.change import Change, change
from meshloom.simulate.program import COMMUNICATION, COMPUTE, HOST, Durations, Program, program_of


def simulate(
    traces: Mapping[int, Trace],
    cluster: Cluster,
    *,
    durations: Durations = "model",
    fold: bool = True,
    wanted: Change | None = None,
) -> Timeline:
    """When each node would run on `cluster`, rank r on its device r.

    With `durations="measured"` nodes take the time that their trace says; with `fold` ranks that do the same are
    played once; `wanted` asks what would be if. Raises HardwareError if the cluster is too small, SimulationError if
    the traces cannot run to their end.
    """
    program = prepare(traces, cluster, durations=durations, fold=fold, wanted=wanted)
    starts, ends = play(program)
    return timeline_of(program, starts, ends, cluster=cluster, world_size=len(traces))


def prepare(
    traces: Mapping[int, Trace],
    cluster: Cluster,
    *,
    durations: Durations = "model",
    fold: bool = True,
    wanted: Change | None = None,
) -> Program:
    """The program that `simulate` plays; raises HardwareError, SimulationError."""
    cluster.check_fits(max((int(trace.get("world_size", 0)) or rank + 1 for rank, trace in traces.items()), default=1))
    program = program_of(traces, cluster, durations=durations, fold=fold)
    if wanted is not None:
        change(program, wanted)
    return program


def timeline_of(
    program: Program, starts: Sequence[int], ends: Sequence[int], *, cluster: Cluster, world_size: int
) -> Timeline:
    """The timeline of a program that was played, of all ranks of its roles."""
    spans = [
        Span(
            rank,
            "communication" if program.kind[number] == COMMUNICATION else "compute",
            node.name,
            starts[number],
            ends[number] - starts[number],
            node.id,
            node.get("phase", ""),
            node.get("module", ""),
        )
        for number, node in enumerate(program.nodes)
        if on_device(program, number)
        for rank in program.roles[program.owner[number]]
    ]
    spans.sort(key=lambda span: (span.start_ns, span.rank))
    return Timeline(
        spans=spans,
        source="predicted",
        world_size=world_size,
        makespan_ns=max(ends, default=0),
        cluster=cluster.name,
    )


def on_device(program: Program, number: int) -> bool:
    """Whether a node ran on a device: host scopes enclose others and are no work of their own."""
    if program.kind[number] == HOST:
        node = program.nodes[number]
        return bool(node.get("op_class", "memory") != "host" and not node.get("is_cpu_op"))
    return True


def play(program: Program) -> tuple[list[int], list[int]]:
    """Start and end of every node in nanoseconds; raises SimulationError where some never run.

    One event a node that takes time; nodes that take none end where they become ready.
    """
    kind, duration, lag, owner = program.kind, program.duration_ns, program.lag_ns, program.owner
    needed_by, meeting = program.needed_by, program.meeting
    waiting, count = list(program.waiting), len(program.kind)
    starts, ends, latest = [-1] * count, [-1] * count, [0] * count
    arrived: list[list[int]] = [[] for _ in program.parties]
    busy = [False] * len(program.roles)
    queues: list[list[tuple[int, int]]] = [[] for _ in program.roles]
    port_free = [0] * len(program.roles)
    events: list[tuple[int, int]] = []
    fresh: tuple[int, int] | None = None  # the newest event, mostly also the next: then the heap never sees it
    ready = [(max(0, lag[number]), number) for number in range(count) if not waiting[number]]
    ready.sort(reverse=True)
    while True:
        while ready:
            when, number = ready.pop()
            what, role = kind[number], owner[number]
            if what == COMPUTE:
                if busy[role]:
                    heappush(queues[role], (when, number))
                    continue
                busy[role] = True
            elif what == COMMUNICATION:
                place = meeting[number]
                if place >= 0:
                    starts[number] = when
                    _meet(program, number, arrived[place], starts, port_free, events)
                    continue
                when = max(when, port_free[role])  # nobody to wait for
                port_free[role] = when + duration[number]
            starts[number] = when
            if fresh is not None:
                heappush(events, fresh)
            fresh = when + duration[number], number
        if fresh is not None:
            now, number = heappushpop(events, fresh)
            fresh = None
        elif events:
            now, number = heappop(events)
        else:
            break
        ends[number] = now
        for follower in reversed(needed_by[number]):  # the last is looked at first
            latest[follower] = max(latest[follower], now)  # a measured scope ends after what it encloses began
            waiting[follower] -= 1
            if not waiting[follower]:
                ready.append((max(0, latest[follower] + lag[follower]), follower))
        if kind[number] == COMPUTE:
            busy[owner[number]] = bool(queues[owner[number]])
            if queues[owner[number]]:
                _, following = heappop(queues[owner[number]])
                starts[following] = now
                heappush(events, (now + duration[following], following))
    if -1 in ends:
        raise SimulationError(_deadlock(program, ends, arrived))
    return starts, ends


def _meet(
    program: Program,
    number: int,
    group: list[int],
    starts: list[int],
    port_free: list[int],
    events: list[tuple[int, int]],
) -> None:
    """Once all are there: a meeting begins when the last has come and all ports are free."""
    group.append(number)
    if len(group) < program.parties[program.meeting[number]]:
        return
    begin = max(max(starts[each], port_free[program.owner[each]]) for each in group)
    for each in group:
        starts[each] = begin
        port_free[program.owner[each]] = end = begin + program.duration_ns[each]
        heappush(events, (end, each))


def _deadlock(program: Program, ends: list[int], arrived: list[list[int]]) -> str:
    for place, group in enumerate(arrived):
        if group and ends[group[0]] < 0:
            number = group[0]
            node, rank = program.nodes[number], program.roles[program.owner[number]][0]
            missing = program.missing.get(place)
            if missing is None:
                here = {program.owner[each] for each in group}
                missing = next(
                    program.roles[program.owner[each]][0]
                    for each in range(len(ends))
                    if program.meeting[each] == place and program.owner[each] not in here
                )
            group_name = f"group {node.get('pg_name')}" if node.get("pg_name") is not None else "a message"
            return (
                f"deadlock: rank {rank} waits in {node.name} (node {node.id}, {group_name}) for "
                f"rank {missing}, which never reaches it; run `meshloom check`"
            )
    number = ends.index(-1)
    node, rank = program.nodes[number], program.roles[program.owner[number]][0]
    return f"rank {rank}: node {node.id} waits for a node that never ends; run `meshloom check`"
