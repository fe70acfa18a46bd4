"""The time of a training step in closed form, from a model's dims, a plan and a cluster; no trace is needed. No torch.

What a rank does repeats, so a step is a few products and a pipeline: T = Σ stages + (m - 1)·slowest + what follows.
Formulas stand with their sources in docs/simulate.md; what lies outside the calibrated range is said in `warnings`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from meshloom.hardware.cluster import Spread
from meshloom.simulate.compute import gemm_seconds
from meshloom.simulate.layer import Layer, Pass, layer
from meshloom.simulate.network import collective_seconds, message_seconds
from meshloom.simulate.shape import Job

_ALIGNMENT = 8  # elements of 2 bytes that a tensor core loads at once
_JITTER = 8.0
_UNALIGNED = 3.3  # how much slower products are whose rows are not aligned


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Where a predicted step's time goes, in seconds; the parts sum to `step_s`.

    `compute_s` counts the slowest stage over all micro-batches without communication, `tensor_s` its exposed
    communication over tp (and of sharded parameters), `host_s` what the host adds where the device waits for it,
    `bubble_s` the pipeline's fill and drain, `message_s` its messages, `gradient_s` exposed communication over dp,
    `optimizer_s` the update and everything once a step.
    """

    step_s: float
    compute_s: float
    tensor_s: float
    host_s: float
    bubble_s: float
    message_s: float
    gradient_s: float
    optimizer_s: float
    model_flops: float
    tokens_per_second: float
    mfu: float
    warnings: tuple[str, ...]

    @property
    def exposed_communication_s(self) -> float:
        """Communication that computation does not hide."""
        return self.tensor_s + self.message_s + self.gradient_s

    @property
    def limit(self) -> str:
        """What to improve first: the largest part that is not computation, or computation itself."""
        parts = {
            "tensor-parallel communication": self.tensor_s,
            "the host, which launches slower than the device runs": self.host_s,
            "the pipeline bubble": self.bubble_s,
            "pipeline messages": self.message_s,
            "gradient communication": self.gradient_s,
            "the optimizer": self.optimizer_s,
        }
        name, seconds = max(parts.items(), key=lambda item: item[1])
        return name if seconds > 0.1 * self.step_s else "computation"


def predict_step(job: Job) -> Step:
    """How long a step of `job` takes.

    Raises PlanError or HardwareError where the model or the cluster cannot take the plan.
    """
    job.check()
    plan = job.plan
    one = layer(job)
    stages = _stages(job, one)
    times = [sum(together(part.device_s, part.host_s) for part in stage) + _bookkeeping(job) for stage in stages]
    slowest = max(range(len(times)), key=times.__getitem__)
    repeats = plan.num_micro_batches
    message = message_between_stages(job)
    # 1F1B: fill and drain is a pass of every other stage; interleaving divides it (Narayanan et al. 2021, section 2.2)
    bubble = (sum(times) - times[slowest]) / plan.virtual_stages
    messages = 2 * message * plan.virtual_stages * repeats + 2 * message * (plan.pp - 1) if plan.pp > 1 else 0.0
    gradient = gradient_seconds(job)
    update = once_a_step(job)
    device = stages[slowest][0] + stages[slowest][1]
    total = repeats * times[slowest] + bubble + messages + gradient + update
    flops = job.shape.model_flops(job.seq_length) * job.global_batch
    peak = job.cluster.device.peak(job.dtype) * plan.world_size
    return Step(
        step_s=total,
        compute_s=repeats * (device.device_s - device.exposed_s),
        tensor_s=repeats * device.exposed_s,
        host_s=repeats * (times[slowest] - device.device_s),
        bubble_s=bubble,
        message_s=messages,
        gradient_s=gradient,
        optimizer_s=update,
        model_flops=flops,
        tokens_per_second=job.global_batch * job.seq_length / total,
        mfu=flops / total / peak,
        warnings=_warnings(job),
    )


def together(device_s: float, host_s: float) -> float:
    """Device and host work at the same time, but which of the two waits changes from kernel to kernel, so where they
    are alike the sum of their waits is more than the larger: (d^p + h^p)^(1/p)."""
    large, small = max(device_s, host_s), min(device_s, host_s)
    return float(large * (1 + (small / large) ** _JITTER) ** (1 / _JITTER)) if large else 0.0


