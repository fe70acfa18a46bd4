"""`meshloom experiments`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import click

from meshloom.cli.train import command as train_command
from meshloom.cli.train import given_arguments, outcome
from meshloom.errors import FolderError, MeshloomError, UsageError
from meshloom.hardware.table import parse_toml

_MOST_CELLS = 10_000
_OURS = ("out", "resume", "background", "launcher", "dry-run", "json")  # options that an experiment does not set


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """One cell of the matrix: its name, its run folder and the arguments of `meshloom train`, without --out."""

    name: str
    folder: Path
    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a cell ended: done, skipped (it was done before) or failed, and then why."""

    name: str
    state: str
    folder: str
    seconds: float = 0.0
    reason: str = ""
    first_loss: float | None = None
    last_loss: float | None = None
    tokens_per_second: float | None = None
    num_traces: int = 0
    num_faults: int = 0


@click.command()
@click.argument("file", metavar="[FILE.toml]", required=False)
@click.option("--tiny", is_flag=True, help="Take what the file says under [tiny]: small models, for a laptop.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE",
              help="An option of train for all runs, over that of the file, such as data=train.json.")  # fmt: skip
@click.option("--out", help="Where the run folders go.  [default: what the file says]")
@click.option("--list", "only_list", is_flag=True, help="Print the commands, and run nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def command(
    file: str | None, tiny: bool, settings: tuple[str, ...], out: str | None, only_list: bool, as_json: bool
) -> int:
    """Run a matrix of trainings one after the other: what is done is skipped, a failure does not end the others.

    Without a file: GPT-2 and BERT on 1, 2 and 8 ranks, with traces. Exit code 1 if a run failed; the same command
    again goes on with what is missing.

    \b
    Examples:
      meshloom experiments --tiny
      meshloom experiments --set data=train-v1.1.json
      meshloom experiments mine.toml --list
    """
    cells = expand(read_table(file), tiny=tiny, settings=settings, out=out)
    if only_list:
        for cell in cells:
            click.echo(" ".join(["meshloom train", *cell.arguments, "--out", str(cell.folder)]))
        return 0
    results = []
    for number, cell in enumerate(cells, start=1):
        if not as_json:
            click.echo(f"{number}/{len(cells)} {cell.name} … ", nl=False)
        result = run(cell)
        if not as_json:
            click.echo(result.state + (f": {result.reason}" if result.reason else ""))
        results.append(result)
    if as_json:
        click.echo(json.dumps([asdict(result) for result in results]))
    else:
        _show(results)
    return 1 if any(result.state == "failed" for result in results) else 0


def read_table(file: str | None) -> dict[str, Any]:
    """What a file of experiments says, the shipped one if it is None; raises UsageError."""
    try:
        if file is None:
            text = (resources.files("meshloom") / "data" / "experiments.toml").read_text(encoding="utf-8")
        else:
            text = Path(file).read_text(encoding="utf-8")
        return parse_toml(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file}: expected a TOML file with [matrix] and [options], got '{error}'") from error


def _items(table: Any) -> list[tuple[str, Any]]:
    return list(table.items()) if isinstance(table, dict) else []


def expand(table: Mapping[str, Any], *, tiny: bool, settings: Sequence[str], out: str | None) -> list[Experiment]:
    """The cells of a matrix, the last axis fastest; raises UsageError for what is no option of train."""
    unknown = sorted(set(table) - {"out", "options", "matrix", "tiny"})
    if unknown:
        raise UsageError(f"experiments: expected out, [options], [matrix] and [tiny], got {unknown[0]!r}")
    for name, value in [*table.items(), *_items(table.get("tiny"))]:
        if name != "out" and not isinstance(value, dict):
            raise UsageError(f"experiments: expected [{name}] to be a table, got {value!r:.60}")
        if name == "out" and not isinstance(value, str):
            raise UsageError(f"experiments: expected out to be a folder's name, got {value!r:.60}")
    small = table.get("tiny", {}) if tiny else {}
    if tiny and not small:
        raise UsageError("--tiny: expected a file with [tiny.options] or [tiny.matrix]")
    options = {**table.get("options", {}), **small.get("options", {}), **dict(_setting(text) for text in settings)}
    axes = {**table.get("matrix", {}), **small.get("matrix", {})}
    for name, values in axes.items():
        if not isinstance(values, list) or not values:
            raise UsageError(f"experiments: expected [matrix] {name} to be a list of values, got {values!r}")
    if prod(len(values) for values in axes.values()) > _MOST_CELLS:
        raise UsageError(f"experiments: expected at most {_MOST_CELLS:,} cells; make the lists of [matrix] shorter")
    if "model" not in {**options, **axes}:
        raise UsageError("experiments: expected a model under [options] or [matrix]")
    axes = {name: values for name, values in axes.items() if name not in dict(_setting(text) for text in settings)}
    where = Path(out or small.get("out") or table.get("out") or "runs/experiments")
    cells = []
    for values in product(*axes.values()):
        chosen = {**options, **dict(zip(axes, values))}
        name = ".".join(_slug(value) for value in values) or _slug(chosen["model"])
        cells.append(Experiment(name=name, folder=where / name, arguments=_as_noted(_arguments(chosen))))
    names = [cell.name for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"experiments: expected cells of different names, two are called {name}")
    return cells


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--set {text}: expected NAME=VALUE, such as data=train.json")
    return name.strip().removeprefix("--"), {"true": True, "false": False}.get(value, value)


