"""How long communication takes on a cluster: measured curves inside a host, rings and trees between hosts. No torch."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, log2, sqrt

from meshloom.chakra.trace import CommType
from meshloom.hardware.cluster import Cluster, Network, Spread
from meshloom.hardware.curves import CollectiveCurve, Op

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

_CURVES: dict[CommType, Op] = {
    CommType.ALL_REDUCE: "all_reduce",
    CommType.REDUCE_SCATTER: "reduce_scatter",
    CommType.REDUCE_SCATTER_BLOCK: "reduce_scatter",
    CommType.ALL_GATHER: "all_gather",
    CommType.ALL_TO_ALL: "all_to_all",
}


def collective_ns(comm_type: CommType, num_bytes: int, ranks: tuple[int, ...], cluster: Cluster) -> int:
    """How long a collective takes once all `ranks` have reached it, 0 for one rank; `num_bytes` is each one's input."""
    if len(ranks) <= 1:
        return 0
    spread = cluster.spread(ranks)
    op = _CURVES.get(comm_type)
    if op is not None and cluster.inside_host.collectives:
        whole = num_bytes * len(ranks) if comm_type == CommType.ALL_GATHER else num_bytes
        return round(collective_seconds(op, whole, spread, cluster) * 1e9)
    network = cluster.network(ranks)
    hops, through = _ALGORITHMS[comm_type](len(ranks), num_bytes)
    return hops * network.latency_ns + round(through / _port(network, spread) * 1e9)


def collective_seconds(op: Op, num_bytes: float, spread: Spread, cluster: Cluster) -> float:
    """How long a collective on the whole of `num_bytes` takes (the full tensor, as nccl-tests counts it).

    Inside a host the measured curve (`CollectiveCurve`); without one a ring. Between hosts the better of two
    algorithms: rings through every port, `latency` for each host passed, or for an all-reduce a tree with
    2·log2(hosts) latencies (Sanders et al. 2009, as in NCCL); bytes pass ports and the inside of a host at the same
    time, so the slower one counts.
    """
    num_ranks = spread.num_hosts * spread.per_host
    if num_ranks <= 1 or num_bytes <= 0:
        return 0.0
    passes = 2 if op == "all_reduce" else 1
    share = passes * (num_ranks - 1) / num_ranks
    curve = cluster.inside_host.collectives.get(op) or _ring(cluster.inside_host)
    inside = num_bytes * (share / curve.wire(spread.per_host))
    if curve.local_bytes_per_second:
        inside += num_bytes / curve.local_bytes_per_second
    root = curve.root_ns * sqrt(num_bytes)
    if spread.num_hosts == 1:
        return (curve.start_ns + curve.hop_ns * (num_ranks - 1) + root) * 1e-9 + inside
    hops = passes * (spread.num_hosts - 1)
    if op == "all_reduce":
        hops = min(hops, 2 * ceil(log2(spread.num_hosts)))
    waiting = curve.start_ns + curve.hop_ns * (spread.per_host - 1) + root + hops * cluster.between_hosts.latency_ns
    across = share * num_bytes / (_port(cluster.between_hosts, spread) * spread.per_host)
    return waiting * 1e-9 + max(inside, across)


def message_ns(num_bytes: int, source: int, destination: int, cluster: Cluster) -> int:
    """How long a message takes once both ends have reached it."""
    spread = cluster.spread((source, destination))
    return round(message_seconds(num_bytes, spread, cluster) * 1e9)


def message_seconds(num_bytes: float, spread: Spread, cluster: Cluster) -> float:
    """How long a message between two devices takes: latency and bytes / bandwidth of the network that it crosses."""
    network = cluster.inside_host if spread.num_hosts == 1 else cluster.between_hosts
    return network.latency_ns * 1e-9 + num_bytes / _port(network, spread)


def _port(network: Network, spread: Spread) -> float:
    """Bytes a second through a port, less where a group leaves its leaf of an oversubscribed tree."""
    speed = network.bytes_per_second * network.efficiency
    return speed / network.oversubscription if spread.leaves_group else speed


def _ring(network: Network) -> CollectiveCurve:
    return CollectiveCurve(
        hop_ns=network.latency_ns, wire_bytes_per_second=network.bytes_per_second * network.efficiency
    )
