"""Every reader of files that others may have written: a whole file of each, and how it is read and used.

`test_bad_bytes` damages these files a little, `benchmarks/fuzz.py` for as long as one likes.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from meshloom.capture.convert import convert_rank
from meshloom.capture.notes import read_notes
from meshloom.chakra import file, timeline
from meshloom.chakra.build import TraceBuilder
from meshloom.chakra.check import check
from meshloom.chakra.cost import Cost
from meshloom.chakra.formats import FORMS
from meshloom.chakra.summary import summarize
from meshloom.chakra.text import read_workload, workload_trace
from meshloom.chakra.trace import CommType, Trace
from meshloom.cli.experiments import expand, read_table
from meshloom.cli.generate import _read_prompts
from meshloom.hardware.cluster import load_cluster, load_plain
from meshloom.hardware.device import load_device
from meshloom.model.config import eos_ids, load_config
from meshloom.model.pretrained import _opened, _stored
from meshloom.parallel.written import read_styles
from meshloom.plan import Plan
from meshloom.train.checkpoint import check_checkpoint
from meshloom.train.metrics import _lines_before
from meshloom.train.readers import read
from meshloom.train.recipe import load_recipe
from meshloom.train.runs import read_run
from meshloom.train.sources import File, Kind, Reading, Tally
from meshloom.train.storage import open_tensors, read_index
from meshloom.view.report import report


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """How the file `name` is read; `others` are files that must lie beside it."""

    name: str
    whole: bytes
    use: Callable[[Path], Any]
    others: dict[str, bytes] = field(default_factory=dict)

    def put(self, folder: Path, data: bytes) -> Path:
        """Write the files into `folder`, this one with `data` in it; returns its path."""
        for name, held in {**self.others, self.name: data}.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(held)
        return folder / self.name


def _trace() -> Trace:
    builder = TraceBuilder(rank=0, world_size=2, source="synth", model="toy")
    gemm = Cost(flops=100, num_bytes=10, op_class="gemm", gemm=(1, 2, 3, 4))
    first = builder.compute("mm", cost=gemm, lane="compute", after=[], duration_ns=1500, phase="forward")
    builder.collective("all_reduce", comm_type=CommType.ALL_REDUCE, ranks=[0, 1], num_bytes=8, output_bytes=8,
                       axis="dp", after=[first])  # fmt: skip
    return builder.finish()


def _written(ending: str) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"t{ending}"
        FORMS[ending].write(_trace(), path)
        return path.read_bytes()


def _use_trace(ending: str) -> Callable[[Path], None]:
    def use(path: Path) -> None:
        trace = FORMS[ending].read(path)
        summarize(trace.nodes)
        check(trace)
        FORMS[".et"].write(trace, path.with_name("again.et"))
        FORMS[".json"].write(trace, path.with_name("again.json"))

    return use


def _use_stream(path: Path) -> None:
    for part in file.stream(path, chunk_bytes=max(64, path.stat().st_size // 4)):
        summarize(part.nodes)
    file.read_all(path)


def _use_workload(path: Path) -> None:
    workload_trace(read_workload(path), rank=0, world_size=4, groups={"tp": [0, 1], "dp": [0, 2]})


def _use_dataset(kind: Kind) -> Callable[[Path], None]:
    def use(path: Path) -> None:
        for document in read(File(name=str(path), kind=kind), Reading(), Tally(), lambda share: None):
            for text in [document] if isinstance(document, str) else document:
                text.encode()

    return use


def _use_run(path: Path) -> None:
    run = read_run(path.parent)
    json.dumps(run.facts())
    if run.loss is not None:
        f"{run.loss:.4f}"
    _lines_before(path.parent / "metrics.jsonl", 2)
    report(path.parent)


def _use_cluster(path: Path) -> None:
    cluster = load_cluster(path)
    cluster.check_fits(1)
    cluster.spread((0, 1))
    for curve in cluster.inside_host.collectives.values():
        curve.wire(2)


def _use_stored(path: Path) -> None:
    for file_ in _stored(path.parent).values():
        _opened(file_)


def _use_tensors(path: Path) -> None:
    opened = open_tensors(path)
    for key in opened.keys():  # noqa: SIM118 - no dict
        opened.get_tensor(key)


def _tensors() -> bytes:
    head = json.dumps({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    return struct.pack("<Q", len(head)) + head + bytes(16)


def _parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"text": ["one", "two", "three"]}), out, compression="none")
    return out.getvalue()


def _dumps(table: Any) -> bytes:
    return json.dumps(table).encode()


_TENSOR = {"values": [[1, 1, 0, 4, 4, "cpu"]], "shapes": [[2, 2]], "types": ["Tensor(float)"], "strides": [[2, 1]]}
_HOST = _dumps({"schema": "1.1.1-chakra.0.0.4", "nodes": [
    {"id": 2, "name": "aten::addmm", "ctrl_deps": 1, "inputs": _TENSOR, "outputs": _TENSOR,
     "attrs": [{"name": "rf_id", "type": "uint64", "value": 2}, {"name": "tid", "type": "uint64", "value": 1},
               {"name": "op_schema", "type": "string", "value": "aten::addmm(Tensor a) -> Tensor"}]}]})  # fmt: skip
_DEVICE = _dumps({"traceEvents": [
    {"ph": "X", "cat": "cpu_op", "name": "aten::addmm", "ts": 20.5, "dur": 5, "tid": 3,
     "args": {"Record function id": 2}},
    {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 21, "dur": 1, "tid": 3,
     "args": {"correlation": 2}},
    {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 23.0, "dur": 4, "tid": 7,
     "args": {"correlation": 2, "stream": 7}}], "distributedInfo": {"rank": 0, "world_size": 2}})  # fmt: skip
_SQUAD = {"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q"}]}]}]}
_RUN = {"state": "finished", "started": "s", "command": {"max_steps": 2}, "process": {"pid": 1, "started": 1.0},
        "arguments": ["--model", "gpt2"]}  # fmt: skip
_STEPS = b'{"step": 0, "loss": 2.5, "tokens_per_second": 10.5}\n{"step": 1, "loss": 2.25, "tokens_per_second": 10.5}\n'
_INDEX = {"version": 1, "tensors": {"w": {"dtype": "F32", "shape": [2, 2],
                                          "boxes": [[[0, 0], [2, 2], "model.safetensors", "w"]]}}}  # fmt: skip
_CHECKPOINT = {"version": 1, "files": {"model.safetensors": len(_tensors())}, "step": 3, "plan": "dp2",
               "data": {"seed": 1}, "scheduler": {}}  # fmt: skip
_CONFIG = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 64, "n_positions": 8}
_DEVICE_TOML = b"""name = "toy"
memory_gb = 80
memory_tb_per_second = 3.35
[flops_per_second]
float32 = 1e12
[gemm]
efficiency = 0.5
[collectives.all_reduce]
wire_gb_per_second = 100
by_size = {2 = 1e9}
"""
_CLUSTER_TOML = b"""name = "two"
device = "h100-sxm"
num_hosts = 1
devices_per_host = 2
[inside_host]
name = "nvlink"
bytes_per_second = 450e9
latency_us = 1
[between_hosts]
name = "ib"
bytes_per_second = 50e9
latency_us = 5
"""
_RECIPE = b"""seed = 3
validation = 0.1
[[source]]
data = "a.jsonl"
ratio = 1.0
"""
_EXPERIMENTS = b"""out = "runs/x"
[options]
model = "gpt2"
[matrix]
plan = ["dp2", "tp2"]
"""
_WORKLOAD = b"""MICRO
1
layer -1 5 NONE 0 5 NONE 0 5 ALLREDUCE 64 10
"""


def readers() -> dict[str, Reader]:
    """All readers by name."""
    made = {f"trace{ending}": Reader(name=f"t{ending}", whole=_written(ending), use=_use_trace(ending))
            for ending in FORMS}  # fmt: skip
    feeder = {"workload_graph": [{"Id": 1, "Name": "a", "NodeType": 4, "data_deps": [], "runtime": 5}], "x": 1}
    tensors = {"model.safetensors": _tensors()}
    squad = Reader(name="d.json", whole=_dumps(_SQUAD), use=_use_dataset("squad"))
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    return {
        **made,
        "stream": Reader(name="t.et", whole=_written(".et"), use=_use_stream),
        "feeder": Reader(name="t.json", whole=_dumps(feeder), use=_use_trace(".json")),
        "workload": Reader(name="w.txt", whole=_WORKLOAD, use=_use_workload),
        "timeline": Reader(
            name="timeline.json",
            whole=_dumps({"spans": [[0, "compute", "a", 0, 5, 1]], "source": "measured", "world_size": 1,
                          "makespan_ns": 5}),
            use=lambda path: timeline.read(path).shares(),
        ),
        "notes": Reader(
            name="n.json",
            whole=_dumps({"rank": 0, "world_size": 2, "groups": {"1": [0, 1]}, "axes": {"0,1": "dp"}}),
            use=lambda path: read_notes(path).axis_of([0, 1]),
        ),
        "host": Reader(name="host.json", whole=_HOST, others={"device.json": _DEVICE},
                       use=lambda path: convert_rank(path, path.with_name("device.json"), path.with_name("o.et"))),
        "kineto": Reader(name="device.json", whole=_DEVICE, others={"host.json": _HOST},
                         use=lambda path: convert_rank(path.with_name("host.json"), path, path.with_name("o.et"))),
        "kineto.gz": Reader(name="device.json", whole=gzip.compress(_DEVICE), others={"host.json": _HOST},
                            use=lambda path: convert_rank(path.with_name("host.json"), path, path.with_name("o.et"))),
        "plan": Reader(name="plan", whole=b"tp4.sp.pp2.dp8",
                       use=lambda path: str(Plan.parse(path.read_bytes().decode(errors="replace")))),
        "device.toml": Reader(name="d.toml", whole=_DEVICE_TOML, use=lambda path: load_device(str(path))),
        "cluster.toml": Reader(name="c.toml", whole=_CLUSTER_TOML, use=_use_cluster),
        "plain": Reader(
            name="plain.json",
            whole=_dumps({"devices": [{"name": "x", "tflops": 10, "memory_gb": 8, "bandwidth_gb_s": 100, "count": 2}],
                          "memory": {}, "network": {"bandwidth_gb_s": 10, "latency_us": 5}}),
            use=load_plain,
        ),
        "styles": Reader(name="s.toml", whole=b'[styles]\n"layers.*.up" = "column"\n', use=read_styles),
        "recipe": Reader(name="r.toml", whole=_RECIPE, use=load_recipe),
        "experiments": Reader(
            name="e.toml", whole=_EXPERIMENTS,
            use=lambda path: expand(read_table(str(path)), tiny=False, settings=[], out=None),
        ),
        "run": Reader(name="run/run.json", whole=_dumps(_RUN), others={"run/metrics.jsonl": _STEPS}, use=_use_run),
        "metrics": Reader(name="run/metrics.jsonl", whole=_STEPS, others={"run/run.json": _dumps(_RUN)},
                          use=lambda path: _use_run(path.with_name("run.json"))),
        "squad": squad,
        "squad.gz": Reader(name="d.json.gz", whole=gzip.compress(squad.whole), use=squad.use),
        "jsonl": Reader(name="d.jsonl", whole=lines, use=_use_dataset("jsonl")),
        "jsonl.gz": Reader(name="d.jsonl.gz", whole=gzip.compress(lines), use=_use_dataset("jsonl")),
        "text": Reader(name="d.txt", whole=b"one\n\ntwo\n", use=_use_dataset("text")),
        "text.gz": Reader(name="d.txt.gz", whole=gzip.compress(b"one\n\ntwo\n"), use=_use_dataset("text")),
        "parquet": Reader(name="d.parquet", whole=_parquet(), use=_use_dataset("parquet")),
        "prompts": Reader(name="p.jsonl", whole=b'{"prompt": "a"}\n"b"\n', use=_read_prompts),
        "index": Reader(name="c/state/index.json", whole=_dumps(_INDEX),
                        use=lambda path: read_index(path.parent.parent)),
        "checkpoint": Reader(
            name="c/training_info.json", whole=_dumps(_CHECKPOINT),
            others={"c/state/index.json": _dumps(_INDEX), "c/model.safetensors": _tensors()},
            use=lambda path: check_checkpoint(path.parent),
        ),
        "safetensors": Reader(name="m.safetensors", whole=_tensors(), use=_use_tensors),
        "weight map": Reader(name="model.safetensors.index.json", others=tensors, use=_use_stored,
                             whole=_dumps({"weight_map": {"w": "model.safetensors"}})),
        "config": Reader(name="config.json", whole=_dumps(_CONFIG), use=lambda path: load_config(str(path))),
        "eos": Reader(name="generation_config.json", whole=_dumps({"eos_token_id": [1, 2]}),
                      use=lambda path: eos_ids(str(path.parent), load_config("gpt2-tiny"))),
    }  # fmt: skip


_PIECES = (
    b"", b"null", b"-1", b"1e400", b"1e308", b"-1e308", b"NaN", b"Infinity", b"inf", b"nan", b'"x"', b'""', b"[]",
    b"{}", b"true", b"1.5", b"0", b"\xff", b"\x00", b'"', b"}", b"]", b"9" * 20, b"9" * 5000, b'"\\ud800"', b"../../x",
    b"[" * 100_000, b'{"a":' * 100_000, b"\x80" * 50, b"\xff" * 9, b"\x0a\x00", b"\x08\x01", b"18446744073709551615",
)  # fmt: skip


def damaged(whole: bytes, chance: random.Random) -> bytes:
    """`whole` with one to three pieces of it replaced, doubled, cut off or turned over."""
    data = whole
    for _ in range(chance.choice((1, 1, 2, 3))):
        begin = chance.randrange(len(data) + 1)
        end = min(len(data), begin + chance.choice((0, 1, 1, 2, 5, 20)))
        way = chance.randrange(6)
        if way < 2:
            data = data[:begin] + chance.choice(_PIECES) + data[end:]
        elif way == 2:
            data = data[:begin] + chance.randbytes(end - begin) + data[end:]
        elif way == 3:
            data = data[:end] + data[begin:]
        elif way == 4:
            data = data[:begin]
        elif (other := _other_value(data, chance)) is not None:
            data = other
    return data


_VALUES: tuple[Any, ...] = (
    None, -1, 0, 1 << 31, 1 << 63, 1 << 70, -(1 << 63), 10**400, 1.5, -2.5, 1e308, float("nan"), float("inf"), "", "x",
    "../../x", "/etc/passwd", "\0", "\ud800", [], {}, True, [[1]], [["x"]], {"a": 1}, [None], "9" * 5000,
)  # fmt: skip


def _other_value(data: bytes, chance: random.Random) -> bytes | None:
    """A JSON document with one of its values another, one key away or one entry twice; None if it is none."""
    try:
        document = json.loads(data)
        places, todo = [], [document]
        while todo:
            container = todo.pop()
            for key in container if isinstance(container, dict) else range(len(container)):
                places.append((container, key))
                if isinstance(container[key], dict | list):
                    todo.append(container[key])
        container, key = chance.choice(places)
        way = chance.randrange(8)
        if way == 0:
            del container[key]
        elif way == 1 and isinstance(container, list):
            container.append(container[key])
        else:
            container[key] = chance.choice(_VALUES)
        return json.dumps(document).encode()
    except (ValueError, RecursionError, TypeError, IndexError):
        return None
