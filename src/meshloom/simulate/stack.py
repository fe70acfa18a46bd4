"""What the training software does with the same model: which kernels, what overlaps, what the host costs. No torch.

Byte and kernel counts are read off each project's source; host times are calibrated by `benchmarks/accuracy.py`, one
or two for a stack. `STACKS` lists them; docs/simulate.md says where each fact comes from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Facts about a training stack. Bytes are for each token and element of the named width, in half precision.

    Attention: `flash` one fused kernel (`flash_efficiency` times as fast as the device's best, its backward
    `flash_backward` times as long, `flash_narrow` in the place of the device's `narrow`), else products and
    `score_bytes` (forward, backward) for each score; with `fused_softmax` a layer whose batch·heads is no multiple of
    4 falls back to `unfused_score_bytes` and `unfused_kernels` more launches.
    Elementwise: `hidden_bytes` for each element of the residual stream, `ffn_bytes` of the MLP's width, `head_bytes`
    of q, k and v; backward moves `backward_bytes` times as much; `logit_bytes` for each logit, both ways; `cast_bytes`
    for each element of an FP8 or FP4 product's factors; `accumulate_bytes` for each parameter and micro-batch.
    Communication: `overlap_backward` hides a column product's gradient reduction behind the weight gradient,
    `regather` gathers its input again, `async_gather` starts on the own part while gathering, `tensor_overlap` is the
    part of what is left that chunked products hide. `overlap_gradients` reduces gradients behind the last backward,
    `bucket_bytes` at a time (0: at once). `split_messages` cuts pipeline messages over tp. `zero_rings` limits the
    ports of a host that ZeRO-3 uses (0: all), `gather_overlap` is the part of it that computation may hide.
    `balanced_stages` deals layers by cost, counting the logits; with `last_keeps` the last stage does not recompute.
    Host: `kernels` (forward, backward) launched a layer, `kernel_ns` each, `collective_kernels` for a collective;
    `rank_ns` a layer and hop of a tp group's ring (its hosts keep step; a hop between hosts counts three times);
    `transfer_ns` for each message between hosts that blocks the host; `micro_batch_ns`, `step_ns`. Of the device's
    time, at each collective: `skew_ns`·(n - 1)/n waiting for the last of n ranks, `cross_ns` a further host.
    Memory: `state_bytes` of weights, gradients and optimizer for each parameter, `zero_bytes` more under ZeRO-1;
    `dropout` keeps masks, `ffn_kept_bytes` for each element of the MLP's width, `logit_kept_bytes` for each logit.
    """

    name: str
    source: str = ""
    flash: bool = False
    flash_efficiency: float = 1.0
    flash_backward: float = 2.5
    flash_narrow: float = 0.0
    causal: bool = False
    fused_softmax: bool = False
    score_bytes: tuple[float, float] = (9.0, 13.0)
    unfused_score_bytes: tuple[float, float] = (35.0, 40.0)
    hidden_bytes: float = 22.0
    ffn_bytes: float = 4.0
    head_bytes: float = 4.0
    backward_bytes: float = 1.4
    logit_bytes: float = 22.0
    elementwise_kernels: tuple[int, int] = (12, 24)
    vocab_multiple: int = 128
    overlap_backward: bool = False
    regather: bool = False
    async_gather: bool = False
    overlap_gradients: bool = False
    bucket_bytes: float = 0.0
    split_messages: bool = True
    balanced_stages: bool = False
    last_keeps: bool = False
    gradient_bytes: float = 2.0
    accumulate_bytes: float = 6.0
    optimizer_bytes: float = 46.0
    cast_bytes: float = 6.0
    gather_overlap: float = 1.0
    tensor_overlap: float = 0.0
    kernels: tuple[int, int] = (32, 62)
    collective_kernels: int = 3
    unfused_kernels: int = 16
    kernel_ns: float = 0.0
    rank_ns: float = 0.0
    skew_ns: float = 0.0
    cross_ns: float = 0.0
    transfer_ns: float = 0.0
    micro_batch_ns: float = 0.0
    step_ns: float = 0.0
    zero_rings: int = 0
    state_bytes: tuple[float, float, float] = (2.0, 4.0, 12.0)
    zero_bytes: float = 0.0
    dropout: bool = False
    ffn_kept_bytes: float = 4.0
    logit_kept_bytes: float = 8.0


