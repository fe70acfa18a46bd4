"""`meshloom simulate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from meshloom.chakra import timeline as timeline_file
from meshloom.chakra.file import read_all
from meshloom.chakra.timeline import Timeline
from meshloom.cli.estimate import job_of, lines_of, shape_of_config, told_of
from meshloom.errors import UsageError
from meshloom.hardware.cluster import Cluster, load_cluster, load_plain
from meshloom.plan import Plan
from meshloom.simulate.engine import simulate
from meshloom.simulate.program import Durations

if TYPE_CHECKING:
    from meshloom.simulate.outcome import Outcome

_RANKS, _OPS = 16, 10  # rows of the tables
_PATH = 5000  # ops of the critical path in JSON


@click.command()
@click.argument("where", metavar="[TRACE|DIR]", required=False)
@click.option("--model", help="A preset, a config.json, a folder or a hub id in the place of traces.")
@click.option("--plan", help="With --model: how the work is cut.  [default: dp1]")
@click.option("--micro-batch", type=click.IntRange(1), help="With --model: sequences a micro-batch.  [default: 1]")
@click.option("--gradient-accumulation", type=click.IntRange(1), help="With --model: micro-batches.  [default: 1]")
@click.option("--schedule", type=click.Choice(["gpipe", "1f1b", "interleaved", "zero-bubble"]),
              help="With --model: of the pipeline.  [default: 1f1b]")  # fmt: skip
@click.option("--virtual-stages", type=click.IntRange(1), help="With --model: stages a rank.  [default: 1]")
@click.option("--recompute", type=click.Choice(["none", "selective", "full"]), help="With --model.  [default: none]")
@click.option("--seq-length", type=click.IntRange(1), help="With --model.  [default: what the model allows, ≤ 8192]")
@click.option("--out", type=click.Path(file_okay=False), help="With --model: a folder to write timeline.json into.")
@click.option("--cluster", default="h100x8", show_default=True, help="A shipped cluster or a TOML file.")
@click.option("--hw-config", type=click.Path(dir_okay=False), help="A plain JSON of devices instead of --cluster.")
@click.option("--compute", type=click.Choice(["model", "measured"]), default="model", show_default=True,
              help="Where durations come from: the cluster's model, or the traces themselves.")  # fmt: skip
@click.option("--tokens", type=click.IntRange(1), help="Tokens of a step, for traces that do not tell.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    where: str | None, cluster: str, hw_config: str | None, compute: Any, tokens: int | None, as_json: bool,
    model: str | None, **sizes: Any,
) -> None:  # fmt: skip
    """Predict a step on a cluster: time, tokens/s, MFU, where each rank's time goes, the critical path, memory.

    Of traces, beside which timeline.json is written for `view` and `report`; or of a model and a plan.

    \b
    Examples:
      meshloom simulate runs/gpt2-tiny.dp2.20261121-120000 --cluster h100x8
      meshloom simulate --model gpt3-175b --plan tp8.pp8.dp2 --gradient-accumulation 64 --cluster a100x1024
    """
    if (where is None) == (model is None):
        raise UsageError("simulate: expected a trace, a folder of them, or --model")
    on = load_plain(hw_config) if hw_config else load_cluster(cluster)
    if model is not None:
        if tokens is not None or compute == "measured":
            raise UsageError("simulate --model: expected without --tokens and --compute measured, which are of traces")
        _of_model(model, on, as_json=as_json, **sizes)
        return
    given = [f"--{name.replace('_', '-')}" for name, value in sizes.items() if value is not None]
    if given:
        raise UsageError(f"{given[0]}: expected --model with it; traces have sizes of their own")
    _of_traces(Path(str(where)), on, compute, tokens, as_json=as_json)


def _of_traces(where: Path, on: Cluster, durations: Durations, tokens: int | None, *, as_json: bool) -> None:
    from meshloom.simulate.outcome import predict as predict_outcome

    outcome = predict_outcome(read_all(where), on, durations=durations, num_tokens=tokens)
    folder = where if where.is_dir() else where.parent
    path = timeline_file.write(outcome.timeline, folder / "timeline.json")
    if as_json:
        told = {**shares(outcome.timeline), **facts_of(outcome), "timeline": str(path)}
        click.echo(msgspec.json.encode(told).decode())
        return
    click.echo(sentence(outcome.timeline, outcome.world_size))
    print_outcome(outcome)
    click.echo(f"timeline: {path}")


def _of_model(
    model: str, on: Cluster, *, as_json: bool, plan: str | None, micro_batch: int | None,
    gradient_accumulation: int | None, schedule: Any, virtual_stages: int | None, recompute: Any,
    seq_length: int | None, out: str | None,
) -> None:  # fmt: skip
    from meshloom.model.config import load_config
    from meshloom.simulate.imagined import predict_job

    config = load_config(model)
    _, longest = shape_of_config(config, model)
    cut = replace(
        Plan.parse(plan or "dp1"), num_micro_batches=gradient_accumulation or 1, recompute=recompute or "none",
        virtual_stages=virtual_stages or 1, schedule=schedule or ("interleaved" if virtual_stages else "1f1b"),
    )  # fmt: skip
    job = job_of(
        config, model, cut, on, batch_size=micro_batch or 1, seq_length=seq_length or min(longest, 8192),
        precision="bf16", stack="megatron-core",
    )  # fmt: skip
    told, outcome = told_of(job), predict_job(job)
    files = {}
    if out is not None:
        files["timeline"] = str(timeline_file.write(outcome.timeline, Path(out) / "timeline.json"))
    if as_json:
        played = {"event_by_event": {"step_time_ns": outcome.step_ns, **facts_of(outcome)}}
        click.echo(msgspec.json.encode({"model": model, "plan": str(cut), **told, **played, **files}).decode())
        return
    click.echo(f"{model}, plan {cut} on {cut.world_size} ranks, as {told['stack']} would run it")
    for line in lines_of(told):
        click.echo(line)
    click.echo(f"event by event: {outcome.step_ns / 1e6:,.1f} ms, one rank of each pipeline stage below")
    print_outcome(outcome, memory_only=True)
    for path in files.values():
        click.echo(f"timeline: {path}")


def facts_of(outcome: Outcome) -> dict[str, Any]:
    """All that the prediction tells, as JSON takes it."""
    from meshloom.simulate.outcome import path_ops, path_parts

    whole, fullest = max(1, outcome.step_ns), outcome.fullest
    return {
        "world_size": outcome.world_size,
        "tokens_per_second": outcome.tokens_per_second,
        "mfu": outcome.mfu,
        "hfu": outcome.hfu,
        "ranks": [
            {**rank._asdict(), **{f"{part}_share": getattr(rank, f"{part}_ns") / whole for part in _PARTS}}
            for rank in outcome.ranks
        ],
        "critical_path": {
            "num_ops": len(outcome.path),
            **{f"{name}_ns": value for name, value in path_parts(outcome.path).items()},
            "ops": [
                {"name": name, "kind": kind, "count": count, "time_ns": time_ns}
                for name, kind, count, time_ns in path_ops(outcome.path)
            ],
            "path": [op._asdict() for op in outcome.path[:_PATH]],
        },
        "memory": {
            "capacity_bytes": outcome.capacity_bytes,
            "peak_bytes": fullest.peak_bytes if fullest else None,
            "fits": fullest.peak_bytes <= outcome.capacity_bytes if fullest else None,
            "ranks": [usage._asdict() for usage in outcome.memory],
        },
        "unknown": list(outcome.unknown),
    }


_PARTS = ("compute", "exposed_communication", "bubble", "idle")


def print_outcome(outcome: Outcome, *, memory_only: bool = False) -> None:
    """Tables and sentences of a prediction; `memory_only` leaves out tokens and MFU, which were told before."""
    from meshloom.simulate.outcome import path_ops, path_parts

    if not memory_only:
        rates = [f"{outcome.tokens_per_second:,.0f} tokens/s"] if outcome.tokens_per_second else []
        rates += [f"MFU {outcome.mfu:.1%}"] if outcome.mfu is not None else []
        rates += [f"HFU {outcome.hfu:.1%}"] if outcome.hfu is not None else []
        if rates:
            click.echo(", ".join(rates))
    whole = max(1, outcome.step_ns)
    click.echo(f"{'rank':>6} {'compute':>8} {'exposed':>8} {'bubble':>8} {'idle':>8} {'peak memory':>12}")
    usages = {rank: usage for usage in outcome.memory for rank in usage.ranks}
    for rank in outcome.ranks[:_RANKS]:
        parts = " ".join(f"{getattr(rank, f'{part}_ns') / whole:8.1%}" for part in _PARTS)
        peak = _size(usages[rank.rank].peak_bytes) if rank.rank in usages else ""
        click.echo(f"{rank.rank:6} {parts} {peak:>12}".rstrip())
    if len(outcome.ranks) > _RANKS:
        click.echo(f"   ... {len(outcome.ranks) - _RANKS:,} more ranks; --json has them all")
    parts_of_path = ", ".join(f"{name} {value / 1e6:,.3f} ms" for name, value in path_parts(outcome.path).items())
    click.echo(f"critical path: {len(outcome.path):,} ops; {parts_of_path}")
    for name, kind, count, time_ns in path_ops(outcome.path)[:_OPS]:
        told = name if len(name) <= 60 else f"{name[:57]}..."
        click.echo(f"  {time_ns / whole:6.1%} {time_ns / 1e6:12,.3f} ms {count:7,} × {told} ({kind})")
    fullest = outcome.fullest
    if fullest is not None:
        fits = "" if fullest.peak_bytes <= outcome.capacity_bytes else "  DOES NOT FIT"
        click.echo(
            f"memory: {_size(fullest.peak_bytes)} at the peak of rank {fullest.ranks[0]}, "
            f"{fullest.peak_at_ns / whole:.0%} into the step, {_size(fullest.held_bytes)} before it; "
            f"the device has {_size(outcome.capacity_bytes)}{fits}"
        )
    for each in outcome.unknown:
        click.echo(f"not known: {each}")


def _size(num_bytes: int) -> str:
    unit, name = (1e9, "GB") if num_bytes >= 1e9 else (1e6, "MB")
    return f"{num_bytes / unit:.2f} {name}"


def predict(
    where: str | Path, cluster: str, *, hw_config: str | None = None, durations: Durations = "model"
) -> tuple[Timeline, Path]:
    """The predicted timeline of the traces at `where`, and the file beside them into which it was written."""
    where = Path(where)
    on = load_plain(hw_config) if hw_config else load_cluster(cluster)
    timeline = simulate(read_all(where), on, durations=durations)
    folder = where if where.is_dir() else where.parent
    return timeline, timeline_file.write(timeline, folder / "timeline.json")


def shares(timeline: Timeline) -> dict[str, Any]:
    """Step time, and the mean shares over all ranks."""
    ranks = timeline.shares()
    whole = max(1, timeline.makespan_ns * len(ranks))
    return {
        "cluster": timeline.cluster,
        "world_size": timeline.world_size,
        "step_time_ns": timeline.makespan_ns,
        "compute_share": sum(rank.compute_ns for rank in ranks) / whole,
        "exposed_communication_share": sum(rank.exposed_communication_ns for rank in ranks) / whole,
        "idle_share": sum(rank.idle_ns for rank in ranks) / whole,
        "communication_share": sum(rank.communication_ns for rank in ranks) / whole,
    }


def sentence(timeline: Timeline, world_size: int | None = None) -> str:
    """Step time and shares in one line."""
    told = shares(timeline)
    count, traced = world_size or told["world_size"], told["world_size"]
    ranks = f"{count} rank{'s' * (count > 1)}" + (f", {traced} of them traced" if traced < count else "")
    return (
        f"predicted on {told['cluster']}: step {told['step_time_ns'] / 1e6:.3f} ms on {ranks}; "
        f"compute {told['compute_share']:.1%}, exposed communication "
        f"{told['exposed_communication_share']:.1%}, idle {told['idle_share']:.1%}"
    )
