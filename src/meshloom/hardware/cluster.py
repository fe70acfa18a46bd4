"""The noun `Cluster`: hosts of equal devices, a fast network inside a host, a slower one between hosts. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshloom.errors import HardwareError
from meshloom.hardware.device import Device, from_table, load_device, load_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A network all of whose ports are alike: bytes a second that a device sends and receives, and a latency.

    `latency_ns` is what a message takes besides its bytes; `efficiency` the part of the bandwidth that large
    messages reach.
    """

    name: str
    bytes_per_second: float
    latency_ns: int
    efficiency: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """`num_hosts` hosts of `devices_per_host` devices each; rank r is device r modulo devices_per_host of its host."""

    name: str
    device: Device
    num_hosts: int
    devices_per_host: int
    inside_host: Network
    between_hosts: Network

    @property
    def num_devices(self) -> int:
        """All devices of all hosts."""
        return self.num_hosts * self.devices_per_host

    def network(self, ranks: tuple[int, ...]) -> Network:
        """The slowest network that a collective of `ranks` must cross."""
        hosts = {rank // self.devices_per_host for rank in ranks}
        return self.inside_host if len(hosts) <= 1 else self.between_hosts

    def check_fits(self, world_size: int) -> None:
        """Raise HardwareError if there are fewer devices than ranks."""
        if world_size > self.num_devices:
            raise HardwareError(
                f"cluster {self.name}: expected at least {world_size} devices for {world_size} ranks, "
                f"it has {self.num_hosts} × {self.devices_per_host} = {self.num_devices}; "
                "choose a larger cluster or a smaller plan"
            )


def load_cluster(name: str | Path) -> Cluster:
    """The cluster of a shipped name (such as `h100x8`) or of a TOML file; raises HardwareError."""
    table, where = load_table(str(name), "cluster")
    for part in ("inside_host", "between_hosts"):
        table[part] = _network(table.get(part), f"{where}: [{part}]")
    device = table.get("device")
    if not isinstance(device, str):
        raise HardwareError(f"{where}: expected device to name a device or a TOML file, got {device!r}")
    nearby = Path(name).parent / device  # a device file named relative to its cluster file
    table["device"] = load_device(str(nearby) if nearby.suffix == ".toml" else device)
    cluster = from_table(Cluster, table, where)
    if cluster.num_hosts < 1 or cluster.devices_per_host < 1:
        raise HardwareError(f"{where}: expected at least one host and one device a host")
    return cluster


def _network(table: Any, where: str) -> Network:
    if not isinstance(table, dict):
        raise HardwareError(f"{where}: expected a table with name, bytes_per_second and latency_ns")
    network = from_table(Network, table, where)
    if not network.bytes_per_second:
        raise HardwareError(f"{where}: expected bytes_per_second above 0")
    return network