def layers_by_stage(job: Job) -> list[float]:
    """Layers of each stage: equal parts, or dealt by cost with the logits counted as layers (nanotron)."""
    plan, shape = job.plan, job.shape
    if not job.stack.balanced_stages or plan.pp == 1:
        return [shape.num_layers / plan.pp] * plan.pp
    head = shape.vocab_size * shape.hidden_size / shape.active_weights
    total, dealt, stage = shape.num_layers + head, [0.0] * plan.pp, 0
    for done in range(1, shape.num_layers + 1):
        dealt[stage] += 1
        if done > total * (stage + 1) / plan.pp and stage < plan.pp - 1:
            stage += 1
    return dealt


def _stages(job: Job, one: Layer) -> list[tuple[Pass, Pass]]:
    """Of each stage what its layers take for a micro-batch, and what is at the ends: embedding, logits and loss.

    The host may run ahead of the device within either, not from one to the other: the loss is waited for.
    """
    whole = one.forward + one.backward + one.recompute
    kept = one.forward + one.backward
    counts = layers_by_stage(job)
    blocked = Pass(0.0, 0.0, _blocked(job))
    layers = [whole.times(count) + blocked for count in counts]
    if job.stack.last_keeps and job.plan.pp > 1:
        layers[-1] = kept.times(counts[-1]) + blocked
    ends = [Pass(0.0, 0.0, 0.0)] * job.plan.pp
    ends[0] = embedding_pass(job)
    ends[-1] = ends[-1] + logits_pass(job)
    return list(zip(layers, ends, strict=True))


def _blocked(job: Job) -> float:
    """How long the messages of a micro-batch block the host, where they cross hosts; an inner stage has both sides."""
    plan = job.plan
    if plan.pp == 1 or _neighbours(job).num_hosts == 1:
        return 0.0
    return job.stack.transfer_ns * (2 if plan.pp == 2 else 4) * 1e-9


def _bookkeeping(job: Job) -> float:
    """What the host does alone for each micro-batch: data, loss, schedule."""
    return job.stack.micro_batch_ns * 1e-9


def logits_pass(job: Job) -> Pass:
    """Logits and loss, forward and backward: three products and the passes of cross-entropy over (tokens, V/tp)."""
    shape, plan, stack, device = job.shape, job.plan, job.stack, job.cluster.device
    tokens, hidden = job.tokens, shape.hidden_size
    vocab = job.padded_vocab // plan.tp
    products = ((1, tokens, vocab, hidden), (1, tokens, hidden, vocab), (1, vocab, hidden, tokens))
    seconds = sum(gemm_seconds(products, device, job.half, clock=device.sustained))
    if vocab % _ALIGNMENT:
        seconds *= _UNALIGNED
    speed = device.memory_bytes_per_second * device.memory_efficiency
    seconds += (tokens * vocab * stack.logit_bytes + vocab * hidden * stack.accumulate_bytes) / speed
    exposed = 0.0
    if plan.tp > 1:
        size, spread = 2.0 * tokens * hidden, job.cluster.regular_spread(plan.tp, 1)
        if plan.sequence_parallel:
            exposed = 2 * collective_seconds("all_gather", size, spread, job.cluster)
            exposed += collective_seconds("reduce_scatter", size, spread, job.cluster)
        else:
            exposed = collective_seconds("all_reduce", size, spread, job.cluster)
    host = stack.kernel_ns * 1e-9 * sum(stack.kernels) / 2
    return Pass(seconds + exposed, exposed, host)


def embedding_pass(job: Job) -> Pass:
    """Looking up (tokens, h) and its gradient: about ten bytes an element, and reducing it over tp."""
    shape, plan, device = job.shape, job.plan, job.cluster.device
    seconds = 10 * job.tokens * shape.hidden_size / (device.memory_bytes_per_second * device.memory_efficiency)
    exposed = 0.0
    if plan.tp > 1:
        spread = job.cluster.regular_spread(plan.tp, 1)
        op = "reduce_scatter" if plan.sequence_parallel else "all_reduce"
        exposed = collective_seconds(op, 2.0 * job.tokens * shape.hidden_size, spread, job.cluster)  # type: ignore[arg-type]
    return Pass(seconds + exposed, exposed, job.stack.kernel_ns * 1e-9 * 10)


def _neighbours(job: Job) -> Spread:
    plan = job.plan
    return job.cluster.regular_spread(2, plan.tp * plan.cp * plan.dp)


