"""Generation against transformers' own: ms a token with a static cache on one process, and host time with tp2 on gloo.

Both generate the same tokens greedily from the same weights, in turn, in one process; time is that of the whole call,
prompt and all. Host time is what the thread of the step spends on the CPU, so not what it waits for others.
`--json` prints the figures, `--write` puts them into RESULTS.md, `--smallest` runs one model for a moment.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig

from meshloom.generate.engine import generate
from meshloom.generate.sample import Sampling
from meshloom.model.build import build_model, num_parameters
from meshloom.model.layout import lay_out_for_one_row
from meshloom.model.weights import build_part
from meshloom.parallel.launch import rank_context, run_ranks
from meshloom.parallel.mesh import make_mesh
from meshloom.plan import Plan
from results import machine, section, write_section

_NO_END: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 1, "bos_token_id": 0}
_LLAMA: dict[str, Any] = {"model_type": "llama", "max_position_embeddings": 512}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2 2x128": {"model_type": "gpt2", "n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 512},
    "llama 4x128": {**_LLAMA, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "intermediate_size": 344, "vocab_size": 512},
    "llama 6x384": {**_LLAMA, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6,
                    "num_key_value_heads": 2, "intermediate_size": 1024, "vocab_size": 8192},
    "gpt2 6x384": {"model_type": "gpt2", "n_embd": 384, "n_layer": 6, "n_head": 6, "vocab_size": 8192},
    "gpt2 124M": {"model_type": "gpt2"},
}  # fmt: skip
TARGET, TARGET_TP = 0.7, 1.5
PROMPT = [(7 * place) % 500 + 2 for place in range(32)]


def config(name: str) -> Any:
    """The model's config, which never ends a text."""
    return AutoConfig.for_model(**{**CONFIGS[name], **_NO_END, "initializer_range": 0.1})


def one_process(name: str, new_tokens: int, rounds: int, threads: int, folder: str) -> None:
    """Time ours, ours without replaying, and transformers', in turn; leaves ms a token of each round."""
    with rank_context("cpu") as device:
        torch.set_num_threads(threads)
        mesh = make_mesh(Plan(), device)
        theirs: Any = build_model(config(name), "causal", seed=0).eval()
        ours = lay_out_for_one_row(build_model(config(name), "causal", seed=0).eval())
        ids = torch.tensor([PROMPT])

        def hugging_face() -> list[int]:
            out = theirs.generate(
                ids, max_new_tokens=new_tokens, do_sample=False, cache_implementation="static", disable_compile=True
            )
            return list(map(int, out[0, len(PROMPT) :]))

        def meshloom(plainly: bool = False) -> list[int]:
            made = generate(ours, [PROMPT], mesh=mesh, max_new_tokens=new_tokens, sampling=Sampling(), plainly=plainly)
            return made.tokens[0]

        ways: dict[str, Callable[[], list[int]]] = {
            "transformers": hugging_face,
            "ours": meshloom,
            "ours, plainly": lambda: meshloom(True),
        }
        tokens = {way: run() for way, run in ways.items()}  # warm, too
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, run in ways.items():
                begin = time.perf_counter()
                run()
                times[way].append((time.perf_counter() - begin) / new_tokens * 1e3)
        told = {
            "parameters": num_parameters(ours),
            "threads": torch.get_num_threads(),
            "same_tokens": tokens["ours"] == tokens["transformers"] == tokens["ours, plainly"],
            "ms": times,
        }
        (Path(folder) / "told.json").write_text(json.dumps(told))


def host_time(name: str, plan: str, new_tokens: int, folder: str) -> None:
    """Leave this rank's host and wall time a token, of all steps but the first few."""
    with rank_context("cpu") as device:
        torch.set_num_threads(1)
        mesh = make_mesh(Plan.parse(plan), device)
        model = lay_out_for_one_row(build_part(config(name), "causal", mesh=mesh, seed=0).eval())
        host: list[float] = []
        wall: list[float] = []

        def note(tokens: Any) -> None:
            host.append(time.thread_time())
            wall.append(time.perf_counter())

        generate(model, [PROMPT], mesh=mesh, max_new_tokens=new_tokens, sampling=Sampling(), on_tokens=note)
        first = 5  # steps that record and check
        told = [(times[-1] - times[first]) / (len(times) - 1 - first) * 1e6 for times in (host, wall)]
        (Path(folder) / f"{mesh.rank}.json").write_text(json.dumps(told))


def launch(function: Callable[..., None], *arguments: Any, num_ranks: int) -> dict[str, Any]:
    """Run the function on ranks of their own; gives what they left, by file."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(function, *arguments, folder, num_ranks=num_ranks, log_dir=Path(folder) / "logs")
        return {path.stem: json.loads(path.read_text()) for path in Path(folder).glob("*.json")}


def measure(names: list[str], new_tokens: int, rounds: int, threads: int) -> dict[str, Any]:
    """Everything."""
    single = {name: launch(one_process, name, new_tokens, rounds, threads, num_ranks=1)["told"] for name in names}
    small = names[0]
    found: dict[str, list[list[float]]] = {"dp1": [], "tp2": []}
    for _ in range(rounds):
        for plan, of_plan in found.items():
            told = launch(host_time, small, plan, new_tokens, num_ranks=Plan.parse(plan).world_size)
            of_plan.append([max(rank[kind] for rank in told.values()) for kind in (0, 1)])
    layers = int(config(small).num_hidden_layers)
    tensor = {plan: [median(row[kind] for row in rows) / layers for kind in (0, 1)] for plan, rows in found.items()}
    return {"machine": machine(), "one_process": single, "host_model": small, "us_a_token_and_layer": tensor}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = [
        "| model | parameters | transformers, static cache: ms/token | ours | of it | ours without replaying | of it | "
        "same tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, told in results["one_process"].items():
        theirs, ours, plain = (median(told["ms"][way]) for way in ("transformers", "ours", "ours, plainly"))
        times = f"{theirs:.2f} | {ours:.2f} | {ours / theirs:.2f} | {plain:.2f} | {plain / theirs:.2f}"
        same = "yes" if told["same_tokens"] else "no"
        rows.append(f"| {name} | {told['parameters'] / 1e6:.1f} M | {times} | {same} |")
    rows += ["", f"Medians of rounds in turn, one thread unless told; the aim is {TARGET} of transformers'.", ""]
    rows += ["| plan | host µs a token and layer | wall µs | host, of one process |", "|---|---|---|---|"]
    times = results["us_a_token_and_layer"]
    for plan, (host, wall) in times.items():
        rows.append(f"| {plan} | {host:.0f} | {wall:.0f} | {host / times['dp1'][0]:.2f} |")
    rows += ["", f"{results['host_model']}, gloo, one thread a rank; the slower rank counts; the aim is {TARGET_TP}."]
    return "\n".join(rows)


def main() -> None:
    """Measure, and print or write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--smallest", action="store_true")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the one process; more than free cores only wait")
    options = parser.parse_args()
    names = list(CONFIGS)[:1] if options.smallest else list(CONFIGS)
    if options.smallest:
        options.new_tokens, options.rounds = 32, 3
    results = measure(names, options.new_tokens, options.rounds, options.threads)
    print(json.dumps(results) if options.json else table(results))
    if options.write:
        write_section(section("Generation", "python benchmarks/generate.py --write", table(results)))


if __name__ == "__main__":
    main()
