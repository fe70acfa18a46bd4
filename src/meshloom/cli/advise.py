"""`meshloom advise`."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import click
import msgspec

from meshloom.cli.estimate import shape_of_config
from meshloom.errors import UsageError
from meshloom.hardware.cluster import Cluster, load_cluster, load_plain
from meshloom.simulate.advise import Advice, Choice, advise
from meshloom.simulate.shape import Shape
from meshloom.simulate.stack import STACKS

_SHOWN = 10


@click.command()
@click.option("--model", required=True, help="A preset, a config.json, a folder that holds one, or a hub id.")
@click.option("--cluster", default="h100x8", show_default=True, help="A shipped cluster or a TOML file.")
@click.option("--hw-config", type=click.Path(dir_okay=False), help="A plain JSON of devices instead of --cluster.")
@click.option("--devices", type=click.IntRange(1), help="How many devices to use.  [default: all]")
@click.option("--global-batch", required=True, type=click.IntRange(1), help="Sequences a step.")
@click.option("--seq-length", type=click.IntRange(1), help="Tokens.  [default: what the model allows, ≤ 8192]")
@click.option("--memory", help="Memory a device, such as 80GB.  [default: the device's]")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float8"]), default="bfloat16", show_default=True)
@click.option("--stack", type=click.Choice(sorted(STACKS)), default="megatron-core", show_default=True,
              help="The software that would run it.")  # fmt: skip
@click.option("--pareto", type=click.Choice(["memory,time", "time,memory"]), help="Show what nothing beats in both.")
@click.option("--json", "as_json", is_flag=True, help="Print the plans as JSON.")
def command(
    model: str, cluster: str, hw_config: str | None, devices: int | None, global_batch: int, seq_length: int | None,
    memory: str | None, dtype: str, stack: str, pareto: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Search the plans of a model on a cluster: the ten fastest that fit, and what limits the best.

    \b
    Examples:
      meshloom advise --model gpt2 --cluster h100x8 --global-batch 64
      meshloom advise --model llama.json --cluster h100x1024 --global-batch 1024 --memory 80GB --pareto memory,time
    """
    on = load_plain(hw_config) if hw_config else load_cluster(cluster)
    shape, longest = shape_of_model(model)
    advice = advise(
        shape,
        _with_devices(on, devices),
        global_batch=global_batch,
        seq_length=seq_length or min(longest, 8192),
        memory_bytes=_bytes(memory) if memory else 0.0,
        dtype=dtype,
        stack=STACKS[stack],
    )
    shown = (advice.pareto() if pareto else advice.choices)[:_SHOWN]
    if as_json:
        click.echo(msgspec.json.encode([_facts(choice) for choice in shown]).decode())
        return
    click.echo(_table(shown))
    click.echo(_sentence(advice))
    if shape.experts is not None:
        click.echo(
            f"{shape.num_parameters / 1e9:.1f} billion parameters, {shape.num_active_parameters / 1e9:.1f} of them "
            f"met by a token: {shape.experts.per_token} of {shape.experts.count} experts"
        )
    for warning in shown[0].step.warnings:
        click.echo(f"outside the calibrated range: {warning}")


def shape_of_model(model: str) -> tuple[Shape, int]:
    """Dims of a model's config, and the longest sequence that it allows; raises ModelError."""
    from meshloom.model.config import load_config

    return shape_of_config(load_config(model), model)


def _with_devices(cluster: Cluster, devices: int | None) -> Cluster:
    if devices is None:
        return cluster
    if devices <= cluster.devices_per_host:
        return replace(cluster, num_hosts=1, devices_per_host=devices)
    hosts, rest = divmod(devices, cluster.devices_per_host)
    if rest:
        raise UsageError(f"--devices: expected a multiple of {cluster.devices_per_host} devices a host, got {devices}")
    return replace(cluster, num_hosts=hosts)


def _bytes(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|MB|MiB|TB)", text.strip())
    if match is None:
        raise UsageError(f"--memory: expected a number with MB, GB, TB, MiB or GiB, such as 80GB, got {text!r}")
    return float(match[1]) * {"MB": 1e6, "GB": 1e9, "TB": 1e12, "MiB": 2**20, "GiB": 2**30}[match[2]]


def _facts(choice: Choice) -> dict[str, Any]:
    job, step, memory = choice
    return {
        "plan": str(job.plan), "micro_batch": job.micro_batch, "num_micro_batches": job.plan.num_micro_batches,
        "virtual_stages": job.plan.virtual_stages, "recompute": job.plan.recompute, "zero_stage": job.zero_stage,
        "step_s": step.step_s, "tokens_per_second": step.tokens_per_second, "mfu": step.mfu,
        "memory_bytes": round(memory.reserved_bytes),
        "exposed_communication_share": step.exposed_communication_s / step.step_s,
        "bubble_share": step.bubble_s / step.step_s, "limit": step.limit, "warnings": list(step.warnings),
    }  # fmt: skip


def _table(choices: list[Choice]) -> str:
    lines = [f"{'plan':24} {'mb':>3} {'v':>2} {'recompute':9} zero {'step':>9} {'MFU':>6} {'memory':>8} exposed bubble"]
    for choice in choices:
        fact = _facts(choice)
        lines.append(
            f"{fact['plan']:24} {fact['micro_batch']:3} {fact['virtual_stages']:2} {fact['recompute']:9} "
            f"{fact['zero_stage']:4} {_seconds(fact['step_s']):>9} {fact['mfu']:6.1%} "
            f"{fact['memory_bytes'] / 1e9:5.1f} GB "
            f"{fact['exposed_communication_share']:7.1%} {fact['bubble_share']:6.1%}"
        )
    return "\n".join(lines)


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _sentence(advice: Advice) -> str:
    best = advice.choices[0]
    return (
        f"{advice.num_priced:,} plans priced, {advice.num_too_large:,} do not fit; the best, {best.job.plan}, "
        f"is limited by {best.step.limit}"
    )
