"""Constants of a device from measured kernels: a search for each curve, deterministic, without a library. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from math import exp
from typing import NamedTuple

import numpy as np

from meshloom.hardware.cluster import Cluster, Network, Spread
from meshloom.hardware.curves import AttentionCurve, CollectiveCurve, GemmCurve, Op
from meshloom.hardware.device import Device
from meshloom.simulate.compute import Gemm, attention_seconds, gemm_seconds
from meshloom.simulate.network import collective_seconds

_BULK = 0.1
_CAP = 0.3  # an outlier counts as much as a 30 % error, so that no single kernel bends a curve


class Collected(NamedTuple):
    """A measured collective: what, among how many devices of one host, bytes of the whole, seconds."""

    op: Op
    num_devices: int
    num_bytes: float
    seconds: float


class Attended(NamedTuple):
    """A measured fused attention kernel, forward and causal: its dims and seconds."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    width: int
    seconds: float


def search(
    loss: Callable[[dict[str, float]], float],
    start: Mapping[str, float],
    *,
    limits: Mapping[str, tuple[float, float]] | None = None,
    rounds: int = 25,
    step: float = 0.25,
) -> dict[str, float]:
    """The point where `loss` is least: a pattern search along each coordinate in log space (Hooke & Jeeves 1961).

    Every start value must be above 0; `limits` bounds a coordinate. Deterministic.
    """
    point, steps = dict(start), dict.fromkeys(start, step)
    best, limits = loss(point), limits or {}
    for _ in range(rounds):
        for name in point:
            for sign in (1, -1):
                low, high = limits.get(name, (0.0, float("inf")))
                tried = {**point, name: min(high, max(low, point[name] * exp(sign * steps[name])))}
                found = loss(tried)
                if found < best:
                    best, point = found, tried
                    steps[name] *= 1.3
                    break
            else:
                steps[name] /= 2
    return point


def errors(predicted: Sequence[float], measured: Sequence[float]) -> np.ndarray:
    """|log(predicted / measured)|: about the relative error, and alike for halves and doubles."""
    found: np.ndarray = np.abs(np.log(np.asarray(predicted) / np.asarray(measured)))
    return found


def fit_gemm(
    device: Device,
    shapes: Sequence[Gemm],
    seconds: Sequence[float],
    *,
    rounds: int = 25,
    dtype: str = "bfloat16",
    itemsize: int = 2,
    rotation: int = 5,
) -> GemmCurve:
    """The curve of `device` that fits measured products best in the mean of capped errors; they were measured in a
    loop that goes through `rotation` second factors."""
    scale = device.peak(dtype) / 989e12
    start = {
        "efficiency": 0.85, "k_ramp": 100.0, "wave_loss": 0.3, "memory_efficiency": 0.85,
        "cache_bytes_per_second": max(1.5e13 * scale, device.memory_bytes_per_second), "start_ns": 2000.0,
        "tile_ns": 150.0, "split_ns": 2000.0, "sharpness": 3.0, "occupancy": 2.0, "throttle": 0.1, "step_ns": 30.0,
        "tail": 1.0, "choice": 20.0,
    }  # fmt: skip
    if device.cache_bytes:
        start |= {
            "resident": 0.8,
            "resident_bytes_per_second": max(0.5e13 * scale, 2 * device.memory_bytes_per_second),
        }
    limits = {
        "efficiency": (0.3, 1.0), "wave_loss": (1e-3, 1.0), "memory_efficiency": (0.3, 1.0), "throttle": (0, 0.3),
        "resident": (0.05, 2.0), "tail": (0.1, 4.0), "choice": (4.0, 80.0), "occupancy": (0.1, 100.0),
    }  # fmt: skip
    many = tuple(shapes)

    def loss(point: dict[str, float], cap: float = _CAP) -> float:
        trial = replace(device, gemm=GemmCurve(**point))
        predicted = gemm_seconds(many, trial, dtype, itemsize, rotation=rotation)
        return float(np.minimum(errors(predicted, seconds), cap).mean())

    # The search goes downhill only, so it begins in a few places; then first near, then for the bulk: libraries' odd
    # choices for single shapes would else bend the curve.
    begun = [
        search(loss, {**start, "step_ns": least, "wave_loss": lost}, limits=limits, rounds=max(1, rounds // 4))
        for least, lost in ((30.0, 0.1), (30.0, 0.8), (100.0, 0.1), (200.0, 0.8))
    ]
    near = search(loss, min(begun, key=loss), limits=limits, rounds=rounds)  # type: ignore[arg-type]
    return GemmCurve(**_rounded(search(lambda point: loss(point, _BULK), near, limits=limits, rounds=rounds)))


def fit_attention(device: Device, kernels: Sequence[Attended]) -> AttentionCurve:
    """The curve of `device` that fits measured fused attention kernels best."""
    start = {item.name: float(item.default) for item in fields(AttentionCurve)}  # type: ignore[arg-type]
    limits = {"efficiency": (0.05, 1.0), "narrow": (0.3, 1.0), "memory_efficiency": (0.05, 1.0)}
    seconds = [kernel.seconds for kernel in kernels]

    def loss(point: dict[str, float]) -> float:
        trial = replace(device, attention=AttentionCurve(**point))
        return float(np.minimum(errors([attention_seconds(*k[:5], trial) for k in kernels], seconds), _CAP).mean())

    return AttentionCurve(**_rounded(search(loss, start, limits=limits)))


def fit_collective(device: Device, samples: Sequence[Collected], *, by_size: bool = False) -> CollectiveCurve:
    """The curve of one collective; `by_size` fits the wire for each number of devices (PCIe, NVLink meshes)."""
    sizes = sorted({sample.num_devices for sample in samples})
    fastest = max(sample.num_bytes / sample.seconds for sample in samples)
    start = {
        "start_ns": 5000.0, "hop_ns": 1000.0, "root_ns": 10.0, "wire_bytes_per_second": fastest,
        "local_bytes_per_second": 4 * fastest,
    }  # fmt: skip
    if by_size:
        start |= {str(size): fastest for size in sizes}
    seconds = [sample.seconds for sample in samples]

    def loss(point: dict[str, float]) -> float:
        predicted = predict_collectives(device, samples, _curve(point))
        return float(np.minimum(errors(predicted, seconds), _CAP * 2).mean())

    found = min(
        (search(loss, {**start, "root_ns": root}, rounds=60, step=0.5) for root in (5.0, 20.0)),
        key=loss,
    )
    return _curve(_rounded(found))


def predict_collectives(device: Device, samples: Sequence[Collected], curve: CollectiveCurve) -> list[float]:
    """Seconds of each sample under `curve`."""
    inside = Network(name="", bytes_per_second=1.0, latency_ns=0, collectives={samples[0].op: curve})
    host = Cluster(name="", device=device, num_hosts=1, devices_per_host=64, inside_host=inside, between_hosts=inside)
    return [
        collective_seconds(sample.op, sample.num_bytes, Spread(1, sample.num_devices, False), host)
        for sample in samples
    ]


def _curve(point: Mapping[str, float]) -> CollectiveCurve:
    by_size = {name: value for name, value in point.items() if name.isdigit()}
    return CollectiveCurve(**{k: v for k, v in point.items() if not k.isdigit()}, by_size=by_size)


def _rounded(point: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in point.items()}
