"""Memory of a rank while its part of a model is made or loaded, against the share it holds in the end.

Each plan runs on real gloo ranks, each a process of its own; a thread samples the anonymous memory of the rank (what is
its own: pages of files that the system may drop are not) every few milliseconds. The peak above what it held before,
against the bytes of its parameters and buffers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig

from meshloom.model.build import build_model
from meshloom.model.pretrained import fill_from
from meshloom.model.weights import build_part, inner_model
from meshloom.parallel.launch import rank_context, run_ranks
from meshloom.parallel.mesh import make_mesh
from meshloom.plan import Plan
from meshloom.train.checkpoint import Checkpoints
from results import section, write_section

SIZES = {
    "gpt2-xl": {"n_layer": 48, "n_embd": 1600, "n_head": 25},
    "gpt2-large": {"n_layer": 36, "n_embd": 1280, "n_head": 20},
    "gpt2": {},
}


def anonymous_bytes() -> int:
    """The memory of this process that is its own."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status")


@contextmanager
def sampled() -> Iterator[list[int]]:
    """Within this, memory is sampled; the list holds the bytes before and the most there were."""
    found = [anonymous_bytes(), 0]
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(0.002):
            found[1] = max(found[1], anonymous_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
        found[1] = max(found[1], anonymous_bytes())


def measure(out: str, plan: str, size: str, weights: str | None, heads: int | None) -> None:
    """On each rank: make or load its part and note what that took."""
    config = AutoConfig.for_model("gpt2", **SIZES[size])
    if heads is not None:
        config.n_head = heads
    with rank_context("cpu") as device:
        mesh = make_mesh(Plan.parse(plan), device)
        # once with a small model, so that code and caches are there
        few = {"n_layer": 2, "n_embd": 4 * config.n_head, "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 0}
        small = AutoConfig.for_model("gpt2", n_head=config.n_head, **few)
        build_part(small, "causal", mesh=mesh, seed=0)
        with sampled() as found:
            fill = None
            if weights is not None:
                fill = fill_from(Path(weights), build_model(config, "causal", seed=0, device="meta"), mesh=mesh)
            model = build_part(config, "causal", mesh=mesh, seed=0, fill=fill)
        inner = inner_model(model)
        share = sum(tensor.nbytes for tensor in (*inner.parameters(), *inner.buffers()))
        table = {"share": share, "peak": found[1] - found[0]}
        Path(out, f"rank{mesh.rank}.json").write_text(json.dumps(table))


def save(folder: str, size: str, heads: int | None) -> None:
    """Weights to load, made by two ranks."""
    config = AutoConfig.for_model("gpt2", **SIZES[size])
    if heads is not None:
        config.n_head = heads
    with rank_context("cpu") as device:
        mesh = make_mesh(Plan(pp=2), device)
        model = build_part(config, "causal", mesh=mesh, seed=0)
        whole = build_model(config, "causal", seed=0, device="meta")
        Checkpoints(Path(folder), whole=whole, model=model, optimizer=None, mesh=mesh).export("model")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="gpt2-xl", choices=SIZES)
    parser.add_argument("--plans", default="tp2,pp2")
    parser.add_argument("--heads", type=int, help="heads of attention, where a plan needs another number")
    parser.add_argument("--load", action="store_true", help="also load the weights from a safetensors file")
    parser.add_argument("--write", action="store_true", help="put the result into RESULTS.md")
    options = parser.parse_args()
    lines = ["| plan | | rank | share (MB) | peak (MB) | above the share |", "|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        weights = None
        if options.load:
            run_ranks(save, folder, options.size, options.heads, num_ranks=2, log_dir=Path(folder) / "logs.save")
            weights = str(Path(folder) / "model")
        for plan in options.plans.split(","):
            for what, source in (("made", None), ("loaded", weights)):
                if what == "loaded" and source is None:
                    continue
                out = Path(folder) / f"{plan}.{what}"
                out.mkdir()
                num_ranks = Plan.parse(plan).world_size
                arguments = (str(out), plan, options.size, source, options.heads)
                run_ranks(measure, *arguments, num_ranks=num_ranks, log_dir=out / "logs")
                for rank in range(num_ranks):
                    told = json.loads((out / f"rank{rank}.json").read_text())
                    above = told["peak"] / told["share"] - 1
                    megabytes = f"{told['share'] / 1e6:,.0f} | {told['peak'] / 1e6:,.0f}"
                    lines.append(f"| {plan} | {what} | {rank} | {megabytes} | {above:+.1%} |")
    more = f" --heads {options.heads}" if options.heads else ""
    command = f"python benchmarks/memory.py --size {options.size} --plans {options.plans}{more}"
    text = section(f"Memory of a rank, {options.size} in float32", command + " --load" * options.load, "\n".join(lines))
    print(text)
    if options.write:
        write_section(text)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
