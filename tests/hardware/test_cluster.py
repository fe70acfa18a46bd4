"""Hardware files: the shipped ones, a user's own, and what is wrong with a bad one."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from meshloom.errors import HardwareError
from meshloom.hardware.cluster import load_cluster, load_plain
from meshloom.hardware.device import load_device
from meshloom.hardware.table import shipped


def test_everything_that_ships_loads() -> None:
    assert shipped("device")
    assert shipped("cluster")
    for name in shipped("device"):
        assert load_device(name).peak("float32") > 0
    for name in shipped("cluster"):
        assert load_cluster(name).num_devices >= 1


def _spec(name: str) -> str:
    return (resources.files("meshloom.hardware") / "specs" / f"{name}.toml").read_text()


def test_a_users_cluster_names_a_device_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(_spec("h100-sxm").replace("NVIDIA H100 SXM5 80GB", "mine"))
    (tmp_path / "cluster.toml").write_text(_spec("h100x8").replace('"h100-sxm"', '"mine.toml"'))
    assert load_cluster(tmp_path / "cluster.toml").device.name == "mine"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("num_hosts = 1", "num_hostz = 1", "got 'num_hostz'"),
        ("num_hosts = 1", "", "'num_hosts', which is missing"),
        ("num_hosts = 1", 'num_hosts = "one"', "num_hosts to be a number"),
        ("num_hosts = 1", "num_hosts = 0", "at least one host"),
        ("latency_ns = 1500", "latency_us = -1.5", "latency_ns to be a number of at least 0"),
        (
            "latency_ns = 1500",
            "latency_fortnights = 1",
            "'latency_fortnights' has an unknown unit; write latency_ns or",
        ),
        ("efficiency = 0.8", "oversubscription = 0.5", "oversubscription of at least 1"),
        ("[inside_host]", "[inside]", r"\[inside_host\]: expected a table"),
        ('device = "h100-sxm"', 'device = "h1000"', "'h1000': expected a TOML file or one of"),
        ('device = "h100-sxm"', "device = 3", "expected device to name"),
        ("num_hosts = 1", "num_hosts = [", "expected a TOML file that describes a cluster"),
        ("latency_ns = 1500", "latency_ns = -1", "latency_ns to be a number of at least 0"),
        ("latency_ns = 1500", "latency_ns = nan", "latency_ns to be a number of at least 0, got nan"),
        ("latency_ns = 1500", "latency_ns = 1500\nlatency_us = 1", "latency_ns or latency_us, which mean the same"),
        ("efficiency = 0.8", "efficiency = 0 #", "efficiency to be a part of the whole"),
        ("efficiency = 0.8", "efficiency = 1.2", "efficiency to be a part of the whole"),
        ("efficiency = 0.8", "group_size = 1.5", "group_size to be a whole number"),
    ],
)
def test_a_bad_file_is_told_in_one_line(tmp_path: Path, old: str, new: str, told: str) -> None:
    spec = _spec("h100x8")
    assert old in spec
    (tmp_path / "bad.toml").write_text(spec.replace(old, new))
    with pytest.raises(HardwareError, match=told):
        load_cluster(tmp_path / "bad.toml")


def test_a_dtype_that_the_device_file_does_not_give() -> None:
    with pytest.raises(HardwareError, match="expected a peak for float4"):
        load_device("h100-sxm").peak("float4")


def test_units_are_read_off_the_keys(tmp_path: Path) -> None:
    spec = _spec("h100-sxm").replace("memory_bytes = 85520809984", "memory_gib = 79.6")
    spec = spec.replace("memory_bytes_per_second = 3352000000000.0", "memory_tb_per_second = 3.352")
    (tmp_path / "mine.toml").write_text(spec)
    mine, theirs = load_device(str(tmp_path / "mine.toml")), load_device("h100-sxm")
    assert mine.memory_bytes == pytest.approx(theirs.memory_bytes, rel=1e-3)
    assert mine.memory_bytes_per_second == theirs.memory_bytes_per_second


def _plain(more: str = "", **fields: object) -> str:
    device = {"tflops": 100, "memory_gb": 80, "bandwidth_gb_s": 1000, **fields}
    told = ", ".join(f'"{name}": {value}' for name, value in device.items())
    return f'{{"devices": [{{{told}}}]{more}}}'


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("memory_bytes_per_second = 3352000000000.0", "memory_bytes_per_second = 0", "per_second above 0"),
        ("memory_bytes_per_second = 3352000000000.0", "memory_bytes_per_second = nan", "of at least 0, got nan"),
        ("memory_bytes = 85520809984", "memory_bytes = 85520809984\nmemory_gb = 80", "memory_bytes or memory_gb"),
        ("num_multiprocessors = 132", "num_multiprocessors = 0", "num_multiprocessors above 0"),
        ("bfloat16 = 989400000000000.0", "bfloat16 = 0", "a peak above 0 for bfloat16"),
        ("sustained = 0.725", "sustained = 1.5", "sustained to be a part of the whole"),
        ("memory_efficiency = 0.885", "memory_efficiency = 0", "memory_efficiency to be a part of the whole"),
    ],
)
def test_a_device_that_would_never_end_is_refused(tmp_path: Path, old: str, new: str, told: str) -> None:
    spec = _spec("h100-sxm")
    assert old in spec
    (tmp_path / "bad.toml").write_text(spec.replace(old, new, 1))
    with pytest.raises(HardwareError, match=told):
        load_device(str(tmp_path / "bad.toml"))


def test_plain_json(tmp_path: Path) -> None:
    path = tmp_path / "gpus.json"
    path.write_text(
        '{"devices": [{"name": "x", "tflops": 100, "count": 4}], "memory": {"size_gb": 24, "bandwidth": 900}}'
    )
    cluster = load_plain(path)
    assert cluster.num_devices == 4
    assert cluster.device.peak("bfloat16") == 1e14
    assert (cluster.device.memory_bytes, cluster.device.memory_bytes_per_second) == (24 * 10**9, 9e11)
    for bad, told in (
        ("[]", "list of at least one"),
        ('{"devices": [{}]}', "with tflops above 0"),
        ("{", "expected JSON"),
        (_plain(tflops="NaN"), "tflops to be a number above 0, got nan"),
        (_plain(bandwidth_gb_s=0), "bandwidth_gb_s to be a number above 0, got 0"),
        (_plain(flops=5), "tflops 100 and flops 5 contradict each other"),
        (_plain(more=', "memory": {"memory_gb": 40}'), "memory says memory_gb 40, the device 80; keep one"),
        (_plain(more=', "network": {"bandwidth_gb_s": 0}'), "bandwidth_gb_s to be a number above 0"),
        ('{"devices": [{"tflops": 1}, {"tflops": 2}]}', "tflops is 1 of the first and 2 of device 1"),
    ):
        path.write_text(bad)
        with pytest.raises(HardwareError, match=told):
            load_plain(path)


def test_how_a_group_lies_on_hosts() -> None:
    cluster = load_cluster("h100x1024-oversubscribed")
    assert cluster.regular_spread(8, 1) == (1, 8, False)
    assert cluster.regular_spread(16, 1) == (2, 8, False)
    assert cluster.regular_spread(32, 8) == (32, 1, True), "a leaf holds 16 hosts"
    for size, stride in ((8, 1), (16, 1), (32, 8), (4, 2), (8, 128)):
        ranks = tuple(range(0, size * stride, stride))
        assert cluster.spread(ranks) == cluster.regular_spread(size, stride)
