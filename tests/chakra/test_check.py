"""Each rule finds its fault, and a good trace has none."""

from __future__ import annotations

from typing import Any

import pytest

from meshloom import Node, Trace, check
from meshloom.chakra.trace import CommType, NodeType, Typed


def _node(number: int, data: list[int] | None = None, **more: Any) -> Node:
    return Node(id=number, name=f"op{number}", type=NodeType.COMP, data_deps=data or [], **more)


def _kernel(number: int, start_ns: int, duration_ns: int) -> Node:
    return _node(number, start_ns=start_ns, duration_ns=duration_ns, attrs={"stream": 7})


def _all_reduce(number: int, size: int = 8, **more: Any) -> Node:
    attrs = {"comm_type": int(CommType.ALL_REDUCE), "comm_size": size, "pg_name": "1", "comm_ranks": [0, 1], **more}
    return Node(id=number, name="all_reduce", type=NodeType.COMM_COLL, attrs=attrs)


def _message(number: int, kind: NodeType, size: int = 8, tag: int = 0) -> Node:
    attrs = {"comm_size": size, "comm_src": 0, "comm_dst": 1, "comm_tag": tag}
    return Node(id=number, name="message", type=kind, attrs=attrs)


def _trace(*nodes: Node, rank: int = 0) -> Trace:
    return Trace(nodes=list(nodes), attrs={"rank": rank, "world_size": 2})


GOOD = _trace(_node(1), _node(2, [1]), _all_reduce(3))


@pytest.mark.parametrize(
    ("trace", "code", "node"),
    [
        (_trace(_node(1), _node(1)), "duplicate-id", 1),
        (_trace(_node(1, [7])), "dangling-dependency", 1),
        (_trace(_node(1, ctrl_deps=[7])), "dangling-dependency", 1),
        (_trace(_node(1, [1])), "self-dependency", 1),
        (_trace(Node(id=1, name="x", type=NodeType.COMM_COLL)), "incomplete-communication", 1),
        (_trace(_all_reduce(1, is_cpu_op=True)), "communication-on-host", 1),
        (_trace(_all_reduce(1, pg_name="tp")), "bad-group", 1),
        (_trace(_all_reduce(1, pg_name="0")), "bad-group", 1),
        (_trace(_node(1, duration_ns=-1)), "negative-time", 1),
        (Trace(nodes=[_node(1)], version="0.0.9"), "schema-version", None),
        (_trace(_node(1, attrs={"num_ops": Typed("uint64", False, 3)})), "attribute-type", 1),
        (_trace(_node(2, [1]), _node(1)), "forward-reference", 2),
        (_trace(_kernel(1, 5000, 9000), _kernel(2, 8000, 9000)), "overlap", 2),
    ],
)
def test_a_fault_of_one_trace(trace: Trace, code: str, node: int) -> None:
    assert [(finding.code, finding.node) for finding in check(trace)] == [(code, node)]


def test_only_some_readers_stumble_over_a_warning() -> None:
    (finding,) = check(_trace(_node(2, [1]), _node(1)))
    assert finding.severity == "warning"
    assert check(_trace(_kernel(1, 5000, 3000), _kernel(2, 8000, 1))) == []


def test_a_good_trace() -> None:
    assert check(GOOD) == []
    assert check({0: GOOD, 1: _trace(*GOOD.nodes, rank=1)}) == []


def test_a_cycle_is_named() -> None:
    findings = check(_trace(_node(1, [3]), _node(2, [1]), _node(3, [2]), _node(4, [3])))
    (finding,) = (finding for finding in findings if finding.severity == "error")
    assert finding.code == "cycle"
    assert "1 -> 3 -> 2 -> 1" in finding.message
    assert finding.message.startswith("4 nodes")


def test_a_chain_of_a_hundred_thousand_needs_no_recursion() -> None:
    chain = [_node(number, [number - 1]) for number in range(2, 100_001)]
    assert check(_trace(_node(1), *chain)) == []
    codes = {finding.code for finding in check(_trace(_node(1, [100_000]), *chain))}
    assert codes == {"cycle", "forward-reference"}


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        ([_all_reduce(1)], [], "collective-mismatch"),
        ([_all_reduce(1, 8)], [_all_reduce(1, 16)], "collective-mismatch"),
        ([_all_reduce(1, 8), _all_reduce(2, 16)], [_all_reduce(1, 16), _all_reduce(2, 8)], "collective-mismatch"),
        ([_all_reduce(1)], [_all_reduce(1, comm_type=int(CommType.BARRIER))], "collective-mismatch"),
        ([_all_reduce(1)], [_all_reduce(1, comm_ranks=[0, 1, 2])], "group-mismatch"),
        ([_message(1, NodeType.COMM_SEND)], [_message(1, NodeType.COMM_RECV, size=4)], "unmatched-message"),
        ([_message(1, NodeType.COMM_SEND)], [_message(1, NodeType.COMM_RECV, tag=4)], "unmatched-message"),
        ([_message(1, NodeType.COMM_SEND)], [], "unmatched-message"),
        ([], [_message(1, NodeType.COMM_RECV)], "unmatched-message"),
    ],
)
def test_a_fault_across_ranks(first: list[Node], second: list[Node], code: str) -> None:
    findings = check({0: _trace(*first), 1: _trace(*second, rank=1)})
    assert code in {finding.code for finding in findings}
    matching = check({0: _trace(*first), 1: _trace(*first, rank=1)}) if "message" not in code else []
    assert matching == []


def test_messages_that_meet() -> None:
    sends = _trace(_message(1, NodeType.COMM_SEND))
    receives = _trace(_message(1, NodeType.COMM_RECV), rank=1)
    assert check({0: sends, 1: receives}) == []


def test_a_missing_rank() -> None:
    trace = Trace(nodes=[], attrs={"rank": 0, "world_size": 3})
    findings = check({0: trace, 2: Trace(nodes=[], attrs={"rank": 2, "world_size": 3})})
    assert [(finding.code, finding.rank) for finding in findings] == [("missing-rank", 1)]


def test_a_node_that_is_over_before_what_it_needs_starts() -> None:
    late = Node(id=1, name="parent", type=NodeType.COMP, start_ns=50_000, duration_ns=10)
    early = Node(id=2, name="child", type=NodeType.COMP, ctrl_deps=[1], start_ns=20_000, duration_ns=10)
    waits = Node(id=3, name="wait", type=NodeType.COMP, ctrl_deps=[1], start_ns=20_000, duration_ns=40_000)
    assert [(found.code, found.node) for found in check(Trace(nodes=[late, early, waits]))] == [("ends-before-need", 2)]
    assert check(Trace(nodes=[late, waits])) == []
