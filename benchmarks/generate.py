"""Generation against transformers' own: ms a token with a static cache on one process, and host time with tp2 on gloo.

Both generate the same tokens greedily from the same weights, in turn, in one process; time is that of the whole call,
prompt and all. Host time is what the thread of the step spends on a processor, kernels of the CPU included, so not what
it waits for others; the median step counts, for a step in which the system took the thread away finds cold caches.
`--json` prints the figures, `--write` puts them into RESULTS.md, `--smallest` runs one model for a moment; `--part`
runs one half, and `--write` then leaves the other half of RESULTS.md as it is.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
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
HOST_CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2 2x128": CONFIGS["gpt2 2x128"],
    "gpt2 12x128": {**CONFIGS["gpt2 2x128"], "n_layer": 12},
    "llama 12x256": {**CONFIGS["llama 4x128"], "num_hidden_layers": 12, "hidden_size": 256, "intermediate_size": 688},
}
TARGET, TARGET_TP = 0.7, 1.5
PROMPT = [(7 * place) % 500 + 2 for place in range(32)]


def config(name: str) -> Any:
    """The model's config, which never ends a text."""
    return AutoConfig.for_model(**{**CONFIGS, **HOST_CONFIGS}[name] | _NO_END | {"initializer_range": 0.1})


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
        told = [[(end - begin) * 1e6 for begin, end in pairwise(times[first:])] for times in (host, wall)]
        (Path(folder) / f"{mesh.rank}.json").write_text(json.dumps(told))


def bare_sum(folder: str) -> None:
    """Leave what one sum over two ranks costs by itself, of as many bytes as a token has in a small model."""
    with rank_context("cpu") as device:
        torch.set_num_threads(1)
        mesh = make_mesh(Plan.parse("tp2"), device)
        x = torch.ones(128)
        times = []
        for _ in range(500):
            x.fill_(1)
            begun = time.thread_time(), time.perf_counter()
            dist.all_reduce(x, group=mesh.groups["tp"])
            times.append((time.thread_time() - begun[0], time.perf_counter() - begun[1]))
        told = [median(one[kind] for one in times[50:]) * 1e6 for kind in (0, 1)]
        (Path(folder) / f"{mesh.rank}.json").write_text(json.dumps(told))


def launch(function: Callable[..., None], *arguments: Any, num_ranks: int) -> dict[str, Any]:
    """Run the function on ranks of their own; gives what they left, by file."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(function, *arguments, folder, num_ranks=num_ranks, log_dir=Path(folder) / "logs")
        return {path.stem: json.loads(path.read_text()) for path in Path(folder).glob("*.json")}


def measure_single(names: list[str], new_tokens: int, rounds: int, threads: int) -> dict[str, Any]:
    """Ms a token of each model on one process."""
    return {name: launch(one_process, name, new_tokens, rounds, threads, num_ranks=1)["told"] for name in names}


def measure_host(names: list[str], new_tokens: int, rounds: int) -> dict[str, Any]:
    """Host and wall time a token and layer, in µs, of each model and plan: of its slower rank, steps of all rounds."""
    found: dict[str, Any] = {}
    for name in names:
        steps: dict[str, dict[str, list[list[float]]]] = {"dp1": {}, "tp2": {}}
        for _ in range(rounds):
            for plan, of_plan in steps.items():
                told = launch(host_time, name, plan, new_tokens, num_ranks=Plan.parse(plan).world_size)
                for rank, times in told.items():
                    of_rank = of_plan.setdefault(rank, [[], []])
                    for kind in (0, 1):
                        of_rank[kind] += times[kind]
        layers = int(config(name).num_hidden_layers)
        found[name] = {
            plan: [max(median(times[kind]) for times in of_plan.values()) / layers for kind in (0, 1)]
            for plan, of_plan in steps.items()
        }
    return found


def single_table(results: dict[str, Any]) -> str:
    """The times of one process as Markdown."""
    rows = [
        "| model | parameters | transformers, static cache: ms/token | ours | of it | ours without replaying | of it | "
        "same tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, told in results.items():
        theirs, ours, plain = (median(told["ms"][way]) for way in ("transformers", "ours", "ours, plainly"))
        times = f"{theirs:.2f} | {ours:.2f} | {ours / theirs:.2f} | {plain:.2f} | {plain / theirs:.2f}"
        same = "yes" if told["same_tokens"] else "no"
        rows.append(f"| {name} | {told['parameters'] / 1e6:.1f} M | {times} | {same} |")
    rows += ["", f"Medians of rounds in turn, one thread unless told; the aim is {TARGET} of transformers'."]
    return "\n".join(rows)


def host_table(results: dict[str, Any], bare: Sequence[float]) -> str:
    """Host times as Markdown."""
    rows = ["| model | plan | host µs a token and layer | wall µs | host, of one process |", "|---|---|---|---|---|"]
    for name, times in results.items():
        for plan, (host, wall) in times.items():
            rows.append(f"| {name} | {plan} | {host:.0f} | {wall:.0f} | {host / times['dp1'][0]:.2f} |")
    rows += [
        "",
        f"gloo, one thread a rank; the median step of the slower rank; the aim is {TARGET_TP}. A layer sums twice; one "
        f"sum of 512 bytes by itself takes {bare[0]:.0f} µs of the host's thread, {bare[1]:.0f} µs of the wall.",
    ]
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
    parser.add_argument("--part", choices=["single", "host"], help="one half only")
    options = parser.parse_args()
    most = 1 if options.smallest else None
    if options.smallest:
        options.new_tokens, options.rounds = 32, 3
    results: dict[str, Any] = {"machine": machine()}
    tables = {}
    if options.part != "host":
        names = list(CONFIGS)[:most]
        results["one_process"] = measure_single(names, options.new_tokens, options.rounds, options.threads)
        tables["Generation"] = single_table(results["one_process"])
    if options.part != "single":
        results["us_a_token_and_layer"] = measure_host(list(HOST_CONFIGS)[:most], options.new_tokens, options.rounds)
        told = launch(bare_sum, num_ranks=2)
        results["us_a_bare_sum"] = [max(times[kind] for times in told.values()) for kind in (0, 1)]
        tables["Generation: host time"] = host_table(results["us_a_token_and_layer"], results["us_a_bare_sum"])
    print(json.dumps(results) if options.json else "\n\n".join(tables.values()))
    for title, text in tables.items() if options.write else ():
        part = "host" if "host" in title else "single"
        write_section(section(title, f"python benchmarks/generate.py --part {part} --write", text))


if __name__ == "__main__":
    main()
