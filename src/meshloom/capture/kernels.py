"""A short micro-benchmark of the present device: products, copies and attention, as plain numbers for a fit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional

_ROUNDS = 7
_LONGEST_S = 0.05  # what takes longer is run less often
# batch, m, n, k: small to large, square to thin, as layers of small and large models have them
_PRODUCTS = (
    (1, 64, 64, 64), (1, 128, 768, 768), (1, 128, 3072, 768), (1, 512, 768, 768), (1, 512, 3072, 768),
    (1, 512, 768, 3072), (1, 1024, 1024, 1024), (1, 32, 2048, 2048), (1, 1, 2048, 2048), (1, 256, 2048, 2048),
    (1, 2048, 2048, 512), (1, 2048, 512, 2048), (12, 128, 128, 64), (12, 512, 512, 64), (12, 512, 64, 512),
)  # fmt: skip
_LARGER = ((1, 4096, 4096, 4096), (1, 8192, 8192, 4096), (1, 8192, 8192, 8192), (1, 2048, 8192, 8192))  # on a GPU
_COPIED = tuple(1 << power for power in range(12, 28, 3))
_ATTENTIONS = ((1, 8, 128, 64), (2, 12, 256, 64), (1, 8, 512, 64), (1, 8, 512, 128), (1, 12, 1024, 64))


class Product(NamedTuple):
    """A matrix product (batch, m, k) x (batch, k, n) and its seconds, the fastest of several."""

    shape: tuple[int, int, int, int]  # batch, m, n, k
    seconds: float


class Copy(NamedTuple):
    """A copy that reads and writes so many bytes in all."""

    num_bytes: int
    seconds: float


class Attention(NamedTuple):
    """Causal attention, forward: (batch, heads, length, width)."""

    shape: tuple[int, int, int, int]
    seconds: float


class Measured(NamedTuple):
    """What a device took, in seconds."""

    name: str
    dtype: str
    memory_bytes: int
    num_multiprocessors: int
    products: list[Product]
    copies: list[Copy]
    attentions: list[Attention]


def measure_kernels(device_type: str, memory_bytes: int) -> Measured:
    """Time kernels on `cuda` or `cpu`: in bfloat16 on a GPU, in float32 on a CPU, with all of its cores.

    `memory_bytes` is the host's memory, for a CPU has no other.
    """
    device = torch.device(device_type)
    dtype = torch.bfloat16 if device_type == "cuda" else torch.float32
    name, units = f"a CPU, {torch.get_num_threads()} threads", torch.get_num_threads()
    if device_type == "cuda":
        facts = torch.cuda.get_device_properties(0)
        name, units, memory_bytes = facts.name, facts.multi_processor_count, facts.total_memory
    products, copies, attentions = [], [], []
    for batch, m, n, k in (*_PRODUCTS, *(_LARGER if device_type == "cuda" else ())):
        a, b = torch.randn(batch, m, k, device=device).to(dtype), torch.randn(batch, k, n, device=device).to(dtype)
        products.append(Product((batch, m, n, k), _fastest_s(lambda a=a, b=b: torch.bmm(a, b), device)))  # type: ignore[misc]
    for num_bytes in _COPIED:
        source = torch.zeros(num_bytes // 8, device=device)
        target = torch.empty_like(source)
        copies.append(Copy(num_bytes, _fastest_s(lambda s=source, t=target: t.copy_(s), device)))  # type: ignore[misc]
    for shape in _ATTENTIONS:
        x = torch.randn(shape, device=device).to(dtype)
        attentions.append(Attention(shape, _fastest_s(
            lambda x=x: functional.scaled_dot_product_attention(x, x, x, is_causal=True), device)))  # type: ignore[misc]  # fmt: skip
    return Measured(name, str(dtype).removeprefix("torch."), memory_bytes, units, products, copies, attentions)


def _fastest_s(run: Callable[[], Any], device: torch.device) -> float:
    times: list[float] = []
    while len(times) < 1 + _ROUNDS and (len(times) < 3 or sum(times) < _ROUNDS * _LONGEST_S):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:])  # the first also warms up
