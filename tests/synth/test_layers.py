"""From the nodes of a few layers those of many, and what keeps that from being guessed."""

from __future__ import annotations

import msgspec
import pytest

from meshloom.chakra.trace import Node, NodeType
from meshloom.synth.layers import Layers, UnlikeLayers, with_all_layers


def _passes(num_layers: int, num_passes: int) -> tuple[list[Node], list[int]]:
    """Passes of a head, layers of two nodes, and an end; layers keep something for the same layer of the next pass."""
    nodes: list[Node] = []
    begins = []
    keeps: dict[int, int] = {}

    def add(name: str, module: str, data: list[int]) -> int:
        ctrl = [len(nodes)] if nodes and len(nodes) not in data else []
        nodes.append(Node(id=len(nodes) + 1, name=name, type=NodeType.COMP, data_deps=data, ctrl_deps=ctrl,
                          attrs={"module": module} if module else {}))  # fmt: skip
        return len(nodes)

    token: list[int] = []
    for _ in range(num_passes):
        begins.append(len(nodes))
        mask = add("mask", "", [])
        last = add("embed", "wte", token)
        for layer in range(num_layers):
            key = add("key", f"h.{layer}.attn", [last, *([keeps[layer]] if layer in keeps else [])])
            keeps[layer], last = key, add("out", f"h.{layer}", [key, mask, last])
        token = [add("head", "lm_head", [last])]
    return nodes, begins[1:]


def test_layers_are_stamped_out() -> None:
    whole, few = _passes(9, 3), _passes(5, 3)
    assert with_all_layers(*few, Layers("h.", range(5), range(9))) == whole


def test_layers_as_many_as_captured_are_renamed() -> None:
    nodes, begins = _passes(3, 2)
    made, same = with_all_layers(nodes, begins, Layers("h.", range(3), range(4, 7)))
    assert same == begins
    assert made[2].attrs["module"] == "h.4.attn"
    assert [node.data_deps for node in made] == [node.data_deps for node in nodes]


@pytest.mark.parametrize(
    ("index", "change", "told"),
    [
        (8, {"name": "other"}, "layer 3 is not as layer 2: other differs"),
        (8, {"data_deps": [3]}, "layer 3 needs what layer 0 did|layer 3 is not as layer 2"),
        (6, {"attrs": {"module": "h.0"}}, "h.0 runs after layer 1"),
    ],
)
def test_layers_that_are_not_alike_are_refused(index: int, change: dict[str, object], told: str) -> None:
    nodes, begins = _passes(5, 2)
    nodes[index] = msgspec.structs.replace(nodes[index], **change)
    with pytest.raises(UnlikeLayers, match=told):
        with_all_layers(nodes, begins, Layers("h.", range(5), range(9)))
