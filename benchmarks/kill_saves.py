"""Kill saving at random moments, again and again: what is listed can be loaded, and nothing older is lost.

Each try forks the ranks of a small run that do nothing but save, one checkpoint after the other; each is killed by
SIGKILL at a random moment, mostly while files are written or removed, all ranks within a few milliseconds. Then every
checkpoint that is listed is loaded and held to what the rank must have saved, and the newest must be at least as new as
the last that a rank was told is done.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import GPT2Config

from meshloom.model.build import build_model
from meshloom.model.initial import record
from meshloom.model.step import make_optimizer
from meshloom.model.weights import build_part
from meshloom.parallel.apply import check_plan
from meshloom.parallel.mesh import make_mesh
from meshloom.plan import Plan
from meshloom.train.checkpoint import Checkpoints, check_checkpoint, checkpoints
from results import section, write_section

CONFIG = GPT2Config(vocab_size=512, n_layer=2, n_head=4, n_embd=128, n_positions=64, bos_token_id=0, eos_token_id=0)
KEEP = 3


def open_run(folder: Path, plan: Plan, rank: int, store: str) -> tuple[Checkpoints, torch.nn.Module, Any]:
    """This rank's model, optimizer and checkpoints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store), rank=rank, world_size=plan.world_size)
    mesh = make_mesh(plan, torch.device("cpu"))
    model = build_part(CONFIG, "causal", mesh=mesh, seed=0)
    optimizer = make_optimizer(model, learning_rate=0.0, weight_decay=0.0)
    whole = build_model(CONFIG, "causal", seed=0, device="meta")
    return Checkpoints(folder, whole=whole, model=model, optimizer=optimizer, mesh=mesh, keep=KEEP), model, optimizer


