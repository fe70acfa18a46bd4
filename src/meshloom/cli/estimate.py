"""What a training step of a config would take, in closed form: composed of the model, simulate and hardware rooms."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import psutil

from meshloom.errors import HardwareError, ModelError
from meshloom.hardware.cluster import Cluster, Network
from meshloom.hardware.device import Device, load_device
from meshloom.plan import Plan
from meshloom.simulate.memory import Memory, predict_memory
from meshloom.simulate.shape import Experts, Job, Shape
from meshloom.simulate.stack import STACKS
from meshloom.simulate.step import predict_step

# the data sheet that goes with what CUDA calls a device: the first whose words are all in the name
_KNOWN = (
    ("h100 pcie", "h100-pcie"), ("h100", "h100-sxm"), ("h200", "h200"), ("gb200", "gb200"), ("gb300", "gb300"),
    ("b200", "b200"), ("a100-pcie-40gb", "a100-40gb-pcie"), ("a100-sxm4-40gb", "a100-40gb-sxm"),
    ("a100 80gb pcie", "a100-80gb-pcie"), ("a100", "a100-80gb-sxm"), ("v100", "v100-sxm"), ("l40s", "l40s"),
    ("rtx 4090", "rtx4090"), ("mi300x", "mi300x"),
)  # fmt: skip
# what this software does: eager PyTorch, fused attention; weights, gradients and two states of Adam in float32
_OURS = replace(STACKS["fsdp"], name="meshloom", flash_efficiency=0.65, state_bytes=(4.0, 4.0, 8.0))
_PRECISION = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def shape_of_config(config: Any, model: str) -> tuple[Shape, int]:
    """Dims of a Hugging Face config, and the longest sequence that it allows; raises ModelError."""

    def get(*names: str) -> Any:
        return next((getattr(config, name) for name in names if getattr(config, name, None)), None)

    hidden, layers = get("hidden_size", "n_embd", "d_model"), get("num_hidden_layers", "n_layer", "num_layers")
    heads = get("num_attention_heads", "n_head")
    if not (hidden and layers and heads):
        raise ModelError(f"{model}: expected a transformer with hidden size, layers and heads, got {config.model_type}")
    if get("kv_lora_rank"):
        raise ModelError(
            f"{model}: multi-head latent attention (kv_lora_rank), which the closed form does not know; synthesise its "
            "traces and simulate those"
        )
    gated = bool(get("hidden_act") in ("silu", "swiglu") or config.model_type.startswith(("llama", "mistral", "qwen")))
    shape = Shape(
        num_layers=layers, hidden_size=hidden, num_heads=heads, num_kv_heads=get("num_key_value_heads") or heads,
        intermediate_size=get("intermediate_size", "n_inner", "ffn_dim") or 4 * hidden,
        vocab_size=config.vocab_size, gated=gated, tied=bool(getattr(config, "tie_word_embeddings", True)),
        head_width=get("head_dim") or 0, experts=_experts(config, model, layers),
    )  # fmt: skip
    return shape, int(get("max_position_embeddings", "n_positions", "n_ctx") or 2048)


def _experts(config: Any, model: str, num_layers: int) -> Experts | None:
    """The mixture of a Hugging Face config, None of a dense one; raises ModelError where it leaves something out."""

    def get(*names: str) -> Any:
        return next((getattr(config, name) for name in names if getattr(config, name, None)), None)

    count = get("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    if not count or count == 1:
        return None
    per_token = get("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
    width = get("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
    if not (isinstance(count, int) and isinstance(per_token, int) and isinstance(width, int)):
        raise ModelError(
            f"{model}: expected a mixture with num_experts_per_tok and a width of its experts, got "
            f"{count!r:.40} experts, {per_token!r:.40} of them a token, width {width!r:.40}"
        )
    shared = get("shared_expert_intermediate_size", "shared_intermediate_size")
    shared = shared or (get("n_shared_experts", "num_shared_experts", "moe_num_shared_experts") or 0) * width
    every = get("decoder_sparse_step") or 1
    plain = set(get("mlp_only_layers") or ()) | set(range(get("first_k_dense_replace") or 0))
    dense = sum(place in plain or (place + 1) % every != 0 for place in range(num_layers))
    return Experts(count=count, per_token=per_token, width=width, shared_width=shared, num_dense_layers=dense)


def spec_of(device_name: str) -> str | None:
    """The shipped device file of what a driver calls its device, such as `NVIDIA H200`; None if there is none."""
    name = device_name.lower()
    return next((spec for words, spec in _KNOWN if words in name), None)


def this_host(device: str, num_ranks: int, num_hosts: int = 1) -> Cluster:
    """`num_hosts` hosts such as this one, of `num_ranks` devices: GPUs by their data sheets, else the CPU's.

    Raises HardwareError if there is no GPU, or no sheet for it.
    """
    import torch

    spec = "cpu"
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        if not torch.cuda.is_available():
            raise HardwareError("--device cuda: expected a GPU on this host to estimate for, torch sees none")
        spec = spec_of(torch.cuda.get_device_name()) or torch.cuda.get_device_name()
    sheet: Device = load_device(spec)
    if spec == "cpu":  # the ranks of a host share its processor
        share = min(1.0, (os.cpu_count() or 1) / sheet.num_multiprocessors) / num_ranks
        sheet = replace(
            sheet,
            flops_per_second={kind: speed * share for kind, speed in sheet.flops_per_second.items()},
            memory_bytes_per_second=sheet.memory_bytes_per_second * share,
            memory_bytes=psutil.virtual_memory().available // num_ranks,
        )
    return _cluster(sheet, num_ranks, num_hosts)


def cluster_of(spec: str, num_devices: int, num_hosts: int = 1) -> Cluster:
    """`num_hosts` hosts of `num_devices` of a device file; raises HardwareError."""
    return _cluster(load_device(spec), num_devices, num_hosts)


def _cluster(sheet: Device, num_devices: int, num_hosts: int) -> Cluster:
    """Links are those that were measured on the device; what its file leaves out is an order of magnitude."""
    link = Network(name="inside this host", bytes_per_second=10e9, latency_ns=5000, collectives=sheet.collectives)
    return Cluster(
        name=f"{num_hosts} × {num_devices} {sheet.name}", device=sheet, num_hosts=num_hosts,
        devices_per_host=num_devices, inside_host=link, between_hosts=link,
    )  # fmt: skip


def estimate(
    config: Any,
    model: str,
    plan: Plan,
    cluster: Cluster,
    *,
    batch_size: int,
    seq_length: int,
    precision: str,
    stack: str | None = None,
    zero_stage: int = 0,
) -> dict[str, Any]:
    """Step time and memory of the fullest rank, as JSON takes them; raises ModelError, PlanError, HardwareError."""
    job = job_of(
        config, model, plan, cluster, batch_size=batch_size, seq_length=seq_length, precision=precision, stack=stack
    )
    return told_of(replace(job, zero_stage=zero_stage))


def job_of(
    config: Any, model: str, plan: Plan, cluster: Cluster, *, batch_size: int, seq_length: int, precision: str,
    stack: str | None = None,
) -> Job:  # fmt: skip
    """The step as the closed form takes it, `batch_size` sequences a micro-batch; raises ModelError."""
    shape, _ = shape_of_config(config, model)
    return Job(
        shape=shape, plan=plan, cluster=cluster, stack=STACKS[stack] if stack else _OURS, seq_length=seq_length,
        global_batch=batch_size * plan.dp * plan.num_micro_batches, dtype=_PRECISION.get(precision, precision),
    )  # fmt: skip


def told_of(job: Job) -> dict[str, Any]:
    """Step time and memory of the fullest rank, as JSON takes them; raises PlanError, HardwareError."""
    step, memory = predict_step(job), predict_memory(job)
    return {
        "cluster": job.cluster.name,
        "stack": job.stack.name,
        "step_s": step.step_s,
        "tokens_per_second": step.tokens_per_second,
        "mfu": step.mfu,
        "limit": step.limit,
        "memory_bytes": memory_parts(memory),
        "device_memory_bytes": job.cluster.device.memory_bytes,
        "warnings": list(step.warnings),
    }


def memory_parts(memory: Memory) -> dict[str, int]:
    """The parts of the fullest rank's memory in bytes, and `reserved`, what the device must have."""
    parts = {
        "weights": memory.weight_bytes,
        "gradients": memory.gradient_bytes,
        "optimizer": memory.optimizer_bytes,
        "activations": memory.activation_bytes,
        "logits": memory.logit_bytes,
        "reserved": memory.reserved_bytes,
    }
    return {name: round(size) for name, size in parts.items()}


def lines_of(told: Mapping[str, Any]) -> list[str]:
    """An estimate in words, a line a thing."""
    memory = told["memory_bytes"]
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.items() if name != "reserved")
    fits = "" if memory["reserved"] <= told["device_memory_bytes"] else "  DOES NOT FIT"
    return [
        f"memory of the fullest rank: {memory['reserved'] / 1e9:.2f} GB of "
        f"{told['device_memory_bytes'] / 1e9:.1f} GB ({parts}){fits}",
        f"step time: {told['step_s'] * 1e3:,.1f} ms on {told['cluster']}: {told['tokens_per_second']:,.0f} tokens/s, "
        f"MFU {told['mfu']:.1%}, limited by {told['limit']}",
        *(f"outside the calibrated range: {warning}" for warning in told["warnings"]),
    ]
