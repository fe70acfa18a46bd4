"""A device from kernels that were timed on it: peaks and bandwidth are the best that was reached. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from meshloom.hardware.device import Device
from meshloom.simulate.calibrate import Attended, Collected, errors, fit_attention, fit_collective, fit_gemm
from meshloom.simulate.compute import attention_seconds, gemm_seconds
from meshloom.simulate.recorded import Found

Shape = tuple[int, int, int, int]
_BULK_BYTES = 1 << 23  # copies of more are bandwidth, of less also launch


def device_from(
    *,
    name: str,
    dtype: str,
    memory_bytes: int,
    num_multiprocessors: int,
    products: Sequence[tuple[Shape, float]],
    copies: Sequence[tuple[int, float]],
    attentions: Sequence[tuple[Shape, float]],
    all_reduces: Mapping[int, float] | None = None,
) -> Found:
    """A device whose kernels take what was measured, in seconds each: `products` (batch, m, n, k), `copies` by the
    bytes that they read and write, `attentions` (batch, heads, length, width), `all_reduces` of two ranks by bytes.

    Peaks of every dtype are that of `dtype`, the only one measured. The notes tell how well the curves fit.
    """
    peak = max(2 * shape[0] * shape[1] * shape[2] * shape[3] / seconds for shape, seconds in products)
    bulk = [num_bytes / seconds for num_bytes, seconds in copies if num_bytes >= _BULK_BYTES]
    launch_ns = min(seconds for _, seconds in copies) * 1e9
    bandwidth = max(bulk or [num_bytes / seconds for num_bytes, seconds in copies])
    device = Device(
        name=name,
        source=f"measured by `meshloom calibrate --here`: {len(products)} products, {len(copies)} copies in {dtype}",
        flops_per_second=dict.fromkeys(("float32", "bfloat16", "float16"), float(f"{peak:.4g}")),
        memory_bytes=memory_bytes,
        memory_bytes_per_second=float(f"{bandwidth:.4g}"),
        num_multiprocessors=num_multiprocessors,
        kernel_launch_ns=round(launch_ns),
    )
    itemsize = 4 if dtype == "float32" else 2
    shapes = [shape for shape, _ in products]
    seconds = [each for _, each in products]
    device = replace(
        device, gemm=fit_gemm(device, shapes, seconds, rounds=40, dtype=dtype, itemsize=itemsize, rotation=1)
    )
    attended = [Attended(b, h, h, length, width, each) for (b, h, length, width), each in attentions]
    device = replace(device, attention=fit_attention(device, attended))
    notes = [
        f"peak {peak / 1e12:.3g} TFLOP/s in {dtype}, memory {bandwidth / 1e9:.3g} GB/s, a kernel at least "
        f"{launch_ns / 1e3:.3g} µs",
        _told(
            "products", [float(x) for x in gemm_seconds(tuple(shapes), device, dtype, itemsize, rotation=1)], seconds
        ),
        _told("attention", [attention_seconds(*each[:5], device) for each in attended], [x.seconds for x in attended]),
    ]
    if all_reduces:
        samples = [Collected("all_reduce", 2, float(size), each) for size, each in all_reduces.items()]
        device = replace(device, collectives={"all_reduce": fit_collective(device, samples)})
        notes.append(f"all_reduce of two ranks from {len(samples)} sizes")
    return Found(device, notes)


def _told(what: str, predicted: Sequence[float], measured: Sequence[float]) -> str:
    return f"{what}: median error {median(errors(predicted, measured)):.1%} over the {len(measured)} measured"