def fill(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """All weights, and their states, are the number of the step."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step)
            state = {"exp_avg": torch.full_like(parameter, step), "exp_avg_sq": torch.full_like(parameter, step)}
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **state}


def save_for_ever(folder: str, plan: str, rank: int, store: str, begin: int, told: Any) -> None:
    """What a rank does until it is killed: it notes in `told` which step is done for sure."""
    saved, model, optimizer = open_run(Path(folder), Plan.parse(plan), rank, store)
    for step in range(begin, begin + 10_000):
        fill(model, optimizer, step)
        if rank == 0 and step == begin:
            told.value = begin - 1  # ready: from here on it saves
        saved.save(step, data={"sequences": step})
        if rank == 0:
            told.value = step - 1  # the save before this one was waited for


def start(folder: Path, plan: Plan, begin: int, store: str) -> tuple[list[Any], Any]:
    """The ranks, and the last step that is done for sure; it stays -1 if a rank died before it saved."""
    context = multiprocessing.get_context("fork")
    told = context.Value("q", -1, lock=False)  # a rank that is killed would take the lock along
    arguments = [(str(folder), str(plan), rank, store, begin, told) for rank in range(plan.world_size)]
    ranks: list[Any] = [context.Process(target=save_for_ever, args=one) for one in arguments]
    for rank in ranks:
        rank.start()
    while told.value < 0 and all(rank.is_alive() for rank in ranks):
        time.sleep(0.001)
    if told.value < 0:
        for rank in ranks:
            rank.kill()
            rank.join()
    return ranks, told


def try_once(folder: Path, plan: Plan, begin: int, seed: int) -> tuple[str, int]:
    """Save until killed; returns where that found the folder, and the last step that was done for sure."""
    chance = random.Random(seed)
    for number in range(3):  # gloo's ranks now and then do not find one another, before anything is saved
        ranks, told = start(folder, plan, begin, str(folder.parent / f"store.{seed}.{number}"))
        if told.value >= 0:
            break
    assert told.value >= 0, "ranks died by themselves, three times"
    time.sleep(chance.uniform(0, 0.15))
    if chance.random() < 0.8:  # else at any moment; while it writes, or removes what is old, matters more
        wanted = chance.choice([".*.part", ".*.part", ".*.gone"])
        until = time.monotonic() + 2
        while time.monotonic() < until and not any(folder.glob(wanted)):
            pass
        time.sleep(chance.choice([0, chance.uniform(0, 0.01)]))
    for rank in chance.sample(ranks, len(ranks)):
        assert rank.pid is not None
        os.kill(rank.pid, signal.SIGKILL)
        time.sleep(chance.choice([0, 0, 0.003, 0.02]))
    for rank in ranks:
        rank.join()
    names = {path.name.rpartition(".")[2] for path in folder.iterdir() if path.name.startswith(".")}
    return "+".join(sorted(names)) or "between", told.value


def load_all(folder: str, result: Any) -> None:
    """Load every listed checkpoint on one rank and compare its values; `result` is the newest step, -1 if one fails."""
    found = checkpoints(Path(folder))
    with tempfile.NamedTemporaryFile() as store:
        saved, model, optimizer = open_run(Path(folder).parent / "elsewhere", Plan(), 0, store.name)
        for path in found:
            state = saved.load(path)
            values = [*model.parameters(), *(optimizer.state[p]["exp_avg_sq"] for p in model.parameters())]
            if not all(bool((value == state.step).all()) for value in values) or check_checkpoint(path) != state:
                result.value = -1
                os._exit(1)
        result.value = max((check_checkpoint(path).step for path in found), default=0)
    os._exit(0)


def measure(plan: Plan, kills: int, seed: int, folder: Path) -> Counter[str]:
    """How often a kill found the folder how; asserts that each listed checkpoint loads and none is lost."""
    where: Counter[str] = Counter()
    context = multiprocessing.get_context("fork")
    newest = context.Value("q", 0)
    folder.mkdir()
    for number in range(kills):
        before = {path.name for path in checkpoints(folder)}
        found, done = try_once(folder, plan, newest.value + 1, seed * 1_000_000 + number)
        where[found] += 1
        loading = context.Process(target=load_all, args=(str(folder), newest))
        loading.start()
        loading.join()
        assert loading.exitcode == 0, f"kill {number}: a listed checkpoint cannot be loaded, see {folder}"
        assert newest.value >= done, f"kill {number}: step {done} was saved and is lost"
        now = checkpoints(folder)
        lost = before - {path.name for path in now}
        assert not lost or len(now) >= KEEP, f"kill {number}: lost {lost}"
    return where


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--plans", default="dp1,tp2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="put the result into RESULTS.md")
    options = parser.parse_args()
    plans = [Plan.parse(text) for text in options.plans.split(",")]
    lines = ["| plan | kills | while a checkpoint was written | while an old one went | between | cannot be loaded |"]
    lines += ["|---|---|---|---|---|---|"]
    torch.set_num_threads(1)  # and no threads here, for this process is forked
    with torch.device("meta"):
        example = {"input_ids": torch.zeros(1, 8, dtype=torch.long)}
    check_plan(build_model(CONFIG, "causal", seed=0, device="meta"), Plan(tp=2), example)  # what that imports, it has
    record(lambda: build_model(CONFIG, "causal", seed=0))
    with tempfile.TemporaryDirectory() as folder:
        for plan in plans:
            kills = options.kills // len(plans)
            where = measure(plan, kills, options.seed, Path(folder) / f"run.{plan}")
            writing = sum(count for name, count in where.items() if "part" in name)
            going = sum(count for name, count in where.items() if "gone" in name and "part" not in name)
            lines.append(f"| {plan} | {kills} | {writing} | {going} | {where['between']} | 0 |")
    command = f"python benchmarks/kill_saves.py --kills {options.kills} --plans {options.plans}"
    text = section("Kills while saving", command, "\n".join(lines))
    print(text)
    if options.write:
        write_section(text)


if __name__ == "__main__":
    sys.exit(main())
