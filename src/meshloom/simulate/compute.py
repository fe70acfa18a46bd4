"""How long computation takes on a device: products, attention, everything bound by memory. No torch.

Simplifications are listed in docs/simulate.md: kernels of a rank run one after another, nothing is fused.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil

import numpy as np

from meshloom.chakra.trace import Node
from meshloom.hardware.curves import GemmCurve
from meshloom.hardware.device import Device

Gemm = tuple[int, int, int, int]  # batch, m, n, k

_LIKE = {"float32": "float32", "float64": "float64", "bfloat16": "bfloat16", "float16": "float16"}
_SPLITS = np.array((1, 2, 3, 4, 6, 8, 12, 16, 32), dtype=float)
# Output tiles that vendors' libraries choose among; larger than 128 x 256 does not fit the registers.
_TILES = np.array(
    [(m, n) for m in (16, 32, 64, 128, 256) for n in (64, 128, 256) if (n < 256 or m >= 64) and m * n <= 128 * 256],
    dtype=float,
)
_LONG_S = 1e-3  # products of about this length begin to meet the power limit
_ROTATION = 5  # second factors that the microbenchmarks go through, so that small ones alone stay in the cache
_EDGE = 12.0  # how sharply a working set stops fitting the cache


def gemm_seconds(
    gemms: tuple[Gemm, ...],
    device: Device,
    dtype: str = "bfloat16",
    itemsize: int = 2,
    clock: float = 1.0,
    rotation: int = _ROTATION,
) -> list[float]:
    """How long each product (batch, m, n, k) takes alone, as a microbenchmark would measure it.

    For a tile of a·b and a split of k: waves w = batch·⌈m/a⌉·⌈n/b⌉·split / multiprocessors, an unfilled last wave
    costing `wave_loss` of itself; each wave takes (k + k_ramp)·max(2ab / peak, (a + b)·itemsize / cache) + tile_ns
    (wave quantisation: NVIDIA, Matrix Multiplication Background; K ramp and tiles: Zhang et al., LLMCompass 2024).
    Loading takes bytes / bandwidth, less if too few tiles are in flight, and from the cache where m·k + rotation·k·n +
    m·n fits `resident` of it: a loop that goes through `rotation` second factors. Both overlap with the exponent
    `sharpness`; writing the last wave's results, `tail` times as slow, with neither. The library chooses among tiles
    and splits well, not best: a mean of the times weighted by (least / time)^`choice`. `clock` is the part of the peak
    that a hot device keeps (`Device.sustained`); long products meet the power limit even alone (`throttle`), and the
    lower of the two counts.
    """
    if not gemms:
        return []
    return _gemm_seconds(
        gemms,
        device.gemm,
        device.peak(dtype),
        device.memory_bytes_per_second,
        device.num_multiprocessors,
        device.cache_bytes,
        itemsize,
        clock,
        rotation,
    )


@lru_cache(maxsize=65536)
def _gemm_seconds(
    gemms: tuple[Gemm, ...],
    curve: GemmCurve,
    peak: float,
    bandwidth: float,
    units: int,
    cache: int,
    itemsize: int,
    clock: float,
    rotation: int,
) -> list[float]:
    batch, m, n, k = (np.array(column, dtype=float)[:, None, None] for column in zip(*gemms, strict=True))
    a, b, split = _TILES[None, :, :1], _TILES[None, :, 1:], _SPLITS[None, None, :]
    ideal = 2 * batch * m * n * k / (peak * curve.efficiency)
    speed = peak * curve.efficiency / units * np.minimum(clock, 1 - curve.throttle * ideal / (ideal + _LONG_S))
    waves = batch * np.ceil(m / a) * np.ceil(n / b) * split / units
    rounds = np.maximum(1, waves + curve.wave_loss * (np.ceil(waves) - waves))
    step = 2 * a * b / speed
    if curve.cache_bytes_per_second:
        step = np.maximum(step, (a + b) * itemsize * units / curve.cache_bytes_per_second)
    step = np.maximum(step, curve.step_ns * 1e-9 / 64)
    length = k if curve.k_ramp == 0 else np.ceil(k / split / 64) * 64  # the ideal device has no granularity
    computing = rounds * (step * (length + curve.k_ramp) + curve.tile_ns * 1e-9)
    read, written = batch * (m * k + k * n) * itemsize, batch * m * n * itemsize
    speed_of_bytes, speed_of_sums = _bandwidth(
        read + written + (rotation - 1) * batch * k * n * itemsize, curve, bandwidth, cache
    )
    in_flight = np.minimum(1, waves * curve.occupancy) if curve.occupancy else np.ones_like(waves)
    last = 1 / np.maximum(1, waves)
    partial = np.where(split > 1, 8 * batch * m * n * split, 0) / speed_of_sums
    loading = (read / speed_of_bytes + partial) / in_flight + written / speed_of_bytes * (1 - last * (curve.tail > 0))
    if curve.sharpness:
        # of very different sizes the power of the smaller vanishes, so scale by the larger
        large, small = np.maximum(computing, loading), np.minimum(computing, loading)
        time = large * (1 + (small / large) ** curve.sharpness) ** (1 / curve.sharpness)
    else:
        time = np.maximum(computing, loading)
    time = time + curve.tail * written / speed_of_bytes * last / in_flight
    time = time + curve.start_ns * 1e-9 + np.where(split > 1, curve.split_ns * 1e-9, 0)
    time = np.where((split > 1) & (k / split < 128), np.inf, time).reshape(len(gemms), -1)
    found: list[float] = _chosen(time, curve.choice).tolist()
    return found


def _chosen(time: np.ndarray, choice: float) -> np.ndarray:
    """The time of the tile and split that a library takes: the least, or a mean that leans to it."""
    least: np.ndarray = time.min(axis=1)
    if not choice:
        return least
    weight = (least[:, None] / time) ** choice
    found: np.ndarray = (weight * np.where(np.isinf(time), 0, time)).sum(axis=1) / weight.sum(axis=1)
    return found


def _bandwidth(working: np.ndarray, curve: GemmCurve, bandwidth: float, cache: int) -> tuple[np.ndarray, float]:
    """Bytes a second of factors and results, from memory or, where the working set stays in it, from the cache; and
    of partial sums, which always stay in it."""
    memory = bandwidth * curve.memory_efficiency
    if not (curve.resident and cache and curve.resident_bytes_per_second):
        return np.full_like(working, memory), memory
    warm = 1 / (1 + (working / (curve.resident * cache)) ** _EDGE)
    found: np.ndarray = 1 / ((1 - warm) / memory + warm / curve.resident_bytes_per_second)
    return found, curve.resident_bytes_per_second


def attention_seconds(
    batch: int,
    heads: int,
    kv_heads: int,
    length: int,
    width: int,
    device: Device,
    dtype: str = "bfloat16",
    narrow: float = 0.0,
) -> float:
    """How long a fused causal attention kernel takes forward, as a microbenchmark would measure it.

    t = start + FLOPs / (peak·e·u) · (1 + ramp/s) + bytes / (bandwidth·e_m·u), FLOPs of the causal half in blocks of
    128, u the part of the multiprocessors that batch·heads·⌈s/128⌉ blocks fill (Dao 2023, FlashAttention-2). `narrow`
    stands in for the curve's.
    """
    curve = device.attention
    flops = 4 * batch * heads * width * (length * (length + 128) / 2)
    filled = min(1.0, batch * heads * ceil(length / 128) / device.num_multiprocessors)
    efficiency = curve.efficiency * ((narrow or curve.narrow) ** (128 / width - 1) if width < 128 else 1.0)
    computing = flops / (device.peak(dtype) * efficiency * filled) * (1 + curve.length_ramp / length)
    moved = 2 * batch * length * width * (2 * heads + 2 * kv_heads)
    loading = moved / (device.memory_bytes_per_second * curve.memory_efficiency * filled)
    return curve.start_ns * 1e-9 + computing + loading


def duration_ns(node: Node, device: Device) -> int:
    """How long `device` takes for a compute node; 0 for host scopes, which devices never see.

    Products by `gemm_seconds`; everything else a roofline (Williams et al. 2009) with a kernel's launch on top:
    t = max(FLOPs / peak, bytes / (bandwidth·e_m)) + launch.
    """
    op_class = node.get("op_class", "memory")
    if op_class == "host":
        return 0
    num_bytes, flops = int(node.get("tensor_size", 0)), int(node.get("num_ops", 0))
    dtype = _LIKE.get(node.get("dtype", "float32"), "float32")
    gemm = node.get("gemm")
    if op_class == "gemm" and gemm:
        itemsize = 8 if dtype == "float64" else 4 if dtype == "float32" else 2
        shape = (gemm[0], gemm[1], gemm[2], gemm[3])
        (seconds,) = gemm_seconds((shape,), device, dtype, itemsize, device.sustained)
        return round(seconds * 1e9) + device.kernel_launch_ns
    seconds = num_bytes / (device.memory_bytes_per_second * device.memory_efficiency)
    if op_class == "gemm":
        seconds = max(seconds, flops / (device.peak(dtype) * device.gemm.efficiency))
    elif op_class == "attention":
        seconds = max(seconds, flops / (device.peak(dtype) * device.attention.efficiency))
    return round(seconds * 1e9) + device.kernel_launch_ns
