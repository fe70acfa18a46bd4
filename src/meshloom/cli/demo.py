"""`meshloom demo`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from meshloom.chakra.check import check
from meshloom.chakra.file import read_all
from meshloom.cli import synth as synth_command
from meshloom.cli import train as train_command
from meshloom.cli.simulate import predict, sentence
from meshloom.cli.view import draw_to
from meshloom.errors import RunFailed
from meshloom.view.report import report


@click.command()
@click.option("--out", help="The run folder, new or empty.  [default: runs/gpt2-tiny.dp2.<time>]")
@click.option("--max-steps", default=20, show_default=True, type=click.IntRange(4), help="Training steps.")
@click.option("--synth-plan", default="tp2.dp2", show_default=True, help="The plan that is synthesised.")
@click.option("--cluster", default="h100x8", show_default=True, help="A shipped cluster or a TOML file.")
def command(out: str | None, max_steps: int, synth_plan: str, cluster: str) -> None:
    """The whole road in one go, on a small GPT-2 and two processes: train, trace, check, synthesise, simulate, report.

    \b
    Example:
      meshloom demo
    """
    begin = time.monotonic()
    click.echo("1. train on two ranks, record one step on each")
    folder = train_command.train(
        model="gpt2-tiny",
        data=("sample",),
        tokenizer="bytes",
        plan="dp2",
        max_steps=max_steps,
        batch_size=4,
        gradient_accumulation=1,
        seq_length=128,
        learning_rate=2e-3,
        weight_decay=0.1,
        max_grad_norm=1.0,
        seed=0,
        objective=None,
        device="auto",
        out=out,
        trace=True,
        trace_step=None,
    )
    assert folder is not None
    result = train_command.outcome(folder)
    click.echo(f"   loss {result['first_loss']:.4f} -> {result['last_loss']:.4f}")
    click.echo("2. check the captured traces")
    _check(folder / "trace")
    click.echo(f"3. synthesise the same model on {synth_plan}: no processes")
    synth_folder = folder / f"synth.{synth_plan}"
    files, num_nodes = synth_command.synth(
        model="gpt2-tiny",
        plan=synth_plan,
        micro_batch=4,
        gradient_accumulation=1,
        seq_length=128,
        objective=None,
        out=synth_folder,
    )
    click.echo(f"   {len(files)} traces of {num_nodes:,} nodes each")
    _check(synth_folder)
    click.echo("4. simulate both")
    for where in (folder, synth_folder):
        timeline, _ = predict(where, cluster)
        click.echo(f"   {where.name if where != folder else 'captured dp2'}: {sentence(timeline)}")
    click.echo("5. draw")
    draw_to(read_all(synth_folder)[0], folder / "graph.svg")
    report(folder)
    click.echo(f"   {_listing(folder)}")
    click.echo(f"done in {time.monotonic() - begin:.0f} s; everything lies in {folder}")


def _check(folder: Path) -> None:
    traces = read_all(folder)
    findings = check(traces)
    for finding in findings:
        click.echo(f"   {finding}")
    if findings:
        raise RunFailed(f"{folder}: {len(findings)} faults in the traces; this is a bug of Meshloom, please report it")
    click.echo(f"   {len(traces)} ranks, {sum(len(trace.nodes) for trace in traces.values()):,} nodes: no fault")


def _listing(folder: Path) -> str:
    names = ["report.html", "graph.svg", "timeline.json", "metrics.jsonl", "trace/rank0.et", "trace/rank1.et"]
    return "  ".join(name for name in names if (folder / name).exists())
