"""Curves of kernels: corners of the formulas, the search, and the shipped curves against the measured kernels."""

from __future__ import annotations

import csv
import gzip
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshloom.hardware.cluster import Cluster, Network, Spread, load_cluster
from meshloom.hardware.curves import AttentionCurve, CollectiveCurve, GemmCurve
from meshloom.hardware.device import load_device
from meshloom.simulate.calibrate import (
    Attended,
    Collected,
    errors,
    fit_attention,
    fit_collective,
    fit_gemm,
    predict_collectives,
    search,
)  # fmt: skip
from meshloom.simulate.compute import attention_seconds, gemm_seconds
from meshloom.simulate.network import collective_seconds

IDEAL = replace(
    load_device("h100-sxm"), gemm=GemmCurve(), num_multiprocessors=100, flops_per_second={"bfloat16": 1e15},
    memory_bytes_per_second=1e13,
)  # fmt: skip


def test_a_product_that_fills_the_device_runs_at_its_peak() -> None:
    assert gemm_seconds(((100, 1280, 2560, 4096),), IDEAL) == pytest.approx([2 * 100 * 1280 * 2560 * 4096 / 1e15])


def test_a_product_of_few_flops_is_bound_by_memory() -> None:
    moved = 2 * (8192 + 8192 * 8192 + 8192)
    assert gemm_seconds(((1, 1, 8192, 8192),), IDEAL) == pytest.approx([moved / 1e13])


def test_an_unfilled_wave_costs_a_whole_one() -> None:
    device = replace(IDEAL, gemm=GemmCurve(wave_loss=1.0, cache_bytes_per_second=1.2e13), memory_bytes_per_second=1e30)
    # one tile of 128 x 256 on each of 100 multiprocessors, and one more, with k too short to split
    (full, more) = gemm_seconds(((1, 12800, 256, 64), (1, 12800 + 128, 256, 64)), device)
    assert full == pytest.approx(2 * 12800 * 256 * 64 / 1e15)
    assert 1.2 * full < more <= 2 * full


def test_starting_along_k_costs_a_ramp() -> None:
    device = replace(IDEAL, gemm=GemmCurve(k_ramp=128), memory_bytes_per_second=1e30)
    (seconds,) = gemm_seconds(((100, 1280, 2560, 4096),), device)
    assert seconds == pytest.approx(2 * 100 * 1280 * 2560 * (4096 + 128) / 1e15)


def test_a_hot_device_computes_slower_and_loads_as_fast() -> None:
    shapes = ((100, 1280, 2560, 4096), (1, 1, 8192, 8192))
    (compute, load), (hot_compute, hot_load) = gemm_seconds(shapes, IDEAL), gemm_seconds(shapes, IDEAL, clock=0.5)
    assert hot_compute == pytest.approx(2 * compute)
    assert hot_load == load


@given(m=st.integers(1, 9000), n=st.integers(1, 9000), k=st.integers(1, 9000))
def test_no_product_beats_the_peak(m: int, n: int, k: int) -> None:
    for name in ("a100-80gb-sxm", "h100-sxm", "b200", "v100-sxm", "cpu"):
        device = load_device(name)
        dtype = "bfloat16" if "bfloat16" in device.flops_per_second else "float16"
        (seconds,) = gemm_seconds(((1, m, n, k),), device, dtype)
        assert seconds >= 2 * m * n * k / device.peak(dtype)


@pytest.mark.parametrize("name", ["a100-80gb-sxm", "h100-sxm", "h200", "b200", "l40s"])
def test_products_beyond_the_measured_ones_stay_sensible(name: str) -> None:
    """More work never takes less time (3 % for tiles that change), the largest near the device's own best."""
    device = load_device(name)
    sizes = (32, 64, 128, 256, 512, 1024, 4096, 16384, 1 << 17, 1 << 20)
    for m in (1, 16, 100, 129, 1000, 4096):
        for shapes in ([(1, m, 4096, size) for size in sizes], [(1, m, size, 4096) for size in sizes]):
            times = gemm_seconds(tuple(shapes), device)
            assert all(later > 0.97 * earlier for earlier, later in itertools.pairwise(times))
    (large, huge, tiny) = gemm_seconds(((1, 16384, 16384, 16384), (1, 1 << 17, 1 << 17, 1 << 17), (1, 1, 1, 1)), device)
    assert huge == pytest.approx(512 * large, rel=0.1)
    assert 1e-6 < tiny < 1e-5


def test_a_working_set_that_no_longer_fits_the_cache_is_loaded_from_memory() -> None:
    """Five second factors in turn: 96 MB hold those of 16 MB, not those of 30 MB."""
    device = load_device("l40s")
    (inside, outside) = gemm_seconds(((1, 16, 4096, 2048), (1, 16, 4096, 4096)), device)
    assert outside > 2.5 * inside
    (alone,) = gemm_seconds(((1, 16, 4096, 4096),), device, rotation=1)
    assert alone < 0.7 * outside


