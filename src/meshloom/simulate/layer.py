"""One transformer layer of one micro-batch: its kernels, its tensor-parallel communication, its host time. No torch.

The counts follow Korthikanti et al. 2022 (figure 4 to 6) and Narayanan et al. 2021 (section 2.3): per layer two
all-reduces forward and two backward, or a gather and a scatter for each under sequence parallelism.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from meshloom.simulate.compute import Gemm, attention_seconds, gemm_seconds
from meshloom.simulate.network import collective_seconds, message_seconds
from meshloom.simulate.shape import Job

_ROUTED_BYTES = 10.0  # 4 to gather a row, 6 to weight it and add it up


class Pass(NamedTuple):
    """Seconds of a pass through a layer: the device's, of those waiting for communication, the host's."""

    device_s: float
    exposed_s: float
    host_s: float

    def __add__(self, other: tuple[float, ...]) -> Pass:  # type: ignore[override]
        """Both, one after the other."""
        return Pass(self.device_s + other[0], self.exposed_s + other[1], self.host_s + other[2])

    def times(self, count: float) -> Pass:
        """This pass `count` times."""
        return Pass(self.device_s * count, self.exposed_s * count, self.host_s * count)


class Layer(NamedTuple):
    """The passes of a layer for one micro-batch."""

    forward: Pass
    backward: Pass
    recompute: Pass


class _Products(NamedTuple):
    forward: list[float]  # one for each of Shape.linears
    data_gradient: list[float]
    weight_gradient: list[float]

    @property
    def backward(self) -> float:
        return sum(self.data_gradient) + sum(self.weight_gradient)


def layer(job: Job) -> Layer:
    """What a layer of `job` costs for one micro-batch on one rank; the mean of its layers where they differ."""
    share = job.shape.dense_share
    if 0 < share < 1:
        dense, sparse = (_layer(replace(job, shape=job.shape.alike(dense=which))) for which in (True, False))
        return Layer(*(one.times(share) + other.times(1 - share) for one, other in zip(dense, sparse, strict=True)))
    return _layer(replace(job, shape=job.shape.alike(dense=share == 1)) if job.shape.experts else job)


def _layer(job: Job) -> Layer:
    products = _products(job)
    element_f, element_b = _elementwise(job)
    attention_f, attention_b = _attention(job)
    wait_f, wait_b, num_f, num_b = _tensor_parallel(job, products)
    shard_f, shard_b = _sharded(job, sum(products.forward) + attention_f, products.backward + attention_b)
    host_f, host_b = _host(job, num_f, num_b)
    compute_f = sum(products.forward) + element_f + attention_f
    compute_b = products.backward + element_b + attention_b
    forward = Pass(compute_f + wait_f + shard_f, wait_f + shard_f, host_f)
    backward = Pass(compute_b + wait_b + shard_b, wait_b + shard_b, host_b)
    return Layer(forward, backward, _recompute(job, forward, attention_f, element_f, sum(products.forward)))


def _recompute(job: Job, forward: Pass, attention: float, elementwise: float, products: float) -> Pass:
    """Full: the forward pass again. Selective: the attention core again (Korthikanti et al. 2022, section 5), or with
    fused attention, which keeps none, everything elementwise and every second product (torchtitan's policy)."""
    if job.plan.recompute == "full":
        return forward
    if job.plan.recompute == "selective":
        seconds = elementwise + products / 2 if job.stack.flash else attention
        return Pass(seconds, 0.0, forward.host_s / 4)
    return Pass(0.0, 0.0, 0.0)


def _products(job: Job) -> _Products:
    groups = _shapes(job)
    shapes = [shape for group in groups for shape in group]
    device = job.cluster.device
    times = gemm_seconds(tuple(shapes), device, job.dtype, _itemsize(job), device.sustained)
    if job.dtype.startswith(("float8", "float4")):
        # both factors are cast, each once for two products: read 2 bytes, write 1, and once more transposed
        speed = device.memory_bytes_per_second * device.memory_efficiency
        casts = [job.stack.cast_bytes * b * (m * k + n * k) / 2 / speed for b, m, n, k in shapes]
        times = [time + cast for time, cast in zip(times, casts, strict=True)]
    left = iter(times)
    sums = [sum(next(left) for _ in group) for group in groups]
    return _Products(sums[:4], sums[4:8], sums[8:])


def _shapes(job: Job) -> list[list[Gemm]]:
    """The products (batch, m, n, k) of the four places of a layer: forward, input gradients, weight gradients.

    Of a mixture the experts of a place are one grouped product, each on its even share of the tokens.
    """
    tp, tokens, experts = job.plan.tp, job.tokens, job.shape.experts
    qkv, out, up, down = job.shape.linears
    cut = [(qkv[0] // tp, qkv[1]), (out[0], out[1] // tp), (up[0] // tp, up[1]), (down[0], down[1] // tp)]
    places: list[list[tuple[int, int, int, int]]] = [[(1, tokens, n, k)] for n, k in cut]  # how many, rows, out, in
    if experts is not None:
        hidden, gates = job.shape.hidden_size, 2 if job.shape.gated else 1
        active = min(experts.count, tokens * experts.per_token)
        rows, width = max(1, tokens * experts.per_token // active), max(1, experts.width // tp)
        places[2:] = [
            [(active, rows, gates * width, hidden), (1, tokens, experts.count, hidden)],  # and the router
            [(active, rows, hidden, width)],
        ]
        if experts.shared_width:
            shared = max(1, experts.shared_width // tp)
            places[2].append((1, tokens, gates * shared, hidden))
            places[3].append((1, tokens, hidden, shared))
    forward = [[(b, m, n, k) for b, m, n, k in place] for place in places]
    data = [[(b, m, k, n) for b, m, n, k in place] for place in places]
    weight = [[(b, n, k, m) for b, m, n, k in place] for place in places]
    return [*forward, *data, *weight]


def _itemsize(job: Job) -> int:
    return 1 if job.dtype.startswith(("float8", "float4")) else 2


def _elementwise(job: Job) -> tuple[float, float]:
    """Norms, activation, residuals, dropout, layout: bytes moved and kernels launched; gradients accumulate too."""
    stack, shape, tp = job.stack, job.shape, job.plan.tp
    width = stack.hidden_bytes * shape.hidden_size / (tp if job.plan.sequence_parallel else 1)
    width += stack.ffn_bytes * shape.active_width / tp
    if shape.experts is not None:  # rows go to their experts and come back weighted: read and written, both ways
        width += _ROUTED_BYTES * shape.experts.per_token * shape.hidden_size
    width += stack.head_bytes * (shape.num_heads * shape.head_dim + 2 * shape.num_kv_heads * shape.head_dim) / 3 / tp
    device = job.cluster.device
    speed = device.memory_bytes_per_second * device.memory_efficiency
    kernels_f, kernels_b = stack.elementwise_kernels
    launch = device.kernel_launch_ns * 1e-9
    accumulate = shape.layer_parameters / tp * stack.accumulate_bytes / speed
    forward = job.tokens * width / speed + kernels_f * launch
    backward = job.tokens * width * stack.backward_bytes / speed + kernels_b * launch + accumulate
    return forward, backward


def unfused(job: Job) -> bool:
    """Whether Megatron-LM's fused softmax declines the layer: its batch·heads must be a multiple of 4."""
    heads = job.micro_batch * job.shape.num_heads // job.plan.tp
    return job.stack.fused_softmax and not job.stack.flash and heads % 4 != 0


def _attention(job: Job) -> tuple[float, float]:
    """The attention core, forward and backward; a rank of cp does its share of a causal whole."""
    stack, shape, plan, device = job.stack, job.shape, job.plan, job.cluster.device
    batch, heads, width, length = job.micro_batch, max(1, shape.num_heads // plan.tp), shape.head_dim, job.seq_length
    if stack.flash:
        kv_heads = max(1, shape.num_kv_heads // plan.tp)
        once = attention_seconds(batch, heads, kv_heads, length, width, device, job.half, stack.flash_narrow)
        once /= stack.flash_efficiency * device.sustained * plan.cp
        forward, backward = once, once * stack.flash_backward
    else:
        many = batch * heads
        scores, values = (many, length, length, width), (many, length, width, length)
        s, v = gemm_seconds((scores, values), device, job.half, clock=device.sustained)
        speed = device.memory_bytes_per_second * device.memory_efficiency
        bytes_f, bytes_b = stack.unfused_score_bytes if unfused(job) else stack.score_bytes
        launch = device.kernel_launch_ns * 1e-9
        forward = (s + v + many * length**2 * bytes_f / speed + 3 * launch) / plan.cp
        backward = (2 * s + 2 * v + many * length**2 * bytes_b / speed + 5 * launch) / plan.cp
    if plan.cp > 1:
        # keys and values go round the ring of cp behind the computation (Liu et al. 2023, Ring Attention)
        size = 4 * job.tokens * shape.num_kv_heads * shape.head_dim / plan.tp
        step = message_seconds(size, job.cluster.regular_spread(2, plan.tp), job.cluster)
        forward += max(0.0, (plan.cp - 1) * step - forward)
        backward += max(0.0, 2 * (plan.cp - 1) * step - backward)
    return forward, backward


def _tensor_parallel(job: Job, products: _Products) -> tuple[float, float, int, int]:
    """Communication of a layer that computation does not hide, forward and backward, and how many collectives."""
    plan, stack = job.plan, job.stack
    if plan.tp == 1:
        return 0.0, 0.0, 0, 0
    size = 2.0 * job.tokens * job.shape.hidden_size
    spread = job.cluster.regular_spread(plan.tp, 1)
    skew = (stack.skew_ns * (plan.tp - 1) / plan.tp + stack.cross_ns * (spread.num_hosts - 1)) * 1e-9
    if not plan.sequence_parallel:
        reduce = collective_seconds("all_reduce", size, spread, job.cluster) + skew
        hidden = [products.weight_gradient[i] if stack.overlap_backward else 0.0 for i in (0, 2)]
        shown = 1 - stack.tensor_overlap
        return 2 * reduce * shown, sum(max(0.0, reduce - part) for part in hidden) * shown, 2, 2
    gather = collective_seconds("all_gather", size, spread, job.cluster) + skew
    scatter = collective_seconds("reduce_scatter", size, spread, job.cluster) + skew
    own = 1 / plan.tp if stack.async_gather else 0.0
    forward = sum(max(0.0, gather - own * products.forward[i]) + scatter for i in (0, 2))
    backward = sum(max(0.0, gather - own * products.data_gradient[i]) for i in (1, 3))
    for i in (0, 2):
        data, weight = products.data_gradient[i], products.weight_gradient[i]
        backward += max(0.0, scatter - (weight if stack.overlap_backward else 0.0))
        if stack.regather:
            backward += max(0.0, gather - (data if stack.overlap_backward else 0.0))
    shown = 1 - stack.tensor_overlap
    return forward * shown, backward * shown, 4, 6 if stack.regather else 4


def _sharded(job: Job, compute_f: float, compute_b: float) -> tuple[float, float]:
    """Gathering sharded parameters and scattering gradients, where computation does not hide them (ZeRO-2 and 3)."""
    plan, stack = job.plan, job.stack
    if job.zero_stage < 2 or plan.dp == 1:
        return 0.0, 0.0
    spread = job.cluster.regular_spread(plan.dp, plan.tp * plan.cp)
    if stack.zero_rings:
        spread = spread._replace(per_host=min(spread.per_host, stack.zero_rings))
    size = job.shape.layer_parameters / plan.tp
    gather = collective_seconds("all_gather", 2 * size, spread, job.cluster)
    scatter = collective_seconds("reduce_scatter", stack.gradient_bytes * size, spread, job.cluster)
    again = gather if job.zero_stage == 3 else 0.0
    kept = 2 if plan.recompute == "full" else 1  # the backward pass of a recomputed layer gathers once for both
    hidden_b = compute_b + (kept - 1) * compute_f
    return max(0.0, gather - compute_f * stack.gather_overlap), max(
        0.0, again + scatter - hidden_b * stack.gather_overlap
    )


def _host(job: Job, num_f: int, num_b: int) -> tuple[float, float]:
    """What the host takes to launch a layer; tp ranks wait for one another, more of them longer."""
    stack, tp = job.stack, job.plan.tp
    more = stack.kernel_ns * (stack.unfused_kernels if unfused(job) else 0)
    forward = stack.kernel_ns * (stack.kernels[0] + stack.collective_kernels * num_f)
    backward = stack.kernel_ns * (stack.kernels[1] + stack.collective_kernels * num_b)
    num_hosts = job.cluster.regular_spread(tp, 1).num_hosts
    hops = 0 if tp == 1 else tp + (2 * num_hosts if num_hosts > 1 else 0)
    together = stack.rank_ns * hops
    # two fifths of a layer's collectives are forward, a third where that is repeated
    share = 1 / 3 if job.plan.recompute == "full" else 0.4
    rest = 1 - share * (2 if job.plan.recompute == "full" else 1)
    return (forward + share * together + more) * 1e-9, (backward + rest * together + more) * 1e-9


class Kernel(NamedTuple):
    """A part of a layer's pass: what it is, seconds on the device, and whether it is communication."""

    name: str
    seconds: float
    communicates: bool = False


def kernels(job: Job) -> tuple[list[Kernel], list[Kernel], list[Kernel]]:
    """A layer's parts in their order, for one micro-batch: forward, recomputed, backward; they sum to `layer`."""
    share = job.shape.dense_share
    if 0 < share < 1:
        dense, sparse = (_kernels(replace(job, shape=job.shape.alike(dense=which))) for which in (True, False))
        return tuple(  # type: ignore[return-value]
            [
                one._replace(seconds=share * one.seconds + (1 - share) * other.seconds)
                for one, other in zip(some, others, strict=True)
            ]
            for some, others in zip(dense, sparse, strict=True)
        )
    return _kernels(replace(job, shape=job.shape.alike(dense=share == 1)) if job.shape.experts else job)


def _kernels(job: Job) -> tuple[list[Kernel], list[Kernel], list[Kernel]]:
    products, one = _products(job), layer(job)
    element_f, element_b = _elementwise(job)
    attention_f, attention_b = _attention(job)
    names = ("qkv", "attention output", "mlp up", "mlp down")
    forward = [Kernel("norms and activation", element_f)]
    for i, name in enumerate(names):
        forward.append(Kernel(name, products.forward[i]))
        if i == 0:
            forward.append(Kernel("attention", attention_f))
        if i in (1, 3) and one.forward.exposed_s:
            forward.append(Kernel("tp communication", one.forward.exposed_s / 2, True))
    backward = [Kernel("norms and activation, gradient", element_b)]
    for i in (3, 2, 1, 0):
        backward.append(Kernel(f"{names[i]}, input gradient", products.data_gradient[i]))
        backward.append(Kernel(f"{names[i]}, weight gradient", products.weight_gradient[i]))
        if i == 1:
            backward.append(Kernel("attention, gradient", attention_b))
        if i in (2, 0) and one.backward.exposed_s:
            backward.append(Kernel("tp communication", one.backward.exposed_s / 2, True))
    again = forward if job.plan.recompute == "full" else []
    if job.plan.recompute == "selective":
        again = [Kernel("recomputation", one.recompute.device_s)]
    return forward, again, backward
