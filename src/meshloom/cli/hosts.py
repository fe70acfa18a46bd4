"""Options of `meshloom train` for several hosts, restarts and Slurm."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from meshloom.errors import PlanError, UsageError
from meshloom.plan import Plan

if TYPE_CHECKING:
    from meshloom.parallel.hosts import Hosts


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How the ranks of this host are started: how many, as which of several hosts, how often again."""

    num_ranks: int
    num_hosts: int = 1
    hosts: Hosts | None = None
    max_restarts: int = 0

    def check_alone(self, out: str | None) -> None:
        """Raise UsageError for what cannot be where each rank was started by itself, by torchrun or by hand."""
        if out is None:
            raise UsageError("expected --out where each rank is started by itself, so that all write to one folder")
        if self.hosts or self.max_restarts:
            raise UsageError(
                "--nnodes, --max-restarts: expected them at who starts the ranks, such as torchrun; give --resume here"
            )

    @property
    def host_rank(self) -> int:
        """Which host this is."""
        return self.hosts.host_rank if self.hosts else 0


Command = TypeVar("Command", bound=Callable[..., Any])
NAMES = ("nnodes", "node_rank", "rdzv_endpoint", "max_restarts", "launcher")


def host_options(function: Command) -> Command:
    """Add the options to a command; torchrun's names."""
    options = [
        click.option("--nnodes", default=1, show_default=True, type=click.IntRange(1),
                     help="Hosts, all of which run this command; the ranks are shared out evenly."),
        click.option("--node-rank", default=0, show_default=True, type=click.IntRange(0), help="Which host this is."),
        click.option("--rdzv-endpoint", help="HOST:PORT at which host 0 answers."),
        click.option("--max-restarts", default=0, show_default=True, type=click.IntRange(0),
                     help="If a rank dies, start all again from the newest checkpoint, so many times."),
        click.option("--launcher", type=click.Choice(["local", "slurm"]), default="local", show_default=True,
                     help="slurm prints an sbatch script of this command, and starts nothing."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def take_hosts(options: dict[str, Any], plan: Plan, *, out: str | None, background: bool) -> Start:
    """Take what is ours from `options`; raises UsageError, PlanError."""
    given = {name: options.pop(name, None) for name in NAMES}
    nnodes, rank, restarts = given["nnodes"] or 1, given["node_rank"] or 0, given["max_restarts"] or 0
    endpoint = given["rdzv_endpoint"]
    if restarts and not options.get("save_steps"):
        raise UsageError(f"--max-restarts {restarts}: expected --save-steps too, or each restart begins anew")
    if nnodes == 1:
        if rank or endpoint:
            raise UsageError("--node-rank and --rdzv-endpoint: expected --nnodes with them, of at least 2")
        return Start(num_ranks=plan.world_size, max_restarts=restarts)
    from meshloom.parallel.hosts import Hosts, parse_endpoint

    if endpoint is None:
        raise UsageError(f"--nnodes {nnodes}: expected --rdzv-endpoint HOST:PORT of host 0, the same on all hosts")
    if rank >= nnodes:
        raise UsageError(f"--node-rank {rank}: expected one from 0 to {nnodes - 1}")
    if out is None:
        raise UsageError(f"--nnodes {nnodes}: expected --out, a folder that all hosts see")
    if background and rank:
        raise UsageError("--background: expected it on host 0 only; on the others use the launcher of your cluster")
    address, port = parse_endpoint(endpoint)
    job = f"plan {plan}, seed {options.get('seed')}"
    hosts = Hosts(num_hosts=nnodes, host_rank=rank, address=address, port=port, job=job)
    return Start(num_ranks=ranks_per_host(plan, nnodes), num_hosts=nnodes, hosts=hosts, max_restarts=restarts)


def ranks_per_host(plan: Plan, nnodes: int) -> int:
    """How many ranks each host runs; raises PlanError if they cannot be shared out evenly."""
    ranks, rest = divmod(plan.world_size, nnodes)
    if rest:
        raise PlanError(f"plan {plan}: expected a multiple of {nnodes} ranks for as many hosts, got {plan.world_size}")
    return ranks


def sbatch(arguments: Sequence[str], *, plan: Plan, nnodes: int, out: str | None, device: str, restarts: int) -> str:
    """An sbatch script that runs `meshloom train` with the arguments on `nnodes` hosts; raises UsageError, PlanError.

    `arguments` are without those of hosts. It can be requeued: the run goes on in its folder.
    """
    if out is None:
        raise UsageError("--launcher slurm: expected --out, a folder that all hosts see")
    ranks = ranks_per_host(plan, nnodes)
    gpus = [] if device == "cpu" else [f"#SBATCH --gpus-per-node={ranks}"]
    threads = 8 if device != "cpu" else 1
    again = ["--max-restarts", str(restarts)] * bool(restarts)
    resume = [] if "--resume" in arguments else ["--resume"]
    words = ["meshloom", "train", *arguments, "--out", out, *again, *resume]
    hosts = ['--nnodes "$SLURM_NNODES"', '--node-rank "$SLURM_NODEID"', '--rdzv-endpoint "$head:$port"']
    where = [] if nnodes == 1 else hosts
    command = " \\\n  ".join([" ".join(shlex.quote(word) for word in words), *where])
    return "\n".join(
        [
            "#!/bin/bash",
            f"#SBATCH --job-name={shlex.quote(Path(out).name)}",
            f"#SBATCH --nodes={nnodes}",
            "#SBATCH --ntasks-per-node=1",
            f"#SBATCH --cpus-per-task={ranks * threads}",
            *gpus,
            "#SBATCH --time=24:00:00",
            "#SBATCH --output=%x.%j.log",
            "#SBATCH --requeue",
            "set -euo pipefail",
            "# One agent a host, which starts its ranks; they meet on a port of the first host.",
            'export head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "export port=$((20000 + SLURM_JOB_ID % 10000))",
            "srun --kill-on-bad-exit=1 bash -c " + shlex.quote(command),
        ]
    )
