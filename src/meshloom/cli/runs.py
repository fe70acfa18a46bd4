"""`meshloom runs`: list, show, logs, stop, resume."""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from meshloom.errors import FolderError, RunFailed, UsageError
from meshloom.plan import Plan

_POLL_S = 0.2


@click.group(invoke_without_command=True)
@click.option("--dir", "folder", default="runs", show_default=True, help="Where the run folders lie.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.pass_context
def command(context: click.Context, folder: str, as_json: bool) -> None:
    """List runs, and look into, stop or resume one.

    A run is named by its folder's name, by enough of its beginning, or by its path.

    \b
    Examples:
      meshloom runs
      meshloom runs logs gpt2-tiny.dp2 -f
      meshloom runs stop gpt2-tiny.dp2
    """
    context.obj = Path(folder)
    if context.invoked_subcommand is not None:
        return

    from meshloom.train.runs import read_run

    found = [read_run(path.parent) for path in sorted(Path(folder).glob("*/run.json"))]
    if as_json:
        click.echo(json.dumps([run.facts() for run in found]))
        return
    if not found:
        click.echo(f"no runs in {folder}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "state", "step", "loss", "started")
    table.columns[0].no_wrap, table.columns[0].overflow = True, "fold"
    for run in found:
        loss = "" if run.loss is None else f"{run.loss:.4f}"
        table.add_row(run.name, run.state, f"{run.step}/{run.max_steps}", loss, run.started)
    Console().print(table)


@command.command()
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.pass_obj
def show(folder: Path, run: str, as_json: bool) -> None:
    """Print what is known of a run.

    \b
    Example:
      meshloom runs show gpt2-tiny.dp2
    """
    from meshloom.train.runs import read_run

    facts = read_run(_find(folder, run)).facts()
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        click.echo(f"{name:12} {value}")


@command.command()
@click.argument("run")
@click.option("--follow", "-f", is_flag=True, help="Go on until the run ends.")
@click.option("--rank", type=click.IntRange(0), help="What this rank printed.  [default: the console]")
@click.pass_obj
def logs(folder: Path, run: str, follow: bool, rank: int | None) -> None:
    """Print what a run printed.

    \b
    Example:
      meshloom runs logs gpt2-tiny.dp2 -f
    """
    from meshloom.train.runs import read_run

    path = _find(folder, run)
    log = _log(path, rank)
    with log.open(encoding="utf-8", errors="replace") as file:
        while True:
            ended = not read_run(path).is_alive  # asked before reading, so that nothing is missed
            sys.stdout.write(file.read())
            sys.stdout.flush()
            if not follow or ended:
                return
            time.sleep(_POLL_S)


@command.command()
@click.argument("run")
@click.option("--patience", default=120.0, show_default=True, type=click.FloatRange(0),
              help="Seconds to let it save and end by itself.")  # fmt: skip
@click.option("--now", is_flag=True, help="Do not let it save.")
@click.pass_obj
def stop(folder: Path, run: str, patience: float, now: bool) -> None:
    """Let a run save and end.

    \b
    Example:
      meshloom runs stop gpt2-tiny.dp2
    """
    from meshloom.train.processes import end_process, find_process
    from meshloom.train.runs import ask_to_stop, read_run

    path = _find(folder, run)
    known = read_run(path)
    process = find_process(known.process)
    if process is None:
        raise UsageError(f"{known.name}: expected a run that lives, this one is {known.state}")
    if not now:
        ask_to_stop(path)
        deadline = time.monotonic() + patience
        while find_process(known.process) is not None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
    process = find_process(known.process)
    if process is not None and not end_process(process, patience_s=10):
        raise RunFailed(f"{known.name}: it did not end when asked to, and was killed; its newest checkpoint is whole")
    click.echo(f"{known.name}: {read_run(path).state} after step {read_run(path).step}")


@command.command()
@click.argument("run")
@click.option("--background", is_flag=True, help="Return at once.")
@click.pass_context
def resume(context: click.Context, run: str, background: bool) -> None:
    """Go on with a run from its newest checkpoint, as it was started.

    \b
    Example:
      meshloom runs resume gpt2-tiny.dp2 --background
    """
    from meshloom.cli.train import command as train_command
    from meshloom.train.runs import read_run

    path = _find(context.obj, run)
    known = read_run(path)
    if known.is_alive:
        raise UsageError(f"{known.name}: expected a run that has ended, this one is {known.state}")
    arguments = [*known.arguments, "--out", str(path), "--resume", *(["--background"] if background else [])]
    train_command.main(arguments, prog_name="meshloom train", standalone_mode=False)


def _find(folder: Path, run: str) -> Path:
    """The run folder that is meant; raises FolderError naming what is there."""
    for path in (Path(run), folder / run):
        if (path / "run.json").is_file():
            return path
    names = sorted(path.parent.name for path in folder.glob("*/run.json"))
    meant = [name for name in names if name.startswith(run)]
    if len(meant) == 1:
        return folder / meant[0]
    told = f"there are {', '.join(meant or names)}" if names else f"there are none in {folder}"
    raise FolderError(f"{run}: expected the name of one run; {told}")


def _log(path: Path, rank: int | None) -> Path:
    if rank is None:
        console = path / "logs" / "console.log"
        if not console.is_file():
            raise FolderError(f"{path}: expected logs/console.log, which a run in the background has; use --rank")
        return console
    host, local_rank = divmod(rank, _ranks_per_host(path))
    logs = path / "logs" / f"host{host:05}" if host else path / "logs"
    found: list[Any] = sorted((logs / "elastic").rglob(f"*/{local_rank}/stdout.log"))
    if found:
        return Path(found[-1])
    # rank 0 prints to the console, which is kept in the background only; its own notes always are
    others = [path / "logs" / "console.log"] * (rank == 0) + [path / "logs" / f"rank{rank}.jsonl"]
    there = next((log for log in others if log.is_file()), None)
    if there is None:
        raise FolderError(
            f"{path}: expected output of rank {rank}, found none; see {path / 'logs'} for those there are"
        )
    return there


def _ranks_per_host(path: Path) -> int:
    from meshloom.train.runs import read_run

    arguments = read_run(path).arguments
    given = dict(pairwise(arguments))
    return max(1, Plan.parse(given.get("--plan", "dp1")).world_size // int(given.get("--nnodes", 1)))
