"""`meshloom train --dry-run`: what a run would be, with nothing started and nothing written."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from meshloom.cli.estimate import cluster_of, estimate, lines_of, this_host
from meshloom.cli.hosts import Start
from meshloom.cli.training import Asked
from meshloom.errors import MeshloomError


def commands(arguments: Sequence[str], start: Start, out: str | None) -> list[str]:
    """The command of each host, as it would be typed there; `arguments` are without those of hosts."""
    again = ["--max-restarts", str(start.max_restarts)] * bool(start.max_restarts)
    words = ["meshloom", "train", *arguments, *again, *(["--out", out] if out else [])]
    if start.hosts is None:
        return [shlex.join(words)]
    where = ["--nnodes", str(start.num_hosts), "--rdzv-endpoint", start.hosts.endpoint]
    return [shlex.join([*words, *where, "--node-rank", str(rank)]) for rank in range(start.num_hosts)]


def describe(
    job: Any, model: str, num_parameters: int, data: Sequence[str], device: str, start: Start, asked: Asked
) -> dict[str, Any]:
    """Sizes, memory and step time of a run, as JSON takes them; `estimate_error` where they cannot be told.

    The steps of epochs are not known before the data is tokenised: None. It is estimated for this host, or for hosts of
    the device of --hardware.
    """
    epochs = asked.epochs
    told: dict[str, Any] = {
        "model": model,
        "num_parameters": num_parameters,
        "plan": str(job.plan),
        "num_ranks": job.plan.world_size,
        "num_hosts": start.num_hosts,
        "global_batch": job.sequences_per_step,
        "tokens_per_step": job.tokens_per_step,
        "max_steps": None if epochs else job.max_steps,
        "epochs": epochs,
        "data": list(data),
        "tokenizer": "there" if job.tokenizer is not None else "not on this host yet",
        "weights": job.resume or job.weights or "random",
    }
    try:
        size = start.num_ranks, start.num_hosts
        cluster = cluster_of(asked.hardware, *size) if asked.hardware else this_host(device, *size)
        told["estimate"] = estimate(
            job.config, model, job.plan, cluster, batch_size=job.batch_size, seq_length=job.seq_length,
            precision=job.precision, zero_stage=job.zero,
        )  # fmt: skip
    except MeshloomError as error:
        told["estimate_error"] = str(error)
    return told


def in_words(told: dict[str, Any]) -> str:
    """The same for people."""
    ranks, hosts = told["num_ranks"], told["num_hosts"]
    steps = told["max_steps"]
    how_long = f"{steps:,} steps" if steps else f"{told['epochs']:g} epochs"
    where = f"{ranks} rank{'s' * (ranks > 1)}" + (f" on {hosts} hosts" if hosts > 1 else "")
    lines = [
        "a dry run: nothing is started, nothing is written",
        *(f"command: {command}" for command in told["commands"]),
        f"{told['model']}: {told['num_parameters']:,} parameters, plan {told['plan']} on {where}, weights: "
        f"{told['weights']}",
        f"data: {', '.join(told['data'])}; tokenizer: {told['tokenizer']}",
        f"{how_long} of {told['global_batch']:,} sequences a step, {told['tokens_per_step']:,} tokens"
        + (f": {steps * told['tokens_per_step']:,} tokens in all" if steps else ""),
    ]
    if "estimate" not in told:
        return "\n".join([*lines, f"no estimate of memory and time: {told['estimate_error']}"])
    lines += lines_of(told["estimate"])
    if steps:
        lines.append(f"all steps: about {steps * told['estimate']['step_s']:,.1f} s, without start, data and saving")
    return "\n".join(lines)
