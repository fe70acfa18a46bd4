"""What two traces of one rank must have in common: what is computed, what is sent, and what needs what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from meshloom.chakra.trace import Node, NodeType

# A fake tensor makes autograd add gradients into new memory where real ones are added in place.
SAME = {"aten::add_": "aten::add"}
_OF_COMMUNICATION = (
    "comm_type", "comm_size", "comm_output_size", "dtype", "pg_name", "comm_ranks", "comm_axis",
    "comm_src", "comm_dst", "comm_tag", "phase",
)  # fmt: skip


def is_work(node: Node) -> bool:
    """Whether the node computes something; scopes and views do not."""
    return not node.is_comm and node.get("op_class") not in (None, "host")


def name_of(node: Node) -> str:
    """What the op is called in both traces."""
    return SAME.get(node.name, node.name)


def work(nodes: Iterable[Node]) -> Counter[tuple[str, str, str, str]]:
    """How often each op of each shapes, dtype and phase runs."""
    return Counter(
        (name_of(node), node.get("output_shapes"), node.get("dtype"), node.get("phase"))
        for node in nodes
        if is_work(node)
    )


def sent(nodes: Iterable[Node]) -> list[tuple[Any, ...]]:
    """Every collective and message with all that both ends must agree on, in order."""
    return [
        tuple(tuple(value) if isinstance(value := node.get(name), list) else value for name in _OF_COMMUNICATION)
        for node in nodes
        if node.is_comm
    ]


def needs(nodes: Sequence[Node]) -> list[tuple[str, tuple[str, ...]]]:
    """Of each op and each communication: what it is, and which of them wrote what it reads.

    They have the names that their order among their likes gives them; scopes of the host are looked through.
    """
    by_id = {node.id: node for node in nodes}
    names: dict[int, str] = {}
    counts: Counter[str] = Counter()
    for node in nodes:
        if is_work(node) or node.is_comm:
            what = _kind(node)
            names[node.id] = f"{what} #{counts[what]}"
            counts[what] += 1
    through: dict[int, frozenset[str]] = {}
    found = []
    for node in nodes:  # what is needed comes first
        reached: set[str] = set()
        for other in node.data_deps:
            reached |= {names[other]} if other in names else through.get(other, frozenset())
        through[node.id] = frozenset(reached)
        if node.id in names:
            found.append((names[node.id], tuple(sorted(reached))))
    assert len(by_id) == len(nodes)
    return found


def _kind(node: Node) -> str:
    if not node.is_comm:
        return f"{node.get('phase')} {name_of(node)} {node.get('output_shapes')}"
    if node.type is NodeType.COMM_COLL:
        return f"{node.get('phase')} collective {node.get('comm_type')} {node.get('comm_axis')} {node.get('comm_size')}"
    return f"{node.get('phase')} {node.type.name} {node.get('comm_src')}>{node.get('comm_dst')} {node.get('comm_tag')}"
