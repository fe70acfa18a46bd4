"""`meshloom train --dry-run`: what a run would be, with nothing started and nothing written."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from meshloom.cli.estimate import estimate, lines_of, this_host
from meshloom.errors import MeshloomError
from meshloom.train.sources import Source


def commands(arguments: Sequence[str], *, out: str | None, nnodes: int, endpoint: str | None) -> list[str]:
    """The command of each host, as it would be typed there; `arguments` are without those of hosts."""
    words = ["meshloom", "train", *arguments, *(["--out", out] if out else [])]
    if nnodes == 1:
        return [shlex.join(words)]
    where = ["--nnodes", str(nnodes), "--rdzv-endpoint", str(endpoint)]
    return [shlex.join([*words, *where, "--node-rank", str(rank)]) for rank in range(nnodes)]


def describe(
    job: Any, model: str, num_parameters: int, sources: Sequence[Source], *, device: str, nnodes: int
) -> dict[str, Any]:
    """Sizes, memory and step time of a run, as JSON takes them; `estimate_error` where they cannot be told."""
    plan = job.plan
    sequences = plan.dp * plan.num_micro_batches * job.batch_size
    told: dict[str, Any] = {
        "model": model,
        "num_parameters": num_parameters,
        "plan": str(plan),
        "num_ranks": plan.world_size,
        "num_hosts": nnodes,
        "global_batch": sequences,
        "tokens_per_step": sequences * job.seq_length,
        "max_steps": job.max_steps,
        "data": [source.name for source in sources],
        "weights": job.resume or job.weights or "random",
    }
    try:
        cluster = this_host(device, plan.world_size // nnodes, nnodes)
        told["estimate"] = estimate(
            job.config, model, plan, cluster, batch_size=job.batch_size, seq_length=job.seq_length,
            precision=job.precision,
        )  # fmt: skip
    except MeshloomError as error:
        told["estimate_error"] = str(error)
    return told


def in_words(told: dict[str, Any]) -> str:
    """The same for people."""
    ranks, hosts = told["num_ranks"], told["num_hosts"]
    where = f"{ranks} rank{'s' * (ranks > 1)}" + (f" on {hosts} hosts" if hosts > 1 else "")
    lines = [
        "a dry run: nothing is started, nothing is written",
        *(f"command: {command}" for command in told["commands"]),
        f"{told['model']}: {told['num_parameters']:,} parameters, plan {told['plan']} on {where}, weights: "
        f"{told['weights']}",
        f"data: {', '.join(told['data'])}",
        f"{told['max_steps']:,} steps of {told['global_batch']:,} sequences, {told['tokens_per_step']:,} tokens: "
        f"{told['max_steps'] * told['tokens_per_step']:,} tokens in all",
    ]
    if "estimate" not in told:
        return "\n".join([*lines, f"no estimate of memory and time: {told['estimate_error']}"])
    seconds = told["max_steps"] * told["estimate"]["step_s"]
    lines += lines_of(told["estimate"])
    return "\n".join([*lines, f"all steps: about {seconds:,.1f} s, without start, data and saving"])
