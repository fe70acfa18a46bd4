"""The noun `Cluster`: hosts of equal devices, a fast network inside a host, a slower one between hosts. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from meshloom.errors import HardwareError
from meshloom.hardware.curves import CollectiveCurve
from meshloom.hardware.device import Device, load_device
from meshloom.hardware.table import as_table, from_table, load_table, section


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A network all of whose ports are alike: bytes a second that a device sends and receives, and a latency.

    `latency_ns` is what a hop takes besides its bytes; `efficiency` the part of the bandwidth that large messages
    reach. `group_size` hosts hang below one leaf of a fat tree (0: all); what leaves it gets 1/`oversubscription` of
    the bandwidth. `collectives` are measured curves, by collective; without them the bandwidth and latency count.
    """

    name: str
    bytes_per_second: float
    latency_ns: int
    efficiency: float = 1.0
    group_size: int = 0
    oversubscription: float = 1.0
    collectives: Mapping[str, CollectiveCurve] = field(default_factory=dict)


class Spread(NamedTuple):
    """How a group of ranks lies: on how many hosts, how many of it on one, whether it leaves a leaf of the tree."""

    num_hosts: int
    per_host: int
    leaves_group: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """`num_hosts` hosts of `devices_per_host` devices each; rank r is device r modulo devices_per_host of its host.

    A host is an island of NVLink or the like; where an island spans several machines (a rack of GB200), write the
    island as the host.
    """

    name: str
    device: Device
    num_hosts: int
    devices_per_host: int
    inside_host: Network
    between_hosts: Network
    source: str = ""

    @property
    def num_devices(self) -> int:
        """All devices of all hosts."""
        return self.num_hosts * self.devices_per_host

    def network(self, ranks: tuple[int, ...]) -> Network:
        """The slowest network that a collective of `ranks` must cross."""
        hosts = {rank // self.devices_per_host for rank in ranks}
        return self.inside_host if len(hosts) <= 1 else self.between_hosts

    def spread(self, ranks: tuple[int, ...]) -> Spread:
        """How `ranks` lie on the hosts; ranks a host are those of the fullest one."""
        counts: dict[int, int] = {}
        for rank in ranks:
            host = rank // self.devices_per_host
            counts[host] = counts.get(host, 0) + 1
        return Spread(len(counts), max(counts.values(), default=0), self._leaves(counts))

    def regular_spread(self, num_ranks: int, stride: int) -> Spread:
        """`spread` of ranks 0, stride, 2·stride, … without listing them: what a plan's groups are."""
        per_host = max(1, min(num_ranks, self.devices_per_host // stride))
        num_hosts = -(-num_ranks // per_host)
        reach = max(1, stride // self.devices_per_host) * num_hosts
        size = self.between_hosts.group_size
        return Spread(num_hosts, per_host, num_hosts > 1 and 0 < size < reach)

    def _leaves(self, hosts: Mapping[int, int]) -> bool:
        size = self.between_hosts.group_size
        return bool(size) and len({host // size for host in hosts}) > 1

    def check_fits(self, world_size: int) -> None:
        """Raise HardwareError if there are fewer devices than ranks."""
        if world_size > self.num_devices:
            raise HardwareError(
                f"cluster {self.name}: expected at least {world_size} devices for {world_size} ranks, "
                f"it has {self.num_hosts} × {self.devices_per_host} = {self.num_devices}; "
                "choose a larger cluster or a smaller plan"
            )


def load_cluster(name: str | Path) -> Cluster:
    """The cluster of a shipped name (such as `h100x8`) or of a TOML file; raises HardwareError.

    `inside_host` takes the collectives that were measured on the device, unless the file gives its own.
    """
    table, where = load_table(str(name), "cluster")
    for part in ("inside_host", "between_hosts"):
        table[part] = _network(table.get(part), f"{where}: [{part}]")
    device = table.get("device")
    if not isinstance(device, str):
        raise HardwareError(f"{where}: expected device to name a device or a TOML file, got {device!r}")
    nearby = Path(name).parent / device  # a device file named relative to its cluster file
    table["device"] = load_device(str(nearby) if nearby.suffix == ".toml" else device)
    if not table["inside_host"].collectives:
        table["inside_host"] = replace(table["inside_host"], collectives=table["device"].collectives)
    cluster = from_table(Cluster, table, where)
    if not isinstance(cluster.devices_per_host, int) or cluster.num_hosts < 1 or cluster.devices_per_host < 1:
        raise HardwareError(f"{where}: expected at least one host and one device a host")
    return cluster


def _network(table: Any, where: str) -> Network:
    if isinstance(table, dict) and "collectives" in table:
        curves = {
            op: section(CollectiveCurve, curve, f"{where}.collectives.{op}")
            for op, curve in as_table(table["collectives"], f"{where}.collectives").items()
        }
        table = {**table, "collectives": curves}
    network = section(Network, table, where)
    if not network.bytes_per_second:
        raise HardwareError(f"{where}: expected bytes_per_second above 0")
    if network.oversubscription < 1:
        raise HardwareError(f"{where}: expected oversubscription of at least 1, got {network.oversubscription}")
    return network


def load_plain(path: str | Path) -> Cluster:
    """A cluster from plain JSON, `{"devices": […], "memory": {…}}`; raises HardwareError.

    Each device: `name`, `tflops` (half precision, dense) or `flops`, `memory_gb`, `bandwidth_gb_s`; `count` devices
    (default 1) of the first entry make up one host. `memory` holds what the devices leave out; `network`, if there,
    `bandwidth_gb_s` and `latency_us` between devices.
    """
    where = str(path)
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise HardwareError(f"{where}: expected JSON such as {{'devices': [...], 'memory': {{...}}}}") from error
    devices = table.get("devices") if isinstance(table, dict) else None
    if not isinstance(devices, list) or not devices or not all(isinstance(item, dict) for item in devices):
        raise HardwareError(f"{where}: expected 'devices' to be a list of at least one table")
    first = _joined(as_table(table.get("memory") or {}, f"{where}: memory"), devices, where)
    flops = _plain(first, {"tflops": 1e12, "flops": 1.0, "peak_tflops": 1e12}, where, "tflops")
    device = Device(
        name=str(first.get("name", "device")),
        source=where,
        flops_per_second={"float32": flops, "bfloat16": flops, "float16": flops},
        memory_bytes=int(_plain(first, {"memory_gb": 1e9, "capacity_gb": 1e9, "size_gb": 1e9}, where, "memory_gb")),
        memory_bytes_per_second=_plain(
            first, {"bandwidth_gb_s": 1e9, "bandwidth_gbps": 1e9, "bandwidth": 1e9}, where, "bandwidth_gb_s"
        ),
    )
    link = {"bandwidth_gb_s": 25.0, "latency_us": 5.0, **as_table(table.get("network") or {}, f"{where}: network")}
    network = Network(
        name="network",
        bytes_per_second=_plain(link, {"bandwidth_gb_s": 1e9}, where, "bandwidth_gb_s"),
        latency_ns=round(_plain(link, {"latency_us": 1e3}, where, "latency_us", least=0.0)),
    )
    counts = [item.get("count", 1) for item in devices]
    if not all(isinstance(count, int) and 1 <= count <= 1 << 31 for count in counts):
        raise HardwareError(f"{where}: expected count to be a whole number of at least 1, got {counts[0]!r:.60}")
    count = sum(counts)
    return Cluster(
        name=where, device=device, num_hosts=1, devices_per_host=count, inside_host=network, between_hosts=network
    )


def _joined(memory: Mapping[str, Any], devices: list[Any], where: str) -> dict[str, Any]:
    """The first device with what `memory` adds; raises HardwareError where they contradict, or devices differ."""
    first: dict[str, Any] = devices[0]
    for key in memory.keys() & first.keys():
        if memory[key] != first[key]:
            raise HardwareError(
                f"{where}: memory says {key} {memory[key]!r:.40}, the device {first[key]!r:.40}; keep one"
            )
    for number, other in enumerate(devices[1:], 1):
        for key in sorted((first.keys() | other.keys()) & _OF_SPEED):
            if first.get(key) != other.get(key):
                raise HardwareError(
                    f"{where}: expected devices that are alike, but {key} is {first.get(key)!r:.40} of the first and "
                    f"{other.get(key)!r:.40} of device {number}"
                )
    return {**memory, **first}


_OF_SPEED = {
    "tflops", "flops", "peak_tflops", "memory_gb", "capacity_gb", "size_gb", "bandwidth_gb_s", "bandwidth_gbps",
    "bandwidth",
}  # fmt: skip


def _plain(
    table: Mapping[str, Any], names: Mapping[str, float], where: str, wanted: str, least: float = 1e-30
) -> float:
    """The number under the first of `names` that is there, in SI; raises HardwareError if there is none, or two."""
    found: dict[str, float] = {}
    for name, factor in names.items():
        value = table.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value < 1e30:
            found[name] = float(value) * factor
        elif value is not None:
            raise HardwareError(f"{where}: expected {name} to be a number above 0, got {value!r:.40}")
    if not found:
        raise HardwareError(f"{where}: expected a device with {wanted} above 0, got {', '.join(table) or 'nothing'}")
    if max(found.values()) > min(found.values()) * (1 + 1e-9):
        told = " and ".join(f"{name} {table[name]!r:.40}" for name in found)
        raise HardwareError(f"{where}: {told} contradict each other; keep one")
    return next(iter(found.values()))
