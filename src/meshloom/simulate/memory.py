"""What a training step keeps on a rank: states, activations, logits, and what the allocator adds. No torch.

Activations follow Korthikanti et al. 2022, equations 1 to 6, generalised to gated MLPs, grouped key-value heads and
fused attention. Bytes; a rank of each pipeline stage, the fullest one counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshloom.simulate.shape import Job
from meshloom.simulate.step import layers_by_stage

_CONTEXT_BYTES = 1.2e9  # CUDA context, NCCL's and cuBLAS's buffers, outside the allocator
_FRAGMENTS = 1.04  # reserved over allocated at the peak, where blocks of many sizes come and go


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on a rank of one stage. `static_bytes` is there between steps, `allocated_bytes` at the peak of one,
    `reserved_bytes` what the device must have."""

    weight_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    buffer_bytes: float
    activation_bytes: float
    logit_bytes: float

    @property
    def static_bytes(self) -> float:
        """Weights, gradients, optimizer states, and buffers that live as long as they."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.buffer_bytes

    @property
    def allocated_bytes(self) -> float:
        """What tensors take at the peak."""
        return self.static_bytes + self.activation_bytes + self.logit_bytes

    @property
    def reserved_bytes(self) -> float:
        """What the device must have: tensors, fragments between them, and what lies outside the allocator."""
        moving = (self.activation_bytes + self.logit_bytes) * _FRAGMENTS
        return self.static_bytes + moving + _CONTEXT_BYTES


def predict_memory(job: Job) -> Memory:
    """What the fullest stage of `job` needs."""
    return max((stage_memory(job, stage) for stage in range(job.plan.pp)), key=lambda memory: memory.reserved_bytes)


def stage_memory(job: Job, stage: int) -> Memory:
    """What a rank of pipeline stage `stage` needs.

    States are `stack.state_bytes` (weights, gradients, optimizer) for each parameter, sharded over dp as
    `job.zero_stage` says; under ZeRO-1 `stack.zero_bytes` more for gathering. Of 1F1B min(m, p - stage) micro-batches
    are in flight; interleaving keeps (p - 1)/(p·v) more (Korthikanti et al. 2022, section 4.2.3).
    """
    plan, shape, stack = job.plan, job.shape, job.stack
    parameters = _parameters(job, stage)
    weights, gradients, optimizer = stack.state_bytes
    dp = plan.dp * plan.cp if job.zero_stage else 1
    extra = stack.zero_bytes if job.zero_stage == 1 and plan.dp > 1 else 0.0
    last = stage == plan.pp - 1
    in_flight: float = min(plan.num_micro_batches, plan.pp - stage)
    if plan.virtual_stages > 1:
        in_flight = min(plan.num_micro_batches, plan.pp) * (1 + (plan.pp - 1) / (plan.pp * plan.virtual_stages))
    layers = layers_by_stage(job)[stage]
    kept = in_flight * layers * layer_activation_bytes(job)
    if plan.recompute == "full":
        kept += _whole_layer_bytes(job)  # the layer that is being recomputed
    kept += in_flight * 2 * job.tokens * shape.hidden_size / _sequence_cut(job) if stage == 0 else 0.0
    logits = job.tokens * job.padded_vocab / plan.tp * stack.logit_kept_bytes if last else 0.0
    return Memory(
        weight_bytes=parameters * (weights + extra) / (dp if job.zero_stage == 3 else 1),
        gradient_bytes=parameters * gradients / (dp if job.zero_stage >= 2 else 1),
        optimizer_bytes=parameters * optimizer / dp,
        buffer_bytes=2.0 * job.tokens * shape.hidden_size if plan.sequence_parallel and stack.regather else 0.0,
        activation_bytes=kept,
        logit_bytes=logits,
    )


def layer_activation_bytes(job: Job) -> float:
    """What a layer keeps of one micro-batch from its forward to its backward pass.

    Korthikanti et al. 2022: s·b·h·(10 + 24/t + 5as/(ht)) (equation 2), all of it over t under sequence parallelism
    (equation 4), without the last term where attention is recomputed or fused (equation 6), 2·s·b·h where the whole
    layer is recomputed.
    """
    if job.plan.recompute == "full":
        return 2.0 * job.tokens * job.shape.hidden_size / _sequence_cut(job)
    return _whole_layer_bytes(job)


def _whole_layer_bytes(job: Job) -> float:
    shape, plan, stack = job.shape, job.plan, job.stack
    hidden, heads = shape.hidden_size, shape.num_heads * shape.head_dim
    key_values = 2 * shape.num_kv_heads * shape.head_dim
    # inputs of two norms and of two products; dropout masks (one byte) in stacks that drop
    replicated = (8.0 + (2 if stack.dropout else 0)) * hidden
    cut = 2 * (heads + key_values) + 2 * heads + stack.ffn_kept_bytes * shape.active_width
    if shape.experts is not None:  # rows as they go to their experts, and as they come back
        replicated += (1 - shape.dense_share) * 4 * shape.experts.per_token * hidden
    per_token = replicated / _sequence_cut(job) + cut / plan.tp
    scores = 0.0
    if not stack.flash and plan.recompute == "none":
        scores = 5.0 * job.micro_batch * shape.num_heads * job.seq_length**2 / plan.tp / plan.cp
    return job.tokens * per_token + scores


def _sequence_cut(job: Job) -> int:
    return job.plan.tp if job.plan.sequence_parallel else 1


def _parameters(job: Job, stage: int) -> float:
    plan, shape = job.plan, job.shape
    table = job.padded_vocab * shape.hidden_size / plan.tp
    ends = (stage == 0) + (stage == plan.pp - 1)
    tables = ends if plan.pp > 1 or not shape.tied else 1
    return layers_by_stage(job)[stage] * shape.layer_parameters / plan.tp + tables * table


def fits(job: Job) -> bool:
    """Whether the fullest rank fits its device."""
    return predict_memory(job).reserved_bytes <= job.cluster.device.memory_bytes