@pytest.mark.parametrize("per_host", [2, 4, 8])
def test_a_ring_passes_2_n_minus_1_over_n(per_host: int) -> None:
    network = Network(name="", bytes_per_second=1e9, latency_ns=0)
    cluster = Cluster(
        name="", device=IDEAL, num_hosts=2, devices_per_host=8, inside_host=network, between_hosts=network
    )
    spread = Spread(1, per_host, False)
    assert collective_seconds("all_reduce", 1e6, spread, cluster) == pytest.approx(2e-3 * (per_host - 1) / per_host)
    assert collective_seconds("all_gather", 1e6, spread, cluster) == pytest.approx(1e-3 * (per_host - 1) / per_host)


def test_between_hosts_every_port_carries_a_ring_and_a_tree_is_taken_where_it_is_faster() -> None:
    cluster = load_cluster("h100x1024")
    fast = replace(cluster, between_hosts=replace(cluster.between_hosts, latency_ns=0, efficiency=1.0))
    one, eight = (collective_seconds("all_reduce", 1e9, Spread(4, per, False), fast) for per in (1, 8))
    assert one == pytest.approx(2 * 3 / 4 * 1e9 / 50e9, rel=0.02)
    assert eight == pytest.approx(2 * 31 / 32 * 1e9 / 400e9, rel=0.08)
    slow = replace(cluster, between_hosts=replace(cluster.between_hosts, latency_ns=1_000_000, efficiency=1.0))
    assert collective_seconds("all_reduce", 8, Spread(64, 1, False), slow) == pytest.approx(12e-3, rel=0.01)
    assert collective_seconds("all_gather", 8, Spread(64, 1, False), slow) == pytest.approx(63e-3, rel=0.01)


def test_an_oversubscribed_tree_slows_what_leaves_a_leaf() -> None:
    cluster = load_cluster("h100x1024-oversubscribed")
    inside, outside = (
        collective_seconds("all_gather", 1e10, cluster.regular_spread(size, 8), cluster) for size in (16, 32)
    )
    assert outside == pytest.approx(4 * inside * (31 / 32) / (15 / 16), rel=0.02)


def test_the_search_finds_a_minimum() -> None:
    found = search(lambda p: (p["a"] - 3) ** 2 + (p["b"] - 0.02) ** 2, {"a": 1.0, "b": 1.0}, rounds=60)
    assert found == pytest.approx({"a": 3, "b": 0.02}, abs=1e-3)
    assert search(lambda p: -p["a"], {"a": 1.0}, limits={"a": (0, 2)})["a"] == 2


def test_a_curve_is_found_again_from_its_own_kernels() -> None:
    device = load_device("h100-sxm")
    shapes = [(1, m, n, k) for m in (256, 1024, 4096) for n in (1024, 4096) for k in (512, 2048, 8192)]
    curve = fit_gemm(device, shapes, gemm_seconds(tuple(shapes), device), rounds=8)
    again = gemm_seconds(tuple(shapes), replace(device, gemm=curve))
    assert np.median(errors(again, gemm_seconds(tuple(shapes), device))) < 0.02
    kernels = [(1, 8, 8, s, d) for s in (512, 2048, 8192) for d in (64, 128)]
    known = [Attended(*k, attention_seconds(*k, device)) for k in kernels]
    attention = fit_attention(device, known)
    assert isinstance(attention, AttentionCurve)
    again = [attention_seconds(*k, replace(device, attention=attention)) for k in kernels]
    assert np.median(errors(again, [k.seconds for k in known])) < 0.05
    true = CollectiveCurve(
        start_ns=7000, hop_ns=1500, root_ns=9, wire_bytes_per_second=3e11, local_bytes_per_second=1e12
    )
    samples = [Collected("all_reduce", n, float(2**p), 0.0) for n in (2, 4, 8) for p in range(10, 30, 2)]
    samples = [s._replace(seconds=t) for s, t in zip(samples, predict_collectives(device, samples, true), strict=True)]
    found = predict_collectives(device, samples, fit_collective(device, samples))
    assert np.median(errors(found, [s.seconds for s in samples])) < 0.02


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "file", "most"),
    [("a100-80gb-sxm", "a100_sxm", 0.06), ("h100-sxm", "h100_sxm", 0.05), ("b200", "b200_sxm", 0.06)],
)
def test_the_shipped_curves_hold_against_the_measured_products(shared: Path, name: str, file: str, most: float) -> None:
    with gzip.open(shared / "measurements" / "kernels" / f"gemm_bf16_{file}.csv.gz", "rt") as lines:
        rows = [row for row in csv.DictReader(lines) if float(row["latency_ms"]) > 0.02]
    shapes = tuple((1, int(row["m"]), int(row["n"]), int(row["k"])) for row in rows)
    found = errors(gemm_seconds(shapes, load_device(name)), [float(row["latency_ms"]) * 1e-3 for row in rows])
    assert np.median(found) < most
