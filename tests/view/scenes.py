"""Traces and folders for the tests of this room."""

from __future__ import annotations

from pathlib import Path

from meshloom.chakra import timeline as timeline_file
from meshloom.chakra.build import Region, TraceBuilder
from meshloom.chakra.cost import Cost, Tensor
from meshloom.chakra.file import write
from meshloom.chakra.timeline import Span, Timeline
from meshloom.chakra.trace import CommType, NodeType, Trace

NASTY = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked=1"> & 한국어'
MS = 1_000_000


def world(num_ranks: int = 2, *, num_layers: int = 3, name: str = "mm_kernel", skew_ns: int = 0) -> dict[int, Trace]:
    """Ranks that multiply (2 ms), add up (1 ms), and wait 0.5 ms; each scope on the host encloses its launch. The
    clock of rank r is `skew_ns`·r ahead."""
    traces = {}
    for rank in range(num_ranks):
        builder = TraceBuilder(rank=rank, world_size=num_ranks, source="capture", model="toy", plan=f"tp{num_ranks}")
        now = MS + rank * skew_ns
        tensor = Tensor((128, 128), 4)
        whole = [Region("x", 0, tensor.num_bytes)]
        for layer in range(num_layers):
            facts = {"phase": "forward", "module": f"h.{layer}.mlp", "dtype": "float32"}
            scope = builder.compute("aten::linear", cost=Cost(0, 0, "host"), is_cpu_op=True, scope=True, thread=7,
                                    lane="host", start_ns=now, duration_ns=300_000, **facts)  # fmt: skip
            launch = builder.compute("aten::mm", cost=Cost(0, 0, "host"), is_cpu_op=True, scope=True, thread=7,
                                     lane="host", start_ns=now + 100_000, duration_ns=100_000, **facts)  # fmt: skip
            builder.compute(name, cost=Cost(2 * 128**3, 3 * tensor.num_bytes, "gemm", (1, 128, 128, 128)),
                            inputs=[tensor, tensor], outputs=[tensor], reads=whole, writes=whole, after=[scope, launch],
                            lane=("stream", 0), stream=0, start_ns=now + MS, duration_ns=2 * MS, **facts)  # fmt: skip
            builder.collective("all_reduce_kernel", comm_type=CommType.ALL_REDUCE, ranks=range(num_ranks),
                               num_bytes=tensor.num_bytes, output_bytes=tensor.num_bytes, reads=whole, writes=whole,
                               stream=1, start_ns=now + 3 * MS, duration_ns=MS, axis="tp", **facts)  # fmt: skip
            now += 4 * MS + MS // 2
        traces[rank] = builder.finish()
    return traces


def predicted(traces: dict[int, Trace]) -> Timeline:
    """Everything one after the other, a kernel 1 ms, a collective 0.5 ms."""
    spans = []
    now = 0
    for rank, trace in traces.items():
        now = 0
        for node in trace.nodes:
            if node.get("op_class") != "host" or node.is_comm:
                length = MS // 2 if node.type == NodeType.COMM_COLL else MS
                track = "communication" if node.is_comm else "compute"
                spans.append(Span(rank, track, node.name, now, length, node.id, "forward", str(node.get("module"))))  # type: ignore[arg-type]
                now += length
    return Timeline(spans=sorted(spans, key=lambda span: span.start_ns), source="predicted", world_size=len(traces),
                    makespan_ns=now, cluster="one host of 8 H100")  # fmt: skip


def run_folder(where: Path, *, name: str = "mm_kernel", num_layers: int = 3) -> Path:
    """A run folder with two ranks, measured and predicted, and the loss of six steps."""
    traces = world(name=name, num_layers=num_layers)
    for rank, trace in traces.items():
        write(trace, where / "trace" / f"rank{rank}.et")
    timeline_file.write(predicted(traces), where / "timeline.json")
    lines = [
        f'{{"step": {step}, "loss": {5 - step / 2}, "tokens_per_second": 1000.0, "memory_bytes": {10**9}}}'
        for step in range(6)
    ]
    (where / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = '{"model": "toy", "plan": "tp2", "max_steps": 6}'
    (where / "run.json").write_text(
        f'{{"state": "finished", "command": {command}, "started": "now"}}', encoding="utf-8"
    )
    return where
