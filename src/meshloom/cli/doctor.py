"""`meshloom doctor`."""

from __future__ import annotations

import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

import click

from meshloom.errors import DataError, MeshloomError

State = Literal["ok", "note", "warning", "failure"]
_LIMIT_S = 60.0  # for the ranks that are started
_EXTRAS = {
    "datasets": ("datasets from the hub", "pip install 'meshloom[data]'"),
    "pyarrow": ("Parquet files", "pip install 'meshloom[data]'"),
    "datasketch": ("near-duplicates in `data prepare`", "pip install 'meshloom[data]'"),
    "tensorboard": ("looking at the event files of a run", "pip install 'meshloom[tensorboard]'"),
    "wandb": ("reports to Weights & Biases", "pip install 'meshloom[wandb]'"),
}
_SLOW = 0.5  # of what the data sheet promises


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was looked at, how it is, what was found, and what to do about it if something is wrong."""

    what: str
    state: State
    found: str
    advice: str = ""


@click.command()
@click.option("--data", multiple=True, help="Also look whether this data can be read; as for train.")
@click.option("--tokenizer", help="Also look whether this tokenizer can be loaded.")
@click.option("--model", help="Also look whether this model's config can be found.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(data: tuple[str, ...], tokenizer: str | None, model: str | None, device: str, as_json: bool) -> int:
    """See whether training can run here, and how fast: software, devices, memory, disk, a collective, the hub.

    Two ranks are started for it. Exit code 0 if nothing failed (warnings do not count), 1 if something did.

    \b
    Examples:
      meshloom doctor
      meshloom doctor --data train-v1.1.json --tokenizer gpt2 --json
    """
    from meshloom.parallel.launch import count_gpus_without_cuda

    count_gpus_without_cuda()  # this process forks ranks
    findings = [*_software(), *_room(), *_ranks(device), *_reachable(data, tokenizer, model), *_extras()]
    failed = any(finding.state == "failure" for finding in findings)
    if as_json:
        click.echo(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}))
    else:
        _show(findings)
    return 1 if failed else 0


def _show(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    colours = {"ok": "green", "note": "cyan", "warning": "yellow", "failure": "bold red"}
    table = Table("what", "", "found", "what to do")
    for item in findings:
        table.add_row(item.what, f"[{colours[item.state]}]{item.state}[/]", _plain(item.found), _plain(item.advice))
    console = Console()
    console.print(table)
    counts = {state: sum(item.state == state for item in findings) for state in ("failure", "warning")}
    console.print(f"{counts['failure']} failures, {counts['warning']} warnings", highlight=False)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _software() -> Iterator[Finding]:
    import torch
    import torch.distributed as dist

    version = platform.python_version()
    old = sys.version_info < (3, 10)
    yield Finding(
        what="Python", state="failure" if old else "ok", found=version, advice="use 3.10 or later" if old else ""
    )
    for name, least in (("torch", (2, 11)), ("transformers", (5, 0))):
        found = metadata.version(name)
        low = tuple(int(part) for part in found.split("+")[0].split(".")[:2]) < least
        wanted = ".".join(map(str, least))
        yield Finding(
            what=name, state="failure" if low else "ok", found=found, advice=f"use {wanted} or later" if low else ""
        )
    if torch.version.cuda is None:
        yield Finding(what="CUDA", state="note", found="this torch is built for the CPU only",
                      advice="for NVIDIA GPUs install torch from the index of your CUDA version")  # fmt: skip
    elif not torch.cuda.is_available():
        yield Finding(what="CUDA", state="warning", found=f"torch for CUDA {torch.version.cuda}, and no GPU to be seen",
                      advice="look at nvidia-smi: the driver, or CUDA_VISIBLE_DEVICES")  # fmt: skip
    else:
        yield Finding(what="CUDA", state="ok", found=f"{torch.version.cuda}, {torch.cuda.device_count()} GPUs")
    if torch.version.cuda is not None:
        there = dist.is_nccl_available()
        yield Finding(what="NCCL", state="ok" if there else "failure", found="there" if there else "missing",
                      advice="" if there else "install a torch that is built with NCCL")  # fmt: skip
    there = dist.is_available() and dist.is_gloo_available()
    yield Finding(what="gloo", state="ok" if there else "failure", found="there" if there else "missing",
                  advice="" if there else "install a torch that is built with gloo")  # fmt: skip


def _room() -> Iterator[Finding]:
    import psutil

    from meshloom.parallel.launch import cache_folder

    memory = psutil.virtual_memory()
    state: State = "failure" if memory.available < 1e9 else "warning" if memory.available < 4e9 else "ok"
    yield Finding(
        what="memory", state=state,
        found=f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free",
        advice="" if state == "ok" else "end what else runs here, or take a smaller model or fewer ranks",
    )  # fmt: skip
    for what, folder in (("disk, runs", Path.cwd()), ("disk, cache", cache_folder())):
        yield _disk(what, folder)
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        low = free < 256e6
        yield Finding(
            what="/dev/shm", state="warning" if low else "ok", found=f"{free / 1e6:,.0f} MB free",
            advice="in Docker start with --ipc=host or --shm-size=8g; NCCL needs it" if low else "",
        )  # fmt: skip


def _disk(what: str, folder: Path) -> Finding:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return Finding(what=what, state="failure", found=f"{there}: {error.strerror}",
                       advice="use another folder: cd elsewhere, or set MESHLOOM_CACHE_DIR")  # fmt: skip
    free = shutil.disk_usage(there).free
    state: State = "failure" if free < 2e8 else "warning" if free < 5e9 else "ok"
    advice = "" if state == "ok" else "make room: a checkpoint of n parameters takes 12·n bytes"
    return Finding(what=what, state=state, found=f"{free / 1e9:.1f} GB free at {there}", advice=advice)


def _ranks(device: str) -> Iterator[Finding]:
    """Start two ranks, as training does; then say what they measured."""
    import torch

    from meshloom.parallel.launch import run_ranks
    from meshloom.parallel.probe import LATE, RESULT, probe, probe_alone

    num_gpus = torch.cuda.device_count() if device != "cpu" else 0
    plans: list[tuple[str, str, Any]] = [("gloo", "cpu", probe)]
    if num_gpus:
        plans.append(("nccl", "cuda", probe if num_gpus > 1 else probe_alone))
    for backend, on, function in plans:
        with tempfile.TemporaryDirectory() as folder:
            num_ranks = 2 if function is probe else 1
            what = f"{num_ranks} rank{'s' * (num_ranks > 1)}, {backend}"
            try:
                run_ranks(function, folder, on, _LIMIT_S, num_ranks=num_ranks, log_dir=Path(folder) / "logs")
            except MeshloomError as error:
                late = (Path(folder) / LATE).exists()
                found = f"did not end within {_LIMIT_S:.0f} s" if late else str(error).partition("; ")[0]
                yield Finding(what=what, state="failure", found=found, advice=_why_not(backend))
                continue
            told = json.loads((Path(folder) / RESULT).read_text())
        yield from _measured(what, told)


def _why_not(backend: str) -> str:
    if backend == "gloo":
        return "let this host reach itself: hostname in /etc/hosts, no firewall on lo, or set GLOO_SOCKET_IFNAME=lo"
    return "run with NCCL_DEBUG=INFO; try NCCL_P2P_DISABLE=1, NCCL_SOCKET_IFNAME, and more /dev/shm"


def _measured(what: str, told: dict[str, Any]) -> Iterator[Finding]:
    if "sum_is_right" in told:
        right = told["sum_is_right"]
        yield Finding(what=what, state="ok" if right else "failure",
                      found="an all-reduce ran" + (" and is right" if right else ", and its sum is WRONG"),
                      advice="" if right else "try NCCL_P2P_DISABLE=1: links between devices lose data")  # fmt: skip
    yield from _devices(told["gpus"])
    yield _product(told)
    if "all_reduce_s" in told:
        yield _all_reduce(told)


def _devices(gpus: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    for index, gpu in enumerate(gpus):
        free, total = gpu["free_bytes"], gpu["total_bytes"]
        busy = free < 0.5 * total
        yield Finding(
            what=f"GPU {index}", state="warning" if busy else "ok",
            found=f"{gpu['name']}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free",
            advice="something else runs on it: see nvidia-smi" if busy else "",
        )  # fmt: skip
    if len(gpus) > 1:
        alone = [index for index, gpu in enumerate(gpus) if len(gpu["reaches"]) < len(gpus) - 1]
        yield Finding(
            what="peer access", state="warning" if alone else "ok",
            found=f"GPUs {alone} do not reach all others" if alone else f"all {len(gpus)} GPUs reach one another",
            advice="tensor parallel will be slow: nvidia-smi topo -m, IOMMU, ACS" if alone else "",
        )  # fmt: skip


def _product(told: dict[str, Any]) -> Finding:
    """The measured product against the data sheet; that of the CPU is of another one, so it judges nothing."""
    from meshloom.cli.estimate import spec_of
    from meshloom.hardware.device import load_device

    measured, dtype, name = told["flops_per_second"], told["dtype"], told["device"]
    what, found = f"GEMM, {name}", f"{measured / 1e12:.2f} TFLOP/s in {dtype}"
    if name == "cpu":
        sheet = load_device("cpu")
        per_core = sheet.peak(dtype) / sheet.num_multiprocessors
        found += (
            f" on {told['threads']} threads; the sheet's cores would peak at {per_core * told['threads'] / 1e12:.2f}"
        )
        advice = "estimates for this CPU are rough: `meshloom calibrate --here` makes a file of yours"
        return Finding(what=what, state="ok", found=found, advice=advice)
    spec = spec_of(name)
    if spec is None:
        return Finding(what=what, state="note", found=found, advice="no device file knows it: give --hardware a TOML")
    promised = load_device(spec).peak(dtype)
    share = measured / promised
    slow = share < _SLOW
    return Finding(
        what=what, state="warning" if slow else "ok", found=f"{found}, {share:.0%} of {spec}'s peak",
        advice="slower than it should be: clocks and power limit in nvidia-smi -q, or another job" if slow else "",
    )  # fmt: skip


def _all_reduce(told: dict[str, Any]) -> Finding:
    from meshloom.cli.estimate import cluster_of, spec_of
    from meshloom.hardware.cluster import Spread
    from meshloom.simulate.network import collective_seconds

    size, seconds = max((int(size), seconds) for size, seconds in told["all_reduce_s"].items())
    small_s = min(told["all_reduce_s"].items(), key=lambda item: int(item[0]))[1]
    found = f"{size / 1e6:.0f} MB in {seconds * 1e3:.2f} ms, {size / seconds / 1e9:.2f} GB/s; "
    found += f"66 kB in {small_s * 1e6:.0f} µs"
    what = f"all-reduce, 2 ranks, {told['backend']}"
    spec = spec_of(told["device"]) if told["device"] != "cpu" else None
    if spec is None:
        return Finding(what=what, state="ok", found=found)
    cluster = cluster_of(spec, 2)
    if "all_reduce" not in cluster.device.collectives:
        return Finding(what=what, state="note", found=found, advice=f"{spec}'s file has no measured all-reduce")
    wanted = collective_seconds("all_reduce", size, Spread(1, 2, False), cluster)
    slow = seconds > wanted / _SLOW
    return Finding(
        what=what, state="warning" if slow else "ok", found=f"{found}; {spec}'s file says {wanted * 1e3:.2f} ms",
        advice="slower than it should be: nvidia-smi topo -m, and NCCL_DEBUG=INFO for what NCCL chose" if slow else "",
    )  # fmt: skip


def _reachable(data: Sequence[str], tokenizer: str | None, model: str | None) -> Iterator[Finding]:
    from meshloom.model.config import hub, load_config, load_tokenizer
    from meshloom.train.sources import SAMPLE, find_sources

    try:
        with hub("the hub", DataError):
            yield Finding(what="hub", state="ok", found="it answers")
    except MeshloomError:
        advice = "what is local or cached works without; else look at HTTPS_PROXY, HF_ENDPOINT"
        yield Finding(what="hub", state="warning", found="it cannot be reached", advice=advice)
    named = dict.fromkeys((SAMPLE, *data))  # each once
    looked: list[tuple[str, Any, str]] = [(f"data {name}", find_sources, name) for name in named]
    looked += [(f"tokenizer {name}", load_tokenizer, name) for name in dict.fromkeys(("bytes", tokenizer)) if name]
    looked += [(f"model {name}", load_config, name) for name in (model,) if name]
    for what, look, name in looked:
        try:
            look([name] if look is find_sources else name)
            yield Finding(what=what, state="ok", found="found")
        except MeshloomError as error:
            yield Finding(what=what, state="failure", found=str(error), advice="give a path that is there")


def _extras() -> Iterator[Finding]:
    for name, (why, how) in _EXTRAS.items():
        there = util.find_spec(name) is not None
        yield Finding(what=name, state="ok" if there else "note", found=metadata.version(name) if there else "not here",
                      advice="" if there else f"for {why}: {how}")  # fmt: skip
