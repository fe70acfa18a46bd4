"""Which plan is best: every plan that can be, priced in closed form, without those that do not fit. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from meshloom.errors import HardwareError, PlanError
from meshloom.hardware.cluster import Cluster
from meshloom.plan import Plan, Recompute
from meshloom.simulate.memory import Memory, predict_memory
from meshloom.simulate.shape import Job, Shape
from meshloom.simulate.stack import STACKS, Stack
from meshloom.simulate.step import Step, predict_step

_MICRO_BATCHES = (1, 2, 4, 8, 16)
_CHUNKS = (1, 2, 3, 4, 5, 6, 8)


class Choice(NamedTuple):
    """A plan that fits, and what it would take."""

    job: Job
    step: Step
    memory: Memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """Plans from the fastest on, how many were priced, and how many of them did not fit."""

    choices: list[Choice]
    num_priced: int
    num_too_large: int

    def pareto(self) -> list[Choice]:
        """Those that no other beats in both time and memory, from the fastest on."""
        best, found = float("inf"), []
        for choice in self.choices:
            if choice.memory.reserved_bytes < best:
                best = choice.memory.reserved_bytes
                found.append(choice)
        return found


def advise(
    shape: Shape, cluster: Cluster, *, global_batch: int, seq_length: int, memory_bytes: float = 0.0,
    dtype: str = "bfloat16", stack: Stack = STACKS["megatron-core"],
) -> Advice:  # fmt: skip
    """Price every plan of `plans` on all devices of `cluster`; `memory_bytes` stands in for the device's.

    Raises PlanError if no plan fits, saying what the smallest would need.
    """
    room = memory_bytes or cluster.device.memory_bytes
    choices: list[Choice] = []
    priced = too_large = 0
    smallest = float("inf")
    for job in jobs(shape, cluster, global_batch=global_batch, seq_length=seq_length, dtype=dtype, stack=stack):
        priced += 1
        memory = predict_memory(job)
        smallest = min(smallest, memory.reserved_bytes)
        if memory.reserved_bytes > room:
            too_large += 1
            continue
        choices.append(Choice(job, predict_step(job), memory))
    if not choices:
        if not priced:
            raise PlanError(
                f"no plan cuts {shape.num_heads} heads, {shape.num_layers} layers and {global_batch} sequences over "
                f"{cluster.num_devices} devices; expected a global batch that they divide"
            )
        raise PlanError(
            f"none of {priced} plans fits {room / 1e9:.0f} GB a device, the smallest needs {smallest / 1e9:.0f} GB; "
            "use more devices or a smaller model"
        )
    choices.sort(key=lambda choice: (choice.step.step_s, choice.memory.reserved_bytes))
    return Advice(choices=choices, num_priced=priced, num_too_large=too_large)


def jobs(
    shape: Shape, cluster: Cluster, *, global_batch: int, seq_length: int, dtype: str, stack: Stack
) -> Iterator[Job]:
    """Every plan of tp (inside a host), pp, dp, micro-batch, chunks, ZeRO-1 and recomputation that divides evenly."""
    for plan, micro_batch in plans(shape, cluster, global_batch):
        for recompute in ("none", "selective", "full"):
            for zero in (0, 1) if plan.dp > 1 else (0,):
                job = Job(
                    shape=shape,
                    plan=_with(plan, global_batch // (plan.dp * micro_batch), recompute),
                    cluster=cluster,
                    stack=stack,
                    seq_length=seq_length,
                    global_batch=global_batch,
                    zero_stage=zero,
                    dtype=dtype,
                )
                try:
                    job.check()
                except (PlanError, HardwareError):  # what does not divide is no plan
                    continue
                yield job


def plans(shape: Shape, cluster: Cluster, global_batch: int) -> Iterator[tuple[Plan, int]]:
    """Degrees on all devices, with chunks a rank, and the micro-batch of each."""
    devices = cluster.num_devices
    for tp in _divisors(cluster.devices_per_host):
        shares = shape.num_kv_heads % tp and tp % shape.num_kv_heads
        if shape.num_heads % tp or any(width % tp for width in shape.cut_widths) or shares:
            continue
        for pp in _divisors(devices // tp):
            dp = devices // tp // pp
            if pp > shape.num_layers or shape.num_layers % pp or global_batch % dp:
                continue
            for micro_batch in _MICRO_BATCHES:
                count, rest = divmod(global_batch // dp, micro_batch)
                if rest or not count:
                    continue
                for chunks in _CHUNKS if pp > 1 else (1,):
                    if shape.num_layers % (pp * chunks) or (chunks > 1 and count % pp):
                        continue
                    schedule = "interleaved" if chunks > 1 else "1f1b"
                    yield (
                        Plan(
                            tp=tp, pp=pp, dp=dp, sequence_parallel=tp > 1, virtual_stages=chunks,
                            schedule=schedule,  # type: ignore[arg-type]
                        ),
                        micro_batch,
                    )  # fmt: skip


def _with(plan: Plan, count: int, recompute: Recompute) -> Plan:
    return Plan(
        tp=plan.tp, cp=plan.cp, dp=plan.dp, pp=plan.pp, sequence_parallel=plan.sequence_parallel,
        schedule=plan.schedule, virtual_stages=plan.virtual_stages, num_micro_batches=count, recompute=recompute,
    )  # fmt: skip


def _divisors(number: int) -> Sequence[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
