"""Files that were damaged at random are repaired or refused with a line; nothing else happens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshloom import read
from meshloom.capture.convert import convert_rank
from meshloom.chakra.check import check
from meshloom.errors import MeshloomError


def _tensor(number: int, shape: list[int]) -> dict[str, Any]:
    size = 4
    return {"values": [[number, number, 0, size, 4, "cpu"]], "shapes": [shape], "types": ["Tensor(float)"],
            "strides": [[2, 1]]}  # fmt: skip


def _pair() -> tuple[bytes, bytes]:
    names = ["aten::linear", "aten::addmm", "c10d::allreduce_"]
    nodes, events = [], []
    for number, name in enumerate(names, start=2):
        attrs = [
            {"name": "rf_id", "type": "uint64", "value": number},
            {"name": "tid", "type": "uint64", "value": 1},
            {"name": "op_schema", "type": "string", "value": f"{name}(Tensor a) -> Tensor"},
        ]
        tensor = _tensor(number, [2, 2])
        nodes.append({"id": number, "name": name, "ctrl_deps": 1, "inputs": tensor, "outputs": tensor, "attrs": attrs})
        args = {"Record function id": number, "External id": number, "Input Dims": [[2, 2]], "Input type": ["float"]}
        events.append({"ph": "X", "cat": "cpu_op", "name": name, "ts": 10.5 * number, "dur": 5, "tid": 3, "args": args})
        launch = {"correlation": number}
        events.append({"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 10.5 * number + 1, "dur": 1,
                       "tid": 3, "args": launch})  # fmt: skip
        kernel = "ncclDevKernel_AllReduce_Sum_f32" if name.startswith("c10d") else "gemm"
        events.append({"ph": "X", "cat": "kernel", "name": kernel, "ts": 10.5 * number + 3, "dur": 4, "tid": 7,
                       "args": {**launch, "stream": 7, "Group size": 2}})  # fmt: skip
    host = {"schema": "1.1.1-chakra.0.0.4", "nodes": nodes}
    device = {"traceEvents": events, "distributedInfo": {"rank": 0, "world_size": 2}}
    return json.dumps(host).encode(), json.dumps(device).encode()


HOST, DEVICE = _pair()


def test_the_pair_itself(tmp_path: Path) -> None:
    (tmp_path / "host.json").write_bytes(HOST)
    (tmp_path / "device.json").write_bytes(DEVICE)
    trace, warnings = convert_rank(tmp_path / "host.json", tmp_path / "device.json", tmp_path / "rank0.et")
    assert warnings == []
    assert sum(node.is_comm for node in trace.nodes) == 1
    assert check(trace) == []


# what to put where: other JSON values in the place of numbers and texts, and bytes anywhere
_PIECES = st.sampled_from(
    [b"null", b"-1", b"1e400", b'"x"', b"[]", b"{}", b"1.5", b"\xff", b'"', b"}", b"", b"99999999999999999999"]
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.booleans(), st.floats(0, 1), st.integers(0, 12), _PIECES)
def test_damage_is_repaired_or_refused(tmp_path: Path, at_host: bool, where: float, length: int, piece: bytes) -> None:
    def damaged(data: bytes) -> bytes:
        begin = int(where * len(data))
        return data[:begin] + piece + data[begin + length :]

    (tmp_path / "host.json").write_bytes(damaged(HOST) if at_host else HOST)
    (tmp_path / "device.json").write_bytes(DEVICE if at_host else damaged(DEVICE))
    _convert(tmp_path)


def _values(document: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON document: (container, key)."""
    places, todo = [], [document]
    while todo:
        container = todo.pop()
        for key in container if isinstance(container, dict) else range(len(container)):
            places.append((container, key))
            if isinstance(container[key], dict | list):
                todo.append(container[key])
    return places


_VALUES: list[Any] = [None, -1, 1 << 70, 1.5, "x", "", [], {}, True, [[1]], [["x"]]]


@pytest.mark.parametrize("which", ["host", "device"])
def test_each_value_may_be_another(tmp_path: Path, which: str) -> None:
    whole = {"host": HOST, "device": DEVICE}
    for index in range(len(_values(json.loads(whole[which])))):
        for value in _VALUES:
            document = json.loads(whole[which])
            container, key = _values(document)[index]
            container[key] = value
            for name, data in whole.items():
                (tmp_path / f"{name}.json").write_bytes(json.dumps(document).encode() if name == which else data)
            _convert(tmp_path)


def _convert(folder: Path) -> None:
    out = folder / "rank0.et"
    out.unlink(missing_ok=True)
    for device in (folder / "device.json", None):
        try:
            trace, _ = convert_rank(folder / "host.json", device, out)
        except MeshloomError as error:
            told, whole = str(error), device is not None
        else:
            told, whole = str(folder), False
            assert read(out) == trace
        assert str(folder) in told or "rank" in told
        assert not (whole and out.exists()), "what was refused leaves nothing behind"
