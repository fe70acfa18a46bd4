"""`meshloom data`, and what other commands need of it: sources tokenised, with a bar and what came up."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import Progress

from meshloom.train.sources import Reading, Source

if TYPE_CHECKING:
    from meshloom.train.data import Stream

DUMMY = (
    "NO --data GIVEN: training on DUMMY DATA, the few questions that Meshloom ships. "
    "The losses show that the machinery runs, and nothing else."
)


@click.group()
def command() -> None:
    """Make data for training.

    \b
    Example:
      meshloom data prepare recipe.toml --out corpus.jsonl.gz
    """


@command.command()
@click.argument("recipe", metavar="RECIPE.toml")
@click.option(
    "--out", required=True, help="The file to write, .jsonl or .jsonl.gz; its split and report lie beside it."
)
@click.option("--force", is_flag=True, help="Write over files that are there.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def prepare(recipe: str, out: str, force: bool, as_json: bool) -> None:
    """Mix sources by a recipe into one JSONL: normalised, filtered, without duplicates, split.

    What was dropped and why is printed, and kept beside the file as <name>.report.json. Equal inputs give equal files.

    \b
    Example:
      meshloom data prepare recipe.toml --out corpus.jsonl.gz
    """
    from meshloom.train.recipe import load_recipe, mix

    loaded = load_recipe(Path(recipe))
    with progress_bar(show=not as_json) as progress:
        report = mix(loaded, Path(out), force=force, progress=progress)
    click.echo(json.dumps(report, ensure_ascii=False) if as_json else _report(report))


def _report(report: dict[str, Any]) -> str:
    names = ["read", *report["reasons"], "written"]
    width = max(len(row["source"]) for row in report["sources"])
    lines = [f"{'documents':{width}}  " + "  ".join(f"{name:>12}" for name in names)]
    for row in report["sources"]:
        counts = [row["read"], *(row["dropped"][reason] for reason in report["reasons"]), row["documents"]]
        lines.append(f"{row['source']:{width}}  " + "  ".join(f"{count:12,}" for count in counts))
    total = sum(row["bytes"] for row in report["sources"])
    shares = [f"{row['source']} {row['bytes'] / max(1, total):.1%}" for row in report["sources"]]
    lines.append(f"{total / 1e6:.1f} MB of text: {', '.join(shares)}")
    lines += [f"{file['file']}: {file['documents']:,} documents" for file in report["files"]]
    return "\n".join(lines)


@contextmanager
def progress_bar(*, show: bool) -> Iterator[Callable[[str, float], None]]:
    """A bar for each name that reports its share; nothing where the terminal is none."""
    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield lambda name, share: None
        return
    with Progress(console=console) as bars:
        tasks: dict[str, Any] = {}

        def progress(name: str, share: float) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(f"reading {name[-40:]}".replace("[", "\\["), total=1.0)
            bars.update(tasks[name], completed=share)

        yield progress


def open_stream(
    sources: Sequence[Source],
    job: Any,
    *,
    reading: Reading,
    cache_dir: str | None,
    show: bool,
    quiet: bool,
    what: str = "data",
) -> Stream:
    """The stream of a training job: its sources tokenised, now or earlier; says what it holds and what was left out.

    `what` is what they are called there.

    Raises DataError, FolderError.
    """
    from meshloom.parallel.launch import cache_folder
    from meshloom.train.apart import run_apart
    from meshloom.train.data import make_stream
    from meshloom.train.shards import tokenise

    begin = time.monotonic()
    made: list[bool] = []

    def run(make: Callable[[], None]) -> None:
        made.append(True)
        run_apart(make)

    cache = Path(cache_dir) if cache_dir else cache_folder()
    shards = tokenise(
        sources,
        job.tokenizer,
        job.objective,
        cache=cache,
        reading=reading,
        bar=partial(progress_bar, show=show),
        run=run,
    )
    stream = make_stream(
        shards, [source.weight for source in sources], job.tokenizer, job.objective,
        seq_length=job.seq_length, seed=job.seed,
    )  # fmt: skip
    if show:
        for note in _notes(sources, [shard for of_one in shards for shard in of_one]):
            click.echo(note, err=True)
        how = f"tokenised in {time.monotonic() - begin:.1f} s" if made else "tokenised before"
        if not quiet:
            click.echo(f"{what} {sentence(sources, stream)}; {how}")
    return stream


def sentence(sources: Sequence[Source], stream: Stream) -> str:
    """What a stream holds, in words."""
    total = sum(source.weight or 0 for source in sources)
    names = [source.name + (f" ({source.weight / total:.0%})" if source.weight else "") for source in sources]
    return (
        f"{' + '.join(names)}: {stream.num_documents:,} documents, {stream.num_tokens:,} tokens, "
        f"{stream.num_sequences:,} sequences of {stream.seq_length} an epoch"
    )


def _notes(sources: Sequence[Source], shards: Sequence[Any]) -> Iterator[str]:
    for shard in shards:
        if shard.num_bad:
            yield f"{shard.name}: {shard.num_bad:,} bad lines were skipped; the first: {shard.first_bad}"
        if shard.num_empty:
            yield f"{shard.name}: {shard.num_empty:,} empty documents were left out"
    for source in sources:
        if source.left_out:
            more = ", …" if len(source.left_out) > 3 else ""
            yield f"{source.name}: left out what is no data: {', '.join(source.left_out[:3])}{more}"
