"""How long communication takes on a cluster: a latency for each hop and the bytes that pass a port. No torch."""

from __future__ import annotations

from collections.abc import Callable

from meshloom.chakra.trace import CommType
from meshloom.hardware.cluster import Cluster

# Ring algorithms (Thakur, Rabenseifner & Gropp 2005), as (hops, bytes through a port) of n ranks and V bytes of input
# on each. All-gather's input is one rank's part, so V·n is the whole.
Algorithm = Callable[[int, int], tuple[int, float]]

_ALGORITHMS: dict[CommType, Algorithm] = {
    CommType.ALL_REDUCE: lambda n, size: (2 * (n - 1), 2 * (n - 1) / n * size),
    CommType.REDUCE_SCATTER: lambda n, size: (n - 1, (n - 1) / n * size),
    CommType.REDUCE_SCATTER_BLOCK: lambda n, size: (n - 1, (n - 1) / n * size),
    CommType.ALL_GATHER: lambda n, size: (n - 1, (n - 1) * size),
    CommType.ALL_TO_ALL: lambda n, size: (n - 1, (n - 1) / n * size),
    CommType.BROADCAST: lambda n, size: (n - 1, size),
    CommType.REDUCE: lambda n, size: (n - 1, size),
    CommType.GATHER: lambda n, size: (n - 1, (n - 1) * size),
    CommType.SCATTER: lambda n, size: (n - 1, (n - 1) / n * size),
    CommType.BARRIER: lambda n, size: (2 * (n - 1), 0),
}


def collective_ns(comm_type: CommType, num_bytes: int, ranks: tuple[int, ...], cluster: Cluster) -> int:
    """How long a collective takes once all `ranks` have reached it; `num_bytes` is each rank's input. 0 for one rank.

    Ring: hops · latency + bytes through the slowest port / bandwidth.
    """
    if len(ranks) <= 1:
        return 0
    network = cluster.network(ranks)
    hops, through = _ALGORITHMS[comm_type](len(ranks), num_bytes)
    return hops * network.latency_ns + round(through / (network.bytes_per_second * network.efficiency) * 1e9)


def message_ns(num_bytes: int, source: int, destination: int, cluster: Cluster) -> int:
    """How long a message takes once both ends have reached it."""
    network = cluster.network((source, destination))
    return network.latency_ns + round(num_bytes / (network.bytes_per_second * network.efficiency) * 1e9)
