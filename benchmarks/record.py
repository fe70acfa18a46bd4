"""What recording costs: a recorded step, and a recorder that is not yet due, against a plain step.

Plain and recorded steps take turns in one process; medians of their times, and their ratio. The recorded step is timed
as the training loop sees it, without writing and converting the files, which is told apart. A recorder that is not due
costs far less than a step varies, so its own time around nothing is taken, and divided by the plain step's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from statistics import median

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from meshloom import Recorder
from results import machine, section, write_section


def measure(rounds: int) -> dict[str, float]:
    """Medians in milliseconds."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=12, n_head=4, n_embd=256, vocab_size=8000))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(8000, (4, 128))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    times: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        idle = Recorder(folder, step=1 << 30, model=model)
        for number in range(rounds + 2):
            recorder = Recorder(folder, step=number, model=model)
            kinds = ["plain", "recorded"]
            for kind in kinds if number % 2 else reversed(kinds):
                begin = time.perf_counter()
                if kind == "plain":
                    step()
                    end = time.perf_counter()
                else:
                    with recorder(number):
                        inside = time.perf_counter()
                        step()
                        end = time.perf_counter()
                    if number >= 2:
                        times["start"].append(inside - begin)
                        times["writing"].append(time.perf_counter() - end)
                    begin = inside
                if number >= 2:  # the first rounds warm up
                    times[kind].append(end - begin)
        for number in range(10_000):
            begin = time.perf_counter()
            with idle(number):
                pass
            times["idle"].append(time.perf_counter() - begin)
    return {kind: 1000 * median(values) for kind, values in times.items()}


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    told = measure(options.rounds)
    if options.json:
        print(json.dumps({"machine": machine(), "milliseconds": told}))
        return
    rows = ["| step of GPT-2 (12 layers of 256, 4 × 128 tokens) | median ms | to a plain step |", "|---|---|---|"]
    rows += [f"| {kind} | {told[kind]:.1f} | {told[kind] / told['plain']:.3f} |" for kind in ("plain", "recorded")]
    idle = 1000 * told["idle"]
    rows += [
        "",
        f"A recorder that is not due costs {idle:.2f} µs a step, {100 * told['idle'] / told['plain']:.5f} % of a plain "
        f"one. Starting the recorder takes {told['start']:.1f} ms before the step; writing, linking and converting the "
        f"files takes {told['writing']:.0f} ms after it.",
    ]
    text = section("What recording costs", "python benchmarks/record.py", "\n".join(rows))
    print(text)
    if options.write:
        write_section(text)


if __name__ == "__main__":
    main()
