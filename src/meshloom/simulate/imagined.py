"""A step event by event from a model's dims and a plan, without a trace: one role a pipeline stage. No torch.

The parts of `layer` in the order of the plan's schedule, messages between stages, gradients and update at the end: what
`step` sums up in closed form, played out. Ranks of a stage do the same, so cost follows stages, not ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from meshloom.chakra.file import paused_collection
from meshloom.chakra.timeline import Span, Timeline, Track
from meshloom.parallel.schedule import SCHEDULES, Action, Kind
from meshloom.simulate.engine import play
from meshloom.simulate.layer import Kernel, kernels, layer
from meshloom.simulate.memory import layer_activation_bytes, stage_memory
from meshloom.simulate.outcome import Outcome, Played, Usage, path_of, shares_of, usage_of
from meshloom.simulate.program import COMMUNICATION, COMPUTE, Program
from meshloom.simulate.shape import Job
from meshloom.simulate.step import (
    embedding_pass,
    gradient_seconds,
    layers_by_stage,
    logits_pass,
    message_between_stages,
    once_a_step,
    together,
)  # fmt: skip

_MESSAGE = "message"
_FORWARD_PART = 1 / 3  # of embedding and logits: one of three products


class _Part(NamedTuple):
    """A kernel of an action: what it is, how it runs, how long, and in which layer of the stage (-1: at the ends)."""

    name: str
    kind: int
    duration_ns: int
    layer: int


@dataclass(slots=True, kw_only=True)
class _Writer:
    """A program being written, and beside it what its nodes are: (part, action) by number."""

    program: Program
    parts: list[_Part] = field(default_factory=list)
    actions: list[Action | None] = field(default_factory=list)

    def chain(self, role: int, parts: list[_Part], after: int, action: Action | None) -> int:
        """Append nodes, each after the one before it, the first after `after` (-1: nothing); returns the last."""
        program, first, count = self.program, len(self.parts), len(parts)
        program.owner.extend([role] * count)
        program.kind.extend([part.kind for part in parts])
        program.duration_ns.extend([part.duration_ns for part in parts])
        program.lag_ns.extend([0] * count)
        program.meeting.extend([-1] * count)
        program.needed_by.extend([[number] for number in range(first + 1, first + count)])
        program.needed_by.append([])
        program.waiting.extend([1] * count)
        if after < 0:
            program.waiting[first] = 0
        else:
            program.needed_by[after].append(first)
        self.parts.extend(parts)
        self.actions.extend([action] * count)
        return first + count - 1


def imagine(job: Job) -> Program:
    """The program of one step of `job`, a role a rank of pp; raises PlanError and HardwareError like `predict_step`."""
    return _imagine(job).program


def _imagine(job: Job) -> _Writer:
    job.check()
    plan = job.plan
    writer = _Writer(program=Program(roles=[[plan.rank(pp=place)] for place in range(plan.pp)]))
    schedule = SCHEDULES[plan.schedule](plan.pp, plan.num_micro_batches, plan.virtual_stages)
    templates = _templates(job)
    last = plan.pp * plan.virtual_stages - 1
    message = _Part(_MESSAGE, COMMUNICATION, round(message_between_stages(job) * 1e9), -1)
    made: dict[Action, int] = {}  # what the next stage waits for
    late: list[tuple[int, Action]] = []  # first node of an action, and what it waits for from another stage
    closing = [
        _Part("gradients", COMMUNICATION, round(gradient_seconds(job) * 1e9), -1),
        _Part("optimizer", COMPUTE, round(once_a_step(job) * 1e9), -1),
    ]
    for role, actions in enumerate(schedule):
        tail = -1
        for action in actions:
            first = len(writer.parts)
            tail = writer.chain(role, templates[action.kind, action.stage], tail, action)
            needed = _needed(action, last)
            if needed is not None:
                late.append((first, needed))
            sent_on = action.stage < last if action.kind == "forward" else action.stage > 0 and action.kind != "weight"
            if sent_on:
                made[action] = writer.chain(role, [message], tail, action)
        writer.chain(role, closing, tail, None)
    for number, needed in late:
        writer.program.needed_by[made[needed]].append(number)
        writer.program.waiting[number] += 1
    return writer


def _templates(job: Job) -> dict[tuple[Kind, int], list[_Part]]:
    """The kernels of each kind of action on each stage."""
    forward, again, backward = kernels(job)
    one = layer(job)
    whole = one.forward + one.backward + one.recompute
    scale = together(whole.device_s, whole.host_s) / whole.device_s  # where the host is slower it stretches all
    weight = [kernel for kernel in backward if "weight gradient" in kernel.name]
    bodies: dict[Kind, list[Kernel]] = {
        "forward": forward,
        "backward": [*again, *backward],
        "input": [kernel for kernel in [*again, *backward] if kernel not in weight],
        "weight": weight,
    }
    counts = _layers_of_stages(job)
    made: dict[tuple[Kind, int], list[_Part]] = {}
    for kind, kernels_of in bodies.items():
        for stage, count in enumerate(counts):
            places = range(count) if kind == "forward" else reversed(range(count))
            body = [
                _Part(each.name, COMMUNICATION if each.communicates else COMPUTE, round(each.seconds * scale * 1e9), at)
                for at in places
                for each in kernels_of
            ]
            begin, end = _ends(job, kind, stage, len(counts) - 1)
            made[kind, stage] = [*begin, *body, *end]
    return made


def _ends(job: Job, kind: Kind, stage: int, last: int) -> tuple[list[_Part], list[_Part]]:
    """Embedding and logits, before and after the layers of an action."""
    share = {"forward": _FORWARD_PART, "backward": 1 - _FORWARD_PART}.get(kind, (1 - _FORWARD_PART) / 2)
    embedding, logits = (
        _Part(name, COMPUTE, round(seconds * share * 1e9), -1)
        for name, seconds in (
            ("embedding", embedding_pass(job).device_s),
            ("logits and loss", logits_pass(job).device_s),
        )
    )
    first, final = [embedding] if stage == 0 else [], [logits] if stage == last else []
    return (first, final) if kind == "forward" else (final, first)


def _layers_of_stages(job: Job) -> list[int]:
    """Whole layers of each stage of the schedule, as even as they go."""
    stages = job.plan.pp * job.plan.virtual_stages
    if job.stack.balanced_stages and job.plan.virtual_stages == 1:
        return [round(count) for count in layers_by_stage(job)]
    each, more = divmod(job.shape.num_layers, stages)
    return [each + (stage < more) for stage in range(stages)]


def _needed(action: Action, last: int) -> Action | None:
    """The action of another stage that this one waits for."""
    if action.kind == "forward":
        return Action("forward", action.stage - 1, action.micro_batch) if action.stage else None
    if action.kind in ("backward", "input") and action.stage < last:
        return Action(action.kind, action.stage + 1, action.micro_batch)
    return None


def simulate_job(job: Job) -> Timeline:
    """The timeline of one rank of each pipeline stage; `world_size` counts all ranks of the plan."""
    return _play(job)[1]


def _play(job: Job) -> tuple[Played, Timeline, _Writer]:
    with paused_collection():
        writer = _imagine(job)
        program, parts = writer.program, writer.parts
        starts, ends = play(program)
        spans = [
            _span(part, action, program.roles[role][0], number, starts[number], ends[number])
            for number, (part, action, role) in enumerate(zip(parts, writer.actions, program.owner, strict=True))
        ]
    timeline = Timeline(
        spans=spans, source="predicted", world_size=job.plan.world_size, makespan_ns=max(ends), cluster=job.cluster.name
    )
    played = Played(
        program, starts, ends, lambda number: parts[number].name, lambda number: number,
        lambda number: parts[number].name == _MESSAGE, lambda number: True,
    )  # fmt: skip
    return played, timeline, writer


def predict_job(job: Job) -> Outcome:
    """What a step of `job` comes to, event by event: as `outcome.predict`, of one rank of each pipeline stage."""
    played, timeline, writer = _play(job)
    seconds = timeline.makespan_ns / 1e9
    flops = job.shape.model_flops(job.seq_length) * job.global_batch
    return Outcome(
        timeline=timeline,
        world_size=job.plan.world_size,
        ranks=shares_of(played),
        path=path_of(played),
        memory=_memory(job, played, writer),
        capacity_bytes=job.cluster.device.memory_bytes,
        tokens_per_second=job.global_batch * job.seq_length / seconds,
        mfu=flops / seconds / (job.cluster.device.peak(job.dtype) * job.plan.world_size),
    )


def _memory(job: Job, played: Played, writer: _Writer) -> list[Usage]:
    """Memory of each stage: what is there between steps, and what each forward pass keeps until its backward pass."""
    plan = job.plan
    counts = _layers_of_stages(job)
    last = plan.pp * plan.virtual_stages - 1
    whole = layer_activation_bytes(replace(job, plan=replace(plan, recompute="none")))
    changes: list[list[tuple[int, int]]] = [[] for _ in range(plan.pp)]
    bounds: dict[tuple[int, Action], list[int]] = {}
    for number, (action, role) in enumerate(zip(writer.actions, played.program.owner, strict=True)):
        if action is not None and writer.parts[number].name != _MESSAGE:
            bounds.setdefault((role, action), [number, number])[1] = number
    for (role, action), (first, final) in bounds.items():
        kept = counts[action.stage] * layer_activation_bytes(job)
        if action.stage == 0:
            kept += 2 * job.tokens * job.shape.hidden_size / (plan.tp if plan.sequence_parallel else 1)
        logits = job.tokens * job.padded_vocab / plan.tp * job.stack.logit_kept_bytes if action.stage == last else 0.0
        if action.kind == "forward":
            changes[role].append((played.starts[first], round(kept + logits)))
        elif action.kind != "input":  # what the weights' gradients need is let go of last
            again = round(whole) if plan.recompute == "full" else 0  # the layer that is being recomputed
            changes[role] += [(played.starts[first], again), (played.ends[final], -round(kept + logits) - again)]
    return [
        usage_of(played.program.roles[stage], round(stage_memory(job, stage).static_bytes), mine)
        for stage, mine in enumerate(changes)
    ]


def _span(part: _Part, action: Action | None, rank: int, number: int, start: int, end: int) -> Span:
    track: Track = "communication" if part.kind == COMMUNICATION else "compute"
    phase = action.kind if action is not None else "optimizer"
    where = f"micro-batch {action.micro_batch}" if action is not None else "step"
    module = f"{where}, layer {part.layer}" if part.layer >= 0 else where
    return Span(rank, track, part.name, start, end - start, number, phase, module)
