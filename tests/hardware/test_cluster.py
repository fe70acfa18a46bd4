"""Hardware files: the shipped ones, a user's own, and what is wrong with a bad one."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from meshloom.errors import HardwareError
from meshloom.hardware.cluster import load_cluster
from meshloom.hardware.device import load_device, shipped


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
        ("[inside_host]", "[inside]", r"\[inside_host\]: expected a table"),
        ('device = "h100-sxm"', 'device = "h1000"', "'h1000': expected a TOML file or one of"),
        ('device = "h100-sxm"', "device = 3", "expected device to name"),
        ("num_hosts = 1", "num_hosts = [", "expected a TOML file that describes a cluster"),
        ("latency_ns = 1_500", "latency_ns = -1", "latency_ns to be a number of at least 0"),
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