def _slug(value: Any) -> str:
    return re.sub(r"[^\w.-]+", "-", Path(str(value)).stem if str(value).endswith(".json") else str(value)).strip("-")


def _arguments(options: Mapping[str, Any]) -> Iterator[str]:
    """`name = value` as --name value, true as a flag, a list as the option again and again."""
    known = {option for parameter in train_command.params for option in parameter.opts}
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if option not in known or option[2:] in _OURS:
            raise UsageError(f"experiments: expected options of `meshloom train`, got {name!r}")
        for item in value if isinstance(value, list) else [value]:
            if item is True:
                yield option
            elif item is not False:
                yield from (option, str(item))


def _as_noted(arguments: Iterator[str]) -> tuple[str, ...]:
    """Arguments in the form in which a run notes them: checked, and in train's own order."""
    try:
        context = train_command.make_context("meshloom train", list(arguments))
    except click.UsageError as error:
        raise UsageError(f"experiments: expected options of `meshloom train`: {error.format_message()}") from error
    return tuple(given_arguments(context, leave_out=()))


def run(cell: Experiment) -> Result:
    """Run a cell in a process of its own, unless it is done; what it prints goes to <folder>.log."""
    from meshloom.train.runs import read_run

    facts: dict[str, Any] = {"name": cell.name, "folder": str(cell.folder)}
    again: list[str] = []
    if (cell.folder / "run.json").is_file():
        known = read_run(cell.folder)
        if known.arguments != list(cell.arguments):
            reason = "its folder holds a run of other options; choose another --out, or remove it"
            return Result(**facts, state="failed", reason=reason)
        if known.state == "finished":
            return Result(**facts, state="skipped", **_numbers(cell.folder))
        if known.is_alive:
            return Result(**facts, state="failed", reason="it is running already")
        again = ["--resume"]
    begin = time.monotonic()
    log = cell.folder.with_name(f"{cell.folder.name}.log")
    command = [sys.executable, "-m", "meshloom.cli", "train", *cell.arguments, "--out", str(cell.folder), *again]
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    except OSError as error:
        raise FolderError(f"{log}: expected to write here, got '{error.strerror}'; choose another --out") from error
    facts["seconds"] = time.monotonic() - begin
    if code:
        said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        reason = next((line for line in reversed(said) if line.startswith("meshloom: ")), said[-1] if said else "")
        return Result(**facts, state="failed", reason=f"{reason.removeprefix('meshloom: ')} (exit code {code}; {log})")
    return Result(**facts, state="done", **_numbers(cell.folder))


def _numbers(folder: Path) -> dict[str, Any]:
    try:
        told = outcome(folder)
    except MeshloomError as error:
        return {"reason": str(error)}
    return {
        "first_loss": told["first_loss"],
        "last_loss": told["last_loss"],
        "tokens_per_second": told["median_tokens_per_second"],
        "num_traces": len(told["traces"]),
        "num_faults": len(told["faults"]),
    }


def _show(results: Sequence[Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("experiment", "state", "loss", "at last", "tokens/s", "traces", "faults", "s")
    table.columns[0].no_wrap = True
    for item in results:
        numbers = ["" if value is None else f"{value:.4f}" for value in (item.first_loss, item.last_loss)]
        speed = "" if item.tokens_per_second is None else f"{item.tokens_per_second:,.0f}"
        seconds = f"{item.seconds:.0f}" if item.seconds else ""
        table.add_row(item.name, item.state, *numbers, speed, str(item.num_traces), str(item.num_faults), seconds)
    Console().print(table)
    folder = Path(results[0].folder).parent
    click.echo(f"traces and tables of the most expensive ops: {folder}/*/trace/rank*.et, rank*.ops.txt")
