"""`meshloom capture`."""

from __future__ import annotations

import json
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import click
from rich.console import Console
from rich.progress import Progress

from meshloom.capture.convert import convert_rank
from meshloom.chakra.check import check
from meshloom.chakra.file import read_all
from meshloom.errors import MeshloomError, TraceError, UsageError

_HOST = re.compile(r"(?:rank_?(\d+)\.host|(?:host|et)[._-]?(\d+))\.json(?:\.gz)?")
_DEVICE = re.compile(r"(?:rank_?(\d+)\.device|(?:device|kineto)[._-]?(\d+))\.json(?:\.gz)?")


class _Job(NamedTuple):
    rank: int | None
    host: Path
    device: Path | None
    notes: Path | None
    out: Path


class _Done(NamedTuple):
    out: str
    nodes: int
    warnings: list[str]
    error: str


@click.command()
@click.argument("where", metavar="DIR | link HOST DEVICE | convert FILE", nargs=-1, required=True)
@click.option("--out", help="For DIR a folder, else a file.  [default: beside the files]")
@click.option("--rank", type=click.IntRange(0), help="For files: whose trace it is.  [default: what the file says]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(where: tuple[str, ...], out: str | None, rank: int | None, as_json: bool) -> int:
    """Make Chakra traces from PyTorch's host and device traces: of all ranks of a folder, of one pair of files, or of
    one file alone (which has less to tell: no storages without the host's, no times without the device's).

    Reads host traces of schemas 1.0.1 to 1.1.1 and Kineto JSON, plain or gzip; what a file lacks is told. A folder
    holds rank<r>.host.json and rank<r>.device.json, as a recorded step leaves them, or host_<r> and device_<r>.

    \b
    Examples:
      meshloom capture runs/gpt2-tiny.dp2.20261121-120000/trace
      meshloom capture link host.json device.json --out rank0.et
      meshloom capture convert kineto.json.gz --out rank0.et
    """
    if where[0] in ("link", "convert"):
        expected = {"link": "a HOST and a DEVICE file, such as host.json device.json", "convert": "one file"}
        if len(where) != (3 if where[0] == "link" else 2):
            raise UsageError(f"capture {where[0]}: expected {expected[where[0]]}")
        host, device = Path(where[1]), Path(where[2]) if where[0] == "link" else None
        target = Path(out) if out else host.with_name(f"rank{rank or 0}.et")
        jobs = [_Job(rank, host, device, None, target)]
    elif len(where) == 1:
        jobs = _jobs(Path(where[0]), Path(out) if out else None)
        if rank is not None:
            raise UsageError("--rank goes with `capture link` and `capture convert`: a folder's files tell their ranks")
    else:
        raise UsageError(f"capture: expected one folder, link HOST DEVICE, or convert FILE, got {' '.join(where)}")
    done = _run(jobs)
    if as_json:
        click.echo(json.dumps([item._asdict() for item in done]))
    else:
        _tell(done)
    failed = any(item.error for item in done)
    if where[0] in ("link", "convert"):
        return 2 if failed else 0
    if failed:  # of one rank: the others' traces are there
        return 1
    findings = check(read_all(jobs[0].out.parent))
    for finding in findings if not as_json else []:
        click.echo(str(finding))
    return 1 if any(finding.severity == "error" for finding in findings) else 0


def _jobs(folder: Path, out: Path | None) -> list[_Job]:
    """Every rank's files in the folder, or in its `trace` folder."""
    for where in (folder, folder / "trace"):
        names = sorted(path for path in where.glob("*.json*") if path.is_file()) if where.is_dir() else []
        found = [
            {_rank(match): path for path in names if (match := pattern.fullmatch(path.name))}
            for pattern in (_HOST, _DEVICE)
        ]
        hosts, devices = found
        if hosts:
            break
    else:
        raise TraceError(
            f"{folder}: expected rank<r>.host.json and rank<r>.device.json (or host_<r>, device_<r>), as "
            "`meshloom train --trace` leaves them; found none"
        )
    alone = sorted(set(hosts) ^ set(devices))
    if alone:
        lacks = "device" if alone[0] in hosts else "host"
        raise TraceError(
            f"{where}: expected a host and a device file for each rank, rank {alone[0]} has no {lacks} file"
        )
    target = out or where
    notes = {rank: where / f"rank{rank}.notes.json" for rank in hosts}
    return [
        _Job(
            rank, hosts[rank], devices[rank], notes[rank] if notes[rank].is_file() else None, target / f"rank{rank}.et"
        )
        for rank in sorted(hosts)
    ]


def _rank(match: re.Match[str]) -> int:
    return int(next(group for group in match.groups() if group is not None))


def _run(jobs: list[_Job]) -> list[_Done]:
    """Convert every rank, in as many processes as there are cores; one that fails does not stop the others."""
    if len(jobs) == 1:
        return [_convert(jobs[0])]
    done: dict[int, _Done] = {}
    console = Console(file=sys.stderr)
    workers = min(len(jobs), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("ranks", total=len(jobs))
        with ProcessPoolExecutor(workers) as pool:
            waiting = {pool.submit(_convert, job): index for index, job in enumerate(jobs)}
            for future in as_completed(waiting):
                index = waiting[future]
                try:
                    done[index] = future.result()
                except BrokenProcessPool:
                    done[index] = _Done(
                        str(jobs[index].out),
                        0,
                        [],
                        f"{jobs[index].host}: its process was killed (by hand, or by the system for want of memory)",
                    )
                progress.advance(task)
    return [done[index] for index in sorted(done)]


def _convert(job: _Job) -> _Done:
    try:
        trace, warnings = convert_rank(job.host, job.device, job.out, notes=job.notes, rank=job.rank)
    except MeshloomError as error:
        return _Done(str(job.out), 0, [], str(error))
    return _Done(str(job.out), len(trace.nodes), warnings, "")


def _tell(done: list[_Done]) -> None:
    for item in done:
        for warning in item.warnings:
            click.echo(f"meshloom: warning: {warning}", err=True)
        if item.error:
            click.echo(f"meshloom: {item.error}", err=True)
        else:
            click.echo(f"{item.out}: {item.nodes:,} nodes")
