"""TraceBuilder: dependencies by storage and by lane."""

from __future__ import annotations

from meshloom import TraceBuilder
from meshloom.chakra.build import Region, group_id
from meshloom.chakra.cost import Cost
from meshloom.chakra.trace import CommType

WORK = Cost(1, 1, "memory")


def _builder() -> TraceBuilder:
    return TraceBuilder(rank=0, world_size=4, source="test")


def test_a_read_depends_on_the_last_writers_of_its_bytes() -> None:
    builder = _builder()
    left = builder.compute("left", cost=WORK, writes=[Region("s", 0, 8)])
    right = builder.compute("right", cost=WORK, writes=[Region("s", 8, 16)])
    both = builder.compute("both", cost=WORK, reads=[Region("s", 4, 12)])
    outside = builder.compute("outside", cost=WORK, reads=[Region("s", 16, 20)])
    nodes = {node.id: node for node in builder.finish().nodes}
    assert nodes[both].data_deps == [left, right]
    assert nodes[outside].data_deps == []


def test_an_overwrite_hides_only_what_it_covers() -> None:
    builder = _builder()
    whole = builder.compute("whole", cost=WORK, writes=[Region("s", 0, 16)])
    middle = builder.compute("middle", cost=WORK, writes=[Region("s", 4, 8)])
    assert builder.finish().nodes[-1].data_deps == [whole], "an overwrite waits for the write it covers"
    inside = builder.compute("inside", cost=WORK, reads=[Region("s", 4, 8)])
    around = builder.compute("around", cost=WORK, reads=[Region("s", 0, 16)])
    nodes = {node.id: node for node in builder.finish().nodes}
    assert nodes[inside].data_deps == [middle]
    assert sorted(nodes[around].data_deps) == [whole, middle]


def test_a_lane_keeps_its_order_and_does_not_repeat_data_dependencies() -> None:
    builder = _builder()
    first = builder.compute("first", cost=WORK, writes=[Region("s", 0, 4)], lane="compute")
    second = builder.compute("second", cost=WORK, reads=[Region("s", 0, 4)], lane="compute")
    third = builder.compute("third", cost=WORK, lane="compute")
    nodes = {node.id: node for node in builder.finish().nodes}
    assert (nodes[second].data_deps, nodes[second].ctrl_deps) == ([first], [])
    assert (nodes[third].data_deps, nodes[third].ctrl_deps) == ([], [second])


def test_collectives_of_a_group_keep_their_order() -> None:
    builder = _builder()
    make = {"comm_type": CommType.ALL_REDUCE, "num_bytes": 4, "output_bytes": 4}
    one = builder.collective("a", ranks=(0, 1), **make)  # type: ignore[arg-type]
    other = builder.collective("b", ranks=(0, 2), **make)  # type: ignore[arg-type]
    again = builder.collective("c", ranks=(0, 1), **make)  # type: ignore[arg-type]
    nodes = {node.id: node for node in builder.finish().nodes}
    assert nodes[other].ctrl_deps == []
    assert nodes[again].ctrl_deps == [one]


def test_what_consumers_of_chakra_need_is_never_zero() -> None:
    builder = _builder()
    builder.compute("view", cost=Cost(0, 0, "host"))
    node = builder.finish().nodes[0]
    assert node.get("num_ops") == 1
    assert node.get("tensor_size") == 1


def test_group_ids_are_integers_above_zero_and_the_world_is_one() -> None:
    assert group_id(range(4), 4) == "1"
    ids = {group_id((first, second), 64) for first in range(64) for second in range(first)}
    assert len(ids) == 64 * 63 // 2
    assert all(1 < int(name) < 2**31 for name in ids)
