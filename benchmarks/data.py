"""Tokenising the full SQuAD train set: ours, from the file to shards on disk, against tokenizers' bare batch encode.

The bare encode has its texts in memory and keeps nothing; ours reads, parses, encodes, packs and writes. Each run is a
process of its own, in turn; imports and the loading of the tokenizer are not counted. Needs ../shared/data.
`--json` prints the figures, `--write` puts them into RESULTS.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from results import machine, section, write_section

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SQUAD = SHARED / "squad" / "squad-v1.1-train.rebuilt.json.gz"
MODELS = {"gpt2": "causal", "bert-base-uncased": "masked"}
WAYS = ("ours", "encode_batch", "encode_batch_fast", "encode_batch_fast, by 500")
TARGET = 1.3  # of the fastest bare one


def texts(model: str, squad: Path) -> list[Any]:
    """What the model reads: question and context as one text, or as a pair."""
    table = json.loads(gzip.decompress(squad.read_bytes()))
    found = [
        (question["question"], paragraph["context"])
        for article in table["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    return found if MODELS[model] == "masked" else [" ".join(pair) for pair in found]


def work(model: str, way: str, squad: Path, folder: Path) -> Callable[[], int]:
    """What is timed; it returns how many tokens there were."""
    from meshloom.model.config import load_tokenizer
    from meshloom.train.shards import tokenise
    from meshloom.train.sources import Reading, find_sources

    tokenizer = load_tokenizer(str(SHARED / "tokenizers" / model))
    if way == "ours":

        def ours() -> int:
            made = tokenise(find_sources([str(squad)]), tokenizer, MODELS[model], cache=folder, reading=Reading())
            return sum(shard.num_tokens for of_one in made for shard in of_one)

        return ours
    given = texts(model, squad)
    encode = getattr(tokenizer.backend_tokenizer, way.partition(",")[0])
    size = 500 if "by 500" in way else len(given)

    def bare() -> int:
        parts = (given[begin : begin + size] for begin in range(0, len(given), size))
        return sum(sum(map(len, encode(part, add_special_tokens=False))) for part in parts)

    return bare


def measure(model: str, way: str, squad: Path) -> dict[str, float]:
    """Wall and CPU seconds and peak memory of one way in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--model", model, "--way", way, "--squad", str(squad), "--folder", folder]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


def table(results: dict[str, dict[str, dict[str, float]]], squad: Path) -> str:
    """The results as Markdown, with what they mean for the target."""
    num_questions = len(texts("gpt2", squad))
    rows = [
        "| model | way | wall s | CPU s | of the fastest bare, wall | CPU | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, ways in results.items():
        bare = [told for way, told in ways.items() if way != "ours"]
        wall, cpu = min(told["wall_s"] for told in bare), min(told["cpu_s"] for told in bare)
        for way, told in ways.items():
            rows.append(
                f"| {model} | {way} | {told['wall_s']:.1f} | {told['cpu_s']:.1f} | {told['wall_s'] / wall:.2f} | "
                f"{told['cpu_s'] / cpu:.2f} | {told['peak_mib']:.0f} |"
            )
    tokens = ", ".join(f"{ways['ours']['tokens']:,.0f} with {model}" for model, ways in results.items())
    told = (
        f"{squad.name}: {num_questions:,} questions with their paragraphs; tokens as stored: {tokens}. Target: "
        f"{TARGET} of the bare encode. For pairs, ours encodes equal paragraphs of a chunk once."
    )
    return "\n".join([*rows, "", told])


def main() -> None:
    """Measure every way in turn, several times; medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--model", choices=MODELS, help="only this one")
    parser.add_argument("--squad", type=Path, default=SQUAD, help="another file of SQuAD")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.squad.is_file():
        sys.exit("needs ../shared/data")
    if options.way:
        run = work(options.model, options.way, options.squad, options.folder)
        wall, cpu = time.monotonic(), time.process_time()
        tokens = run()
        told = {"wall_s": time.monotonic() - wall, "cpu_s": time.process_time() - cpu, "tokens": tokens}
        print(json.dumps(told | {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
        return
    models = [options.model] if options.model else list(MODELS)
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(options.rounds):
        for model in models:
            for way in WAYS:
                runs.setdefault((model, way), []).append(measure(model, way, options.squad))
                print(model, way, runs[model, way][-1], file=sys.stderr, flush=True)
    results = {
        model: {way: {key: median(run[key] for run in runs[model, way]) for key in runs[model, way][0]} for way in WAYS}
        for model in models
    }
    text = section("Tokenising", "python benchmarks/data.py", table(results, options.squad))
    print(json.dumps({"machine": machine(), "results": results}) if options.json else text)
    if options.write:
        write_section(text)


if __name__ == "__main__":
    main()
