"""The same training on other plans, and after kill -9: how far apart the losses are, and whether the bits are equal.

GPT-2 trains on SQuAD (or the sample), with the same global batch on each plan; the loss of each step is held to that of
one rank. `--squad` takes the train set and the tokenizer of GPT-2 from ../shared/data, and a GPT-2 with all of its
vocabulary but fewer and narrower layers, so that all runs fit into minutes on two cores; `--squad --model gpt2` is the
full one. None has dropout: ranks of other plans draw other masks. Then a random rank is killed at a random step, the
run is resumed, and its curve and final weights are held to those of the run that nobody disturbed, bit by bit; and the
checkpoint it began from is continued on another plan.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from meshloom.plan import Plan
from results import section, write_section

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SQUAD, TOKENIZER = SHARED / "squad" / "squad-v1.1-train.rebuilt.json.gz", SHARED / "tokenizers" / "gpt2"
# GPT-2s with the vocabulary of SQuAD's tokenizer, by what they have less than the full one
SIZES = {"gpt2-reduced": {"n_layer": 4, "n_head": 4, "n_embd": 128}, "gpt2": {}}
PLANS = ("dp1", "dp2", "tp2", "pp2", "tp2.pp2")


def losses(folder: Path) -> list[float]:
    """The loss of each step."""
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Runs:
    """Runs that differ in nothing but their plan."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.folder, self.steps, self.batch = folder, options.steps, options.batch_size
        data = options.data or "sample"
        tokenizer = options.tokenizer or "bytes"
        model = options.model
        if model in SIZES:
            without = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
            model = str(folder / "config.json")
            Path(model).write_text(json.dumps({"model_type": "gpt2", **SIZES[options.model], **without}))
        self.given = ["--model", model, "--data", data, "--tokenizer", tokenizer, "--max-steps",
                      str(self.steps), "--seq-length", str(options.seq_length), "--gradient-accumulation", "2",
                      "--seed", "1",
                      "--log-steps", "1", "--learning-rate", str(options.learning_rate)]  # fmt: skip

    def command(self, plan: str, name: str, *more: str) -> list[str]:
        """How a run is started."""
        batch = str(self.batch // Plan.parse(plan).dp)
        command = [sys.executable, "-u", "-m", "meshloom.cli", "train", *self.given, "--plan", plan]
        return [*command, "--batch-size", batch, "--out", str(self.folder / name), *more]

    def run(self, plan: str, name: str, *more: str) -> list[float]:
        """Train; returns the losses."""
        subprocess.run(self.command(plan, name, *more), check=True, stdout=subprocess.DEVNULL)
        return losses(self.folder / name)

    def killed(self, plan: str, name: str, rank: int, step: int, *more: str) -> None:
        """Train, and kill -9 the rank when step `step` is told."""
        with subprocess.Popen(
            self.command(plan, name, *more), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(f"step {step}/"):
                    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                    os.kill(int(children[rank]), signal.SIGKILL)
                    break
            process.communicate()
        assert process.returncode == 1, "a run whose rank was killed has failed"


def curves(runs: Runs) -> tuple[list[str], float, list[float]]:
    """Rows of the table, the largest distance of two curves at a step, and the curve of one rank."""
    found = {plan: runs.run(plan, f"curve.{plan}") for plan in PLANS}
    single = found["dp1"]
    rows = []
    for plan, curve in found.items():
        apart = max(abs(one - other) for one, other in zip(curve, single, strict=True))
        rows.append(f"| {plan} | {curve[0]:.4f} | {curve[-1]:.4f} | {apart:.1e} |")
    apart = max(max(of_step) - min(of_step) for of_step in zip(*found.values(), strict=True))
    return rows, apart, single


def resumed(runs: Runs, chosen: random.Random) -> tuple[list[str], bool, float]:
    """What is said of a run that was killed and went on; whether bits are equal; and how far off another plan went."""
    every = max(2, runs.steps // 5)
    save = ("--save-steps", str(every), "--no-save-initial")
    straight = runs.run("dp2", "straight", *save)
    rank, step = chosen.randrange(2), chosen.randrange(every + 1, runs.steps - 1)
    runs.killed("dp2", "killed", rank, step, *save)
    again = runs.run("dp2", "killed", *save, "--resume")  # from the start if nothing was saved yet
    mine, theirs = (
        load_file(runs.folder / name / "checkpoints" / f"checkpoint-{runs.steps}" / "model.safetensors")
        for name in ("killed", "straight")
    )
    same = again == straight and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    checkpoint = runs.folder / "straight" / "checkpoints" / f"checkpoint-{every}"
    other = runs.run("tp2.pp2", "moved", "--resume", str(checkpoint))
    apart = max(abs(one - two) for one, two in zip(other, straight[every:], strict=True))
    word = "equal" if same else "NOT EQUAL"
    told = [
        f"kill -9 of rank {rank} of dp2 at step {step}, then resumed: losses of all {runs.steps} steps and final "
        f"weights are {word} to the bit to those of the run that nobody disturbed.",
        f"From dp2's checkpoint-{every} on tp2.pp2, to step {runs.steps}: at most {apart:.1e} from it.",
    ]
    return told, same, apart


def main() -> int:
    """Measure, print; 1 if a curve is further off than --tolerance or bits differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="gpt2-reduced, a preset, or a config.json  [default: gpt2-tiny]")
    parser.add_argument("--squad", action="store_true", help="SQuAD's train set of ../shared/data and gpt2-reduced")
    parser.add_argument("--data", help="such as train-v1.1.json  [default: the sample]")
    parser.add_argument("--tokenizer", help="[default: bytes]")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=4, help="of a micro-batch over all data-parallel ranks")
    parser.add_argument("--seq-length", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, help="of the rank and step that are killed  [default: another each time]")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    options.model = options.model or ("gpt2-reduced" if options.squad else "gpt2-tiny")
    if options.squad:
        if not SQUAD.is_file():
            sys.exit("--squad needs ../shared/data")
        options.data, options.tokenizer = str(SQUAD), str(TOKENIZER)
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(options, Path(folder))
        rows, apart, _ = curves(runs)
        told, same, moved = resumed(runs, random.Random(options.seed))
    table = ["| plan | first loss | last loss | furthest from dp1 |", "|---|---|---|---|", *rows]
    size = f"{options.model} {SIZES[options.model]}" if SIZES.get(options.model) else options.model
    text = (
        f"{size}, {options.steps} steps of 2 × {options.batch_size} × {options.seq_length} tokens; any two plans are "
        f"at most {apart:.1e} apart at any step."
    )
    data = Path(options.data).name if options.data else "sample"
    where = ["--squad"] if options.squad else [f"--data {data}"] if options.data else []
    given = [*where, f"--model {options.model}", f"--steps {options.steps}"]
    command = " ".join(["python benchmarks/parity.py", *given])
    out = section("Parity of plans, and after kill -9", command, "\n".join([*table, "", text, *told]))
    print(out)
    if options.write:
        write_section(out)
    return int(max(apart, moved) > options.tolerance or not same)


if __name__ == "__main__":
    sys.exit(main())
