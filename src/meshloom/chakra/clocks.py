"""Clocks of ranks that recorded on their own: what ends everywhere at once puts them side by side. No torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from statistics import median_low

from meshloom.chakra.trace import Node, NodeType


def offsets_ns(nodes: Mapping[int, list[Node]]) -> dict[int, int]:
    """What to add to each rank's clock so that their collectives end together; the lowest rank's counts as right.

    A collective ends on all its ranks within microseconds. Ranks that share none with the others keep their clocks.
    """
    ends = {rank: _ends(each) for rank, each in nodes.items()}
    found = dict.fromkeys(sorted(nodes)[:1], 0)
    frontier = list(found)
    while frontier:
        known = frontier.pop()
        for rank in sorted(nodes):
            if rank in found:
                continue
            shared = ends[known].keys() & ends[rank].keys()
            if shared:
                found[rank] = found[known] + median_low([ends[known][key] - ends[rank][key] for key in shared])
                frontier.append(rank)
    return {rank: found.get(rank, 0) for rank in nodes}


def _ends(nodes: list[Node]) -> dict[tuple[object, int], int]:
    counts: dict[object, int] = defaultdict(int)
    found = {}
    for node in nodes:
        if node.type == NodeType.COMM_COLL:
            group = node.get("pg_name")
            found[group, counts[group]] = node.start_ns + node.duration_ns
            counts[group] += 1
    return found