_MEGATRON_2021 = Stack(
    name="megatron-2021",
    source="Megatron-LM v2.x, pipelined: gradients reduced at the end, fp16 gradients (Narayanan et al. 2021)",
    fused_softmax=True,
    dropout=True,
)
_MEGATRON_2022 = replace(
    _MEGATRON_2021,
    name="megatron-2022",
    source="Megatron-LM v3: asynchronous reductions, fused fp32 gradient accumulation (Korthikanti et al. 2022)",
    overlap_backward=True,
    regather=True,
    gradient_bytes=4.0,
    accumulate_bytes=4.0,
)
_MEGATRON_CORE = Stack(
    name="megatron-core",
    source="Megatron-Core with Transformer Engine: fused attention, distributed optimizer, everything overlapped",
    flash=True,
    hidden_bytes=20.0,
    ffn_bytes=6.0,
    head_bytes=16.0,
    backward_bytes=1.5,
    logit_bytes=22.0,
    overlap_backward=True,
    regather=True,
    overlap_gradients=True,
    bucket_bytes=160e6,
    ffn_kept_bytes=6.0,
    gradient_bytes=4.0,
    accumulate_bytes=4.0,
)
_MEGATRON_BRIDGE = replace(
    _MEGATRON_CORE,
    name="megatron-bridge",
    source="the same, tuned: tp communication in chunks behind products, casts fused (Megatron-Bridge)",
    tensor_overlap=0.8,
    cast_bytes=3.0,
)
_MEGATRON_DEEPSPEED = Stack(
    name="megatron-deepspeed",
    source="Megatron-DeepSpeed, partitioned pipeline messages, synchronous tp (vTrain's runs)",
    fused_softmax=True,
    vocab_multiple=128,
    last_keeps=True,
    optimizer_bytes=34.0,
    skew_ns=608_000,
    kernel_ns=32_000,
    micro_batch_ns=287_000,
)
_NANOTRON = Stack(
    name="nanotron",
    source="nanotron: FlashAttention-2, unfused SwiGLU and fp32 cross-entropy, asynchronous tp, fp32 gradient buckets",
    flash=True,
    flash_efficiency=0.62,  # FlashAttention-2 on Hopper: Shah et al. 2024, figures 5 and 6
    flash_narrow=0.87,
    hidden_bytes=20.0,
    ffn_bytes=10.0,
    head_bytes=24.0,
    backward_bytes=1.6,
    logit_bytes=54.0,
    elementwise_kernels=(16, 30),
    vocab_multiple=1,
    overlap_backward=True,
    regather=True,
    async_gather=True,
    bucket_bytes=25 * 2**20,
    state_bytes=(2.0, 6.0, 12.0),
    zero_bytes=2.0,
    ffn_kept_bytes=8.0,
    logit_kept_bytes=14.0,
    split_messages=False,
    balanced_stages=True,
    gradient_bytes=4.0,
    accumulate_bytes=10.0,
    optimizer_bytes=40.0,
    kernels=(42, 80),
    kernel_ns=28_400,
    cross_ns=534_000,
)
_NANOTRON_SLOW = replace(
    _NANOTRON,
    name="nanotron-slow-ring",
    source="nanotron where each hop of a ring is slow",
    rank_ns=2_134_000,
    cross_ns=0.0,
)
_NANOTRON_BLOCKING = replace(
    _NANOTRON_SLOW,
    name="nanotron-slow-ring-blocking",
    source="the same before the project's fix of pipeline messages, each of which blocked the host",
    transfer_ns=222_600_000,
)
_FSDP = Stack(
    name="fsdp",
    source="PyTorch FSDP, eager: Triton attention, layer norm and activation as separate kernels (llm-foundry)",
    flash=True,
    flash_efficiency=0.86,
    hidden_bytes=13.0,
    ffn_bytes=4.0,
    head_bytes=8.0,
    backward_bytes=1.6,
    logit_bytes=40.0,
    vocab_multiple=1,
    overlap_gradients=True,
    gradient_bytes=4.0,
    accumulate_bytes=6.0,
    optimizer_bytes=40.0,
    kernel_ns=30_000,
)
_FSDP_HOPPER = replace(
    _FSDP, name="fsdp-hopper", source="the same on Hopper, for which its Triton attention was not written",
    flash_efficiency=0.443,
)  # fmt: skip
_TORCHTITAN = replace(
    _FSDP,
    name="torchtitan",
    source="torchtitan: FSDP2, FlashAttention-2, torch.compile fuses what is elementwise",
    flash_efficiency=0.65,
    flash_narrow=0.87,
    hidden_bytes=16.0,
    ffn_bytes=6.0,
    head_bytes=16.0,
    logit_bytes=20.0,
    overlap_backward=True,
)
_EAGER = replace(
    _FSDP, name="eager", source="one device or DDP, eager PyTorch, attention as products", flash=False,
    score_bytes=(30.0, 40.0), hidden_bytes=40.0, ffn_bytes=16.0, head_bytes=16.0,
)  # fmt: skip
_FUSED = replace(_TORCHTITAN, name="fused", source="hand-written fused kernels (llm.c)", flash_efficiency=0.9)
_ZERO_2021 = replace(
    _MEGATRON_2021,
    name="deepspeed-zero3-2021",
    source="DeepSpeed ZeRO-3 of 2021, one ring between hosts (Narayanan et al. 2021, section 5.2)",
    zero_rings=1,
)

STACKS: dict[str, Stack] = {
    stack.name: stack
    for stack in (
        _MEGATRON_2021, _MEGATRON_2022, _MEGATRON_CORE, _MEGATRON_BRIDGE, _MEGATRON_DEEPSPEED, _NANOTRON,
        _NANOTRON_SLOW, _NANOTRON_BLOCKING, _FSDP, _FSDP_HOPPER,
        _TORCHTITAN, _EAGER, _FUSED,
        _ZERO_2021,
    )
}  # fmt: skip
