"""Every synthesised trace is without a finding, is read by the reference reader, and holds what ASTRA-sim reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from meshloom.chakra.check import check
from meshloom.chakra.file import read_all
from meshloom.plan import Plan
from meshloom.synth.inference import Inference, synthesise_inference
from meshloom.synth.roles import find_roles
from tests.synth.steps import config, step

# AllReduce, AllGather, AllToAll, ReduceScatter, Broadcast by Chakra's numbers: those whose replay ASTRA-sim knows
_KNOWN = {0, 2, 6, 7, 5}
STEPS: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "all axes": ("gpt2", "tp2.pp2.dp2", 2, {"layers": 2}),
    "sequence parallel": ("llama", "tp2.sp", 1, {"layers": 2}),
    "reduced pipeline, interleaved": ("llama", "pp4", 8, {"layers": 8, "schedule": "interleaved", "virtual_stages": 2}),
    "bf16": ("gpt2", "tp2.dp2", 1, {"layers": 2, "precision": "bf16"}),
    "fp16": ("gpt2", "tp2.dp2", 6, {"layers": 2, "precision": "fp16"}),
    "shared states": ("llama", "tp2.dp3", 1, {"layers": 2, "zero": 1}),
    "recomputed": ("bert", "tp2.dp2", 1, {"layers": 2, "recompute": "selective"}),
}


@pytest.fixture(params=[*STEPS, "generation"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    if request.param == "generation":
        wanted = Inference(
            config=config("llama", 2), plan=Plan.parse("tp2.pp2"), batch_size=2, num_input_tokens=4, num_output_tokens=8
        )
        synthesise_inference(wanted).write(out)
    else:
        kind, plan, count, more = STEPS[request.param]
        find_roles(step(kind, plan, count, **more)).write(out)
    return out


def test_it_passes_and_others_read_it(folder: Path) -> None:
    traces = read_all(folder)
    assert check(traces) == []
    protolib = pytest.importorskip("chakra.src.third_party.utils.protolib", reason="mlc-chakra is not installed")
    from chakra.schema.protobuf.et_def_pb2 import GlobalMetadata, Node

    for rank, trace in traces.items():
        nodes = []
        with protolib.openFileRd(str(folder / f"rank{rank}.et")) as file:
            assert protolib.decodeMessage(file, GlobalMetadata())
            while protolib.decodeMessage(file, node := Node()):
                nodes.append(node)
        assert len(nodes) == len(trace.nodes) > 0
        _can_be_replayed(nodes, rank, len(traces))


def _can_be_replayed(nodes: list[Any], rank: int, world_size: int) -> None:
    """What the workload layer asks of nodes; see docs/trace-format.md."""
    seen: set[int] = set()
    kinds = set()
    for node in nodes:
        attrs = {attr.name: attr for attr in node.attr}
        assert node.id not in seen
        assert seen.issuperset([*node.data_deps, *node.ctrl_deps]), "needs come first, so there is no cycle"
        seen.add(node.id)
        kinds.add(node.type)
        assert not attrs["is_cpu_op"].bool_val
        if node.type == 4:
            assert attrs["num_ops"].int64_val > 0
            assert attrs["tensor_size"].uint64_val > 0
            continue
        assert attrs["comm_size"].int64_val > 0
        if node.type == 7:
            assert attrs["comm_type"].int64_val in _KNOWN
            assert int(attrs["pg_name"].string_val) > 0
            ranks = list(attrs["comm_ranks"].int64_list.values)
            assert rank in ranks
            assert 1 < len(ranks) <= world_size
        else:
            assert node.type in (5, 6)
            own, other = ("comm_src", "comm_dst") if node.type == 5 else ("comm_dst", "comm_src")
            assert attrs[own].int32_val == rank
            assert 0 <= attrs[other].int32_val < world_size
            assert attrs["comm_tag"].int32_val >= 0
    assert {4, 7} & kinds == {4, 7} or {5, 6} & kinds
