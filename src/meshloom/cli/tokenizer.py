"""`meshloom tokenizer`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click


@click.group()
def command() -> None:
    """Make a tokenizer.

    \b
    Example:
      meshloom tokenizer train --data corpus.jsonl.gz --vocab-size 32000 --kind bpe --out my-tokenizer
    """


@command.command()
@click.option("--data", required=True, multiple=True, help="A file, a folder or a hub id, as for train.")
@click.option("--vocab-size", required=True, type=click.IntRange(1), help="Tokens, with bytes and special ones.")
@click.option("--kind", type=click.Choice(["bpe", "unigram"]), default="bpe", show_default=True)
@click.option("--out", required=True, help="The folder to write, new or empty.")
@click.option("--text-field", default="text", show_default=True, help="The field of a line or row that holds the text.")
@click.option("--skip-bad-lines", is_flag=True, help="Count lines that cannot be read, instead of ending.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def train(
    data: tuple[str, ...], vocab_size: int, kind: Any, out: str, text_field: str, skip_bad_lines: bool, as_json: bool
) -> None:
    """Train a vocabulary and write it as a Hugging Face tokenizer folder.

    Byte-level BPE, or unigram that falls back to bytes. Text is put into NFC and digits stand alone, which suits
    Korean; no text is unknown.

    \b
    Example:
      meshloom tokenizer train --data corpus.jsonl.gz --vocab-size 32000 --kind bpe --out my-tokenizer
    """
    from meshloom.train.sources import Reading, find_sources
    from meshloom.train.vocabulary import train_tokenizer

    reading = Reading(text_field=text_field, skip_bad_lines=skip_bad_lines)
    sources = find_sources(data)
    found, num_bad = train_tokenizer(
        sources, Path(out), vocab_size=vocab_size, kind=kind, reading=reading, show=not as_json and sys.stderr.isatty()
    )
    if as_json:
        click.echo(json.dumps({"folder": out, "kind": kind, "vocab_size": found, "bad_lines": num_bad}))
        return
    if num_bad:
        click.echo(f"{num_bad:,} bad lines were skipped", err=True)
    short = "" if found == vocab_size else f" (the text has no more; {vocab_size:,} were asked for)"
    click.echo(f"{out}: a {kind} tokenizer of {found:,} tokens{short}")