def message_between_stages(job: Job) -> float:
    """One activation between stages; cut over tp it goes in parts and is gathered (Narayanan et al. 2021, 4.1)."""
    plan = job.plan
    if plan.pp == 1:
        return 0.0
    size = 2.0 * job.tokens * job.shape.hidden_size
    cut = plan.sequence_parallel or job.stack.split_messages
    seconds = message_seconds(size / (plan.tp if cut else 1), _neighbours(job), job.cluster)
    if cut and not plan.sequence_parallel and plan.tp > 1:
        seconds += collective_seconds("all_gather", size, job.cluster.regular_spread(plan.tp, 1), job.cluster)
    return seconds


def rank_parameters(job: Job) -> float:
    """Parameters on a rank of the stage that holds most: its layers' part of tp and an embedding's."""
    plan, shape = job.plan, job.shape
    embedding = job.padded_vocab * shape.hidden_size / plan.tp
    copies = 1 if plan.pp > 1 or shape.tied else 2
    layers = max(layers_by_stage(job))
    return layers * shape.layer_parameters / plan.tp + copies * embedding


def gradient_seconds(job: Job) -> float:
    """Reducing gradients over dp (and gathering parameters again, ZeRO-1), as far as the last backward hides it not."""
    plan, stack = job.plan, job.stack
    if plan.dp == 1 or job.zero_stage >= 2:
        return 0.0
    spread = job.cluster.regular_spread(plan.dp, plan.tp * plan.cp)
    parameters = rank_parameters(job)
    gradients = parameters * stack.gradient_bytes
    count = max(1, ceil(gradients / stack.bucket_bytes)) if stack.bucket_bytes else 1
    op = "reduce_scatter" if job.zero_stage else "all_reduce"
    seconds = count * collective_seconds(op, gradients / count, spread, job.cluster)  # type: ignore[arg-type]
    if stack.overlap_gradients:
        seconds = max(seconds / count, seconds - layer(job).backward.device_s * max(layers_by_stage(job)))
    if job.zero_stage:
        seconds += count * collective_seconds("all_gather", 2 * parameters / count, spread, job.cluster)
    return seconds


def once_a_step(job: Job) -> float:
    """The optimizer, the gradients of tied embeddings, and what the host does alone."""
    return _update(job) + _tied(job) + job.stack.step_ns * 1e-9


def _update(job: Job) -> float:
    """The optimizer, bound by memory: its bytes for each parameter that the rank updates."""
    shards = job.plan.dp if job.zero_stage else 1
    device = job.cluster.device
    speed = device.memory_bytes_per_second * device.memory_efficiency
    return rank_parameters(job) * job.stack.optimizer_bytes / shards / speed


def _tied(job: Job) -> float:
    """Adding up the gradients of tied embeddings, which the first and the last stage hold."""
    plan, shape = job.plan, job.shape
    if plan.pp == 1 or not shape.tied:
        return 0.0
    size = job.padded_vocab * shape.hidden_size / plan.tp * job.stack.gradient_bytes
    spread = job.cluster.regular_spread(2, plan.tp * plan.cp * plan.dp * max(1, plan.pp - 1))
    return collective_seconds("all_reduce", size, spread, job.cluster)


def _warnings(job: Job) -> tuple[str, ...]:
    """What lies outside the range in which the model was held against measurements."""
    plan, shape, found = job.plan, job.shape, []
    if not 768 <= shape.hidden_size <= 25600:
        found.append(f"hidden size {shape.hidden_size} lies outside the calibrated 768 to 25600")
    if not 512 <= job.seq_length <= 65536:
        found.append(f"sequence length {job.seq_length} lies outside the calibrated 512 to 65536")
    if plan.world_size > 3072:
        found.append(f"{plan.world_size} ranks are more than the 3072 that were measured")
    if shape.experts is not None:
        found.append("a mixture of experts was never held against a measured step; even routing, no expert parallelism")
    if plan.cp > 1:
        found.append(f"cp{plan.cp}: context parallelism was held against six measurements only")
    if plan.pp > 64:
        found.append(f"pp{plan.pp} is more than the 64 stages that were measured")
    if plan.tp > job.cluster.devices_per_host:
        found.append(f"tp{plan.tp} leaves a host of {job.cluster.devices_per_host}")
    if plan.schedule in ("gpipe", "zero-bubble"):
        found.append(f"schedule {plan.schedule} is taken as 1f1b")
    if not job.cluster.device.collectives:
        found.append(f"{job.cluster.device.name}: collectives are priors, not measured")
    return tuple(found)
