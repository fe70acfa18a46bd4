"""What the device's side tells: waits between streams, graphs, all-to-all, messages, and either file alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from meshloom import Node, Trace, check
from meshloom.capture.convert import convert_rank
from meshloom.chakra.summary import summarize
from meshloom.chakra.trace import CommType, NodeType
from meshloom.errors import TraceError


def _event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def _alone(tmp_path: Path, *events: dict[str, Any], world_size: int = 1) -> tuple[Trace, list[str]]:
    told = {"traceEvents": events, "distributedInfo": {"rank": 0, "world_size": world_size}}
    (tmp_path / "device.json").write_text(json.dumps(told))
    return convert_rank(tmp_path / "device.json", None, tmp_path / "rank0.et")


def _named(trace: Trace) -> dict[str, Node]:
    return {node.name: node for node in trace.nodes}


def test_streams_wait_for_the_events_of_others(tmp_path: Path) -> None:
    trace, _ = _alone(
        tmp_path,
        _event("cpu_op", "aten::mm", 0, 100),
        _event("cuda_runtime", "cudaLaunchKernel", 1, 1, correlation=1),
        _event("kernel", "before", 5, 10, tid=7, stream=7, correlation=1),
        _event("cuda_runtime", "cudaEventRecord", 3, 1, correlation=2),
        _event("cuda_runtime", "cudaLaunchKernel", 5, 1, correlation=3),
        _event("kernel", "after the event", 20, 10, tid=7, stream=7, correlation=3),
        _event("cuda_runtime", "cudaStreamWaitEvent", 7, 1, correlation=4),
        _event("cuda_sync", "Stream Wait Event", 7, 1, tid=20, stream=20, correlation=4, wait_on_stream=7,
               wait_on_cuda_event_record_corr_id=2),
        _event("cuda_runtime", "cudaLaunchKernel", 9, 1, correlation=5),
        _event("kernel", "waiting", 16, 5, tid=20, stream=20, correlation=5),
        _event("cuda_runtime", "cudaEventSynchronize", 50, 20, correlation=6),
        _event("cuda_sync", "Event Sync", 50, 20, tid=7, stream=-1, correlation=6, wait_on_stream=7,
               wait_on_cuda_event_record_corr_id=2),
        _event("cpu_op", "aten::item", 110, 10),
    )  # fmt: skip
    nodes = _named(trace)
    before, later, waiting = (nodes[name].id for name in ("before", "after the event", "waiting"))
    assert before in nodes["waiting"].ctrl_deps
    assert later not in nodes["waiting"].ctrl_deps
    assert before in nodes["aten::item"].ctrl_deps  # the host waited for the event, not for what came after it
    assert not {later, waiting} & set(nodes["aten::item"].ctrl_deps)
    assert check(trace) == []


def test_the_kernels_of_a_graph_belong_to_its_launch(tmp_path: Path) -> None:
    trace, warnings = _alone(
        tmp_path,
        _event("user_annotation", "replay", 0, 10),
        _event("cuda_runtime", "cudaGraphLaunch", 1, 5, correlation=9),
        *(_event("kernel", f"kernel{number}", 10 * number, 9, tid=7, stream=7, correlation=9) for number in (1, 2, 3)),
    )
    nodes = _named(trace)
    assert [nodes[f"kernel{number}"].ctrl_deps for number in (1, 2, 3)] == [[1], [1, 2], [1, 3]]
    assert not any("no launch" in warning for warning in warnings)


def test_messages_that_the_device_file_tells(tmp_path: Path) -> None:
    kernel = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"
    told = {"Collective name": "send", "dtype": "Float", "In msg nelems": 256, "Out msg nelems": 256}
    trace, _ = _alone(
        tmp_path,
        _event("kernel", kernel, 1, 2, tid=9, stream=9, correlation=1, **told, **{"Src Rank": 0, "Dst Rank": 3}),
        world_size=4,
    )
    (node,) = trace.nodes
    assert node.type is NodeType.COMM_SEND
    assert [node.get(name) for name in ("comm_src", "comm_dst", "comm_size")] == [0, 3, 1024]


def test_a_communication_that_nothing_explains_stays_a_kernel_and_is_told(tmp_path: Path) -> None:
    trace, warnings = _alone(
        tmp_path, _event("kernel", "ncclDevKernel_Generic(…)", 1, 2, tid=9, stream=9, correlation=1)
    )
    assert [node.type for node in trace.nodes] == [NodeType.COMP]
    assert any("it stays a kernel" in warning for warning in warnings)


@pytest.mark.shared
def test_waits_of_a_real_file(shared: Path, tmp_path: Path) -> None:
    path = shared / "traces" / "single_files" / "hta_alexnet_1xA100_cuda_sync.kineto.json.gz"
    trace, warnings = convert_rank(path, None, tmp_path / "a.et")
    assert check(trace) == []
    assert any("no data dependencies" in warning for warning in warnings)
    streams = {node.id: node.get("stream") for node in trace.nodes if node.get("stream") is not None}
    assert Counter(streams.values()).total() == 79 + 16 + 3
    across = [
        (streams[dep], streams[node.id])
        for node in trace.nodes
        if node.id in streams
        for dep in node.ctrl_deps
        if dep in streams and streams[dep] != streams[node.id]
    ]
    assert set(streams.values()) == {7, 20}  # the file's other 14 waits are for streams that run nothing
    assert across == [(7, 20), (7, 20), (20, 7), (7, 20), (7, 20), (20, 7)]


@pytest.mark.shared
def test_all_to_all_of_a_real_file(shared: Path, tmp_path: Path) -> None:
    path = shared / "traces" / "single_files" / "hta_sampled_rank0of128.kineto.json.gz"
    trace, warnings = convert_rank(path, None, tmp_path / "a.et")
    assert trace.get("world_size") == 128
    kinds = Counter(CommType(node.get("comm_type")) for node in trace.nodes if node.is_comm)
    assert kinds == {CommType.ALL_REDUCE: 4, CommType.ALL_TO_ALL: 4, CommType.ALL_GATHER: 2}
    assert all(node.get("comm_size") > 0 for node in trace.nodes if node.is_comm)
    assert any("its ranks are left out" in warning for warning in warnings)


@pytest.mark.shared
def test_either_file_alone_agrees_with_the_pair(shared: Path, tmp_path: Path) -> None:
    folder = shared / "traces" / "single_files"
    host = folder / "param_resnet_1gpu_schema1.0.3.host.json.gz"
    device = folder / "hta_nccl_metadata_rank0of2_A100.kineto.json.gz"
    pair, _ = convert_rank(host, device, tmp_path / "pair.et")
    only_device, _ = convert_rank(device, None, tmp_path / "device.et")
    only_host, _ = convert_rank(host, None, tmp_path / "host.et", rank=0)
    traffic = summarize(pair.nodes).traffic
    assert sum(item.count for item in traffic) == 21
    assert summarize(only_device.nodes).traffic == traffic == summarize(only_host.nodes).traffic
    assert {tuple(node.get("comm_ranks")) for node in pair.nodes if node.is_comm} == {(0, 1)}
    assert len(only_device.nodes) == len(pair.nodes)
    assert any(node.data_deps for node in only_host.nodes)


def test_a_file_that_is_neither(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"layers": []}')
    with pytest.raises(TraceError, match="expected a PyTorch execution trace or a Kineto trace"):
        convert_rank(tmp_path / "a.json", None, tmp_path / "rank0.et")


def _pair(tmp_path: Path, *, waits_for: int) -> dict[str, Node]:
    """A product, two collectives after one another, a wait for the `waits_for`-th, and a kernel after it.

    As PyTorch's NCCL groups write it by default: the driver's words on waits are not in the device file.
    """
    half = [[1, 1, 0, 64, 4, "cuda:0"]]
    nccl = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevComm*)"

    def node(number: int, name: str, inputs: list[Any], schema: str = "") -> dict[str, Any]:
        types = ["GenericList[Tensor(float)]" if type(value) is list and value else "Int" for value in inputs]
        return {"name": name, "id": number, "rf_id": number, "parent": 1, "fw_parent": 0, "seq_id": -1, "scope": 0,
                "tid": 1, "fw_tid": 0, "op_schema": schema, "inputs": inputs, "input_shapes": [[]] * len(inputs),
                "input_types": types, "outputs": [], "output_shapes": [], "output_types": []}  # fmt: skip

    def params(number: int, what: list[Any], name: str) -> dict[str, Any]:
        return node(number, "record_param_comms", [*what, 40 + number // 10, 7, 0, name, [], [], 2])

    nodes = [node(2, "fused", []), params(11, [half], "allreduce"), params(21, [half], "allreduce"),
             node(32, "fused", []), params(10 * waits_for + 2, [], "wait"), node(34, "fused", []),
             node(10, "c10d::allreduce_", [half, 0, 0], "c10d::allreduce_(Tensor[] a) -> ()"),
             node(20, "c10d::allreduce_", [half, 0, 0], "c10d::allreduce_(Tensor[] a) -> ()")]  # fmt: skip
    (tmp_path / "host.json").write_text(json.dumps({"schema": "1.0.1", "nodes": nodes}))
    told = {"rank": 0, "world_size": 2, "pg_config": [{"pg_name": "0", "ranks": [0, 1]}]}

    def op(number: int, name: str, ts: float, dur: float) -> dict[str, Any]:
        return _event("cpu_op", name, ts, dur, **{"Record function id": number})

    def launched(name: str, correlation: int, ts: float, stream: int, start: float, dur: float) -> list[Any]:
        return [_event("cuda_runtime", "cudaLaunchKernel", ts, 1, correlation=correlation),
                _event("kernel", name, start, dur, tid=stream, stream=stream, correlation=correlation)]  # fmt: skip

    events = [
        op(2, "fused", 0, 3), *launched("product", 1, 1, 7, 10, 10),
        op(10, "c10d::allreduce_", 10, 6), op(11, "record_param_comms", 11, 4), *launched(nccl, 2, 12, 24, 20, 20),
        op(20, "c10d::allreduce_", 20, 6), op(21, "record_param_comms", 21, 4), *launched(nccl, 3, 22, 24, 40, 20),
        op(32, "fused", 30, 3), *launched("beside", 4, 31, 7, 31.5, 5),
        op(10 * waits_for + 2, "record_param_comms", 35, 1),
        op(34, "fused", 38, 3), *launched("after", 5, 39, 7, 20 + 20 * waits_for, 5),
    ]  # fmt: skip
    (tmp_path / "device.json").write_text(json.dumps({"traceEvents": events, "distributedInfo": told}))
    trace, _ = convert_rank(tmp_path / "host.json", tmp_path / "device.json", tmp_path / "rank0.et")
    assert check(trace) == []
    kernels = [each for each in trace.nodes if each.get("stream") is not None]
    return dict(zip(("product", "first", "second", "beside", "after"), kernels))


@pytest.mark.parametrize("waits_for", [1, 2])
def test_what_pytorch_notes_of_waits_orders_the_streams(tmp_path: Path, waits_for: int) -> None:
    nodes = _pair(tmp_path, waits_for=waits_for)
    ids = {name: node.id for name, node in nodes.items()}
    assert ids["product"] in nodes["first"].ctrl_deps  # a collective begins after what its thread launched before
    assert not {ids["first"], ids["second"]} & {*nodes["beside"].ctrl_deps, *nodes["beside"].data_deps}
    waited, other = ("first", "second") if waits_for == 1 else ("second", "first")
    assert ids[waited] in nodes["after"].ctrl_deps
    assert ids[other] not in nodes["after"].ctrl_deps


@pytest.mark.shared
def test_what_computes_next_waits_for_each_all_reduce_of_megatron(shared: Path, tmp_path: Path) -> None:
    folder = shared / "traces" / "megatron_gpt8b_tp8_8xA100"
    trace, _ = convert_rank(folder / "host_0.json.gz", folder / "device_0.json.gz", tmp_path / "a.et")
    kernels = [node for node in trace.nodes if node.get("stream") is not None]
    waited = 0
    for place, node in enumerate(kernels):
        if node.is_comm:
            after = next(each for each in kernels[place:] if each.get("stream") != node.get("stream"))
            waited += node.id in after.ctrl_deps or node.id in after.data_deps
    assert waited == sum(node.is_comm for node in kernels) == 84
