"""Kernels timed on a device give back the device."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshloom.capture.kernels import measure_kernels
from meshloom.hardware.curves import AttentionCurve, GemmCurve
from meshloom.hardware.device import Device, load_device
from meshloom.simulate.compute import attention_seconds, gemm_seconds
from meshloom.simulate.measured import Shape, device_from
from meshloom.simulate.recorded import device_toml

SHAPES: list[Shape] = [(1, 2**a, 2**b, 2**c) for a in (6, 9, 12) for b in (8, 11, 13) for c in (8, 12)]
ATTENDED: list[Shape] = [(2, 16, 2**a, width) for a in (7, 9, 11, 13) for width in (64, 128)]


def test_a_known_device_is_found_again() -> None:
    peak, bandwidth = 3e14, 2e12
    real = Device(
        name="", flops_per_second={"bfloat16": peak}, memory_bytes=1, memory_bytes_per_second=bandwidth,
        num_multiprocessors=100, gemm=GemmCurve(efficiency=0.9, start_ns=3000.0, tile_ns=150.0),
        attention=AttentionCurve(efficiency=0.5),
    )  # fmt: skip
    found = device_from(
        name="mine", dtype="bfloat16", memory_bytes=10**10, num_multiprocessors=100,
        products=list(zip(SHAPES, gemm_seconds(tuple(SHAPES), real), strict=True)),
        copies=[(1 << power, 2e-6 + (1 << power) / bandwidth) for power in range(12, 30, 3)],
        attentions=[((b, h, s, w), attention_seconds(b, h, h, s, w, real)) for b, h, s, w in ATTENDED],
    ).device  # fmt: skip
    assert found.memory_bytes_per_second == pytest.approx(bandwidth, rel=0.05)
    assert found.kernel_launch_ns == pytest.approx(2000, rel=0.01)
    # shapes between those that were measured
    other: tuple[Shape, ...] = ((1, 1024, 1024, 1024), (1, 3000, 5000, 2000), (4, 256, 512, 512))
    for ours, theirs in zip(gemm_seconds(other, found), gemm_seconds(other, real), strict=True):
        assert ours == pytest.approx(theirs, rel=0.2)
    assert attention_seconds(2, 16, 16, 1024, 64, found) == pytest.approx(
        attention_seconds(2, 16, 16, 1024, 64, real), rel=0.2
    )


def test_this_machine_is_measured_into_a_file_that_can_be_read(tmp_path: Path) -> None:
    told = measure_kernels("cpu", 2**34)
    assert all(each.seconds > 0 for each in (*told.products, *told.copies, *told.attentions))
    found = device_from(
        name=told.name, dtype=told.dtype, memory_bytes=told.memory_bytes, num_multiprocessors=told.num_multiprocessors,
        products=[(each.shape, each.seconds) for each in told.products],
        copies=[(each.num_bytes, each.seconds) for each in told.copies],
        attentions=[(each.shape, each.seconds) for each in told.attentions],
        all_reduces={2**power: 1e-4 + 2**power / 1e9 for power in range(12, 26, 2)},
    )  # fmt: skip
    path = tmp_path / "mine.toml"
    path.write_text(device_toml(found.device))
    assert load_device(str(path)).memory_bytes == 2**34
    assert load_device(str(path)) == found.device
    assert found.device.collectives["all_reduce"].wire(2) > 0
