"""Our training loop against a bare PyTorch loop and others': what each adds to a step, and tokens a second.

Same model (GPT-2 from one seed), same fused AdamW, same clipping, batches of the same shape, in one process. Each loop
has a thread that waits for its turn, and the loops take turns step by step, in an order that is drawn anew each time; a
step lasts from its beginning to that of the next one, so all that a loop does between its steps counts: reading data,
learning rates, logging, callbacks. What a loop adds is its step less bare's of the same turn, so that a machine that
changes its speed does so for all: the median of those that log and of those that do not, by how many there are. The
time of the processor is told beside that on the clock: on a machine with other work it is the one to look at.

Loops: bare (batches ready in memory); ours (`meshloom train` on its own stream of tokenised data); accelerate, Hugging
Face's Trainer and Lightning Fabric, each with a DataLoader and used as its documentation shows. Peers that are not
installed are told (`pip install 'meshloom[bench]'`). On a GPU the model is GPT-2 124M in bf16, with torch.compile of
the layers.

Nothing here waits for ever: a loop whose step takes longer than --limit ends the run, and so does everything together
after ten times that; both tell where it stands. What tracing costs while it is off is told too: the hook around a step,
and the scopes by which a trace would know its phases. What it costs when it is on is told by `benchmarks/record.py`.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import random
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from meshloom.model.build import build_model, flops_per_token
from meshloom.model.config import load_tokenizer
from meshloom.model.step import make_optimizer, phase
from meshloom.parallel.compiled import compile_layers
from meshloom.parallel.flow import find_layers
from meshloom.plan import Plan
from meshloom.train.data import batches, make_stream
from meshloom.train.job import Job
from meshloom.train.loop import train_rank
from meshloom.train.shards import tokenise
from meshloom.train.sources import SAMPLE, Reading, find_sources
from results import machine, section, write_section

MAX_NORM, RATE = 1.0, 1e-4
LOG_STEPS = 10  # of ours and of Trainer
WARMUP = LOG_STEPS  # turns that are not counted


@dataclass
class Setting:
    """What all loops train, on what."""

    device: torch.device
    config: Any
    batch_size: int
    seq_length: int
    steps: int
    compiled: bool
    folder: Path
    tokenizer: Any = field(default_factory=lambda: load_tokenizer("bytes"))

    def __post_init__(self) -> None:
        sources = find_sources([SAMPLE])
        shards = tokenise(
            sources, self.tokenizer, "causal", cache=self.folder / "cache", reading=Reading(text_field="text")
        )
        self.stream = make_stream(shards, [None], self.tokenizer, "causal", seq_length=self.seq_length, seed=0)
        rows = islice(batches(self.stream, batch_size=1, rank=0, num_ranks=1), self.batch_size * self.steps)
        self.rows = [{name: tensor[0] for name, tensor in row.items()} for row in rows]

    @property
    def precision(self) -> str:
        """bf16 on a GPU."""
        return "bf16" if self.device.type == "cuda" else "fp32"

    def model(self) -> nn.Module:
        """The model, on the device, in training mode."""
        model = build_model(self.config, "causal", seed=0).to(self.device).train()
        if self.compiled:
            compile_layers(model, find_layers(model))
        return model

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Fused AdamW without ours' watch over gradients."""
        groups = make_optimizer(model, learning_rate=RATE, weight_decay=0.1).param_groups
        return torch.optim.AdamW(
            [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups],
            lr=RATE, betas=(0.9, 0.95), fused=True,
        )  # fmt: skip

    def autocast(self) -> Any:
        """Around a forward."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def loader(self) -> Any:
        """A DataLoader over the same rows, as one writes it."""
        return torch.utils.data.DataLoader(self.rows, batch_size=self.batch_size)  # type: ignore[arg-type]


Loop = Callable[[Callable[[], None]], None]  # trains `steps` steps, and calls what it is given as each begins


def bare(setting: Setting) -> Loop:
    """Nothing but what a step needs."""
    model = setting.model()
    optimizer = setting.optimizer(model)
    ready = [{name: tensor.to(setting.device) for name, tensor in batch.items()} for batch in setting.loader()]

    def run(begin: Callable[[], None]) -> None:
        for batch in ready:
            begin()
            with setting.autocast():
                loss = model(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def ours(setting: Setting) -> Loop:
    """`meshloom train`, logging every tenth step."""
    job = Job(
        config=setting.config, objective="causal", tokenizer=setting.tokenizer, plan=Plan(), stream=setting.stream,
        max_steps=setting.steps, batch_size=setting.batch_size, seq_length=setting.seq_length, learning_rate=RATE,
        weight_decay=0.1, max_grad_norm=MAX_NORM, seed=0, log_steps=LOG_STEPS, compiled=setting.compiled,
        precision=setting.precision,  # type: ignore[arg-type]
    )  # fmt: skip

    def run(begin: Callable[[], None]) -> None:
        def around(mesh: Any, model: nn.Module) -> Callable[[int], Any]:
            def at(step: int) -> Any:
                begin()
                return nullcontext()

            return at

        with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
            train_rank(job, folder, setting.device.type, around, False)

    return run


def accelerate(setting: Setting) -> Loop:
    """Hugging Face accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=setting.device.type == "cpu", mixed_precision="bf16" if setting.precision == "bf16" else "no"
    )
    plain = setting.model()
    model, optimizer, loader = accelerator.prepare(plain, setting.optimizer(plain), setting.loader())

    def run(begin: Callable[[], None]) -> None:
        for batch in loader:
            begin()
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()

    return run


def fabric(setting: Setting) -> Loop:
    """Lightning Fabric."""
    from lightning.fabric import Fabric

    precision = "bf16-mixed" if setting.precision == "bf16" else "32-true"
    made = Fabric(accelerator=setting.device.type, devices=1, precision=precision)
    plain = setting.model()
    model, optimizer = made.setup(plain, setting.optimizer(plain))
    loader = made.setup_dataloaders(setting.loader())

    def run(begin: Callable[[], None]) -> None:
        for batch in loader:
            begin()
            loss = model(**batch).loss
            made.backward(loss)
            made.clip_gradients(model, optimizer, max_norm=MAX_NORM, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad()

    return run


def trainer(setting: Setting) -> Loop:
    """Hugging Face's Trainer, logging every tenth step."""
    model = setting.model()

    class Beginning(TrainerCallback):
        told: Callable[[], None]

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.told()

    beginning = Beginning()
    with tempfile.TemporaryDirectory() as folder:
        made = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder, per_device_train_batch_size=setting.batch_size, max_steps=setting.steps,
                learning_rate=RATE, max_grad_norm=MAX_NORM, logging_steps=LOG_STEPS, save_strategy="no",
                report_to="none", disable_tqdm=True, use_cpu=setting.device.type == "cpu",
                bf16=setting.precision == "bf16", dataloader_pin_memory=False, optim="adamw_torch_fused",
            ),
            train_dataset=setting.rows, callbacks=[beginning],
        )  # fmt: skip

    made.remove_callback(PrinterCallback)

    def run(begin: Callable[[], None]) -> None:
        beginning.told = begin
        made.optimizer = made.lr_scheduler = None  # a run again is a run from the first step
        made.train()

    return run


PEERS: dict[str, tuple[Callable[[Setting], Loop], str]] = {
    "accelerate": (accelerate, "accelerate"),
    "Lightning Fabric": (fabric, "lightning"),
    "Trainer of transformers": (trainer, "accelerate"),  # which it needs
}


def loops(setting: Setting) -> Iterator[tuple[str, Loop]]:
    """Those that can be here; tells of the others."""
    yield "bare", bare(setting)
    yield "Meshloom", ours(setting)
    for name, (make, package) in PEERS.items():
        if find_spec(package) is None:
            print(f"{name}: left out, for {package} is not installed; pip install 'meshloom[bench]'")
        else:
            yield name, make(setting)


class Taking:
    """A loop in a thread of its own that does one step when it is told to, within `limit_s`."""

    def __init__(self, name: str, run: Loop, device: torch.device, limit_s: float) -> None:
        self._go, self._done = threading.Event(), threading.Event()
        self._name, self._run, self._device, self._limit_s = name, run, device, limit_s
        self._began = (0.0, 0.0)
        self.took = (0.0, 0.0)  # milliseconds of the last step: on the clock, and of the processor
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()
        self._wait("begin")

    def step(self) -> tuple[float, float]:
        """Do a step; returns what it took."""
        self._done.clear()
        self._go.set()
        self._wait("end its step")
        return self.took

    def _wait(self, what: str) -> None:
        if not self._done.wait(self._limit_s):
            frame = sys._current_frames().get(self._thread.ident or 0)
            where = "".join(traceback.format_stack(frame)[-4:]) if frame is not None else "its thread has ended\n"
            raise SystemExit(
                f"{self._name}: expected it to {what} within {self._limit_s:.0f} s (--limit); it is at\n{where}"
            )
        if self.error is not None:
            raise SystemExit(f"{self._name}: failed: {type(self.error).__name__}: {self.error}") from self.error

    def _loop(self) -> None:
        try:
            self._run(self._begin)
        except BaseException as error:
            self.error = error
        self._end()

    def _begin(self) -> None:
        self._end()
        self._go.wait()
        self._go.clear()
        torch.set_num_threads(1)  # for all alike; ours takes what the ranks of a host have each
        self._began = _clocks()

    def _end(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        now = _clocks()
        self.took = (now[0] - self._began[0], now[1] - self._began[1])
        self._done.set()


def _clocks() -> tuple[float, float]:
    return 1000 * time.perf_counter(), 1000 * time.process_time()


Steps = list[tuple[float, float]]


def measure(setting: Setting, limit_s: float) -> dict[str, Steps]:
    """Loop -> its steps, turn by turn."""
    running = {name: Taking(name, run, setting.device, limit_s) for name, run in loops(setting)}
    times: dict[str, Steps] = {name: [] for name in running}
    order, chosen = list(running), random.Random(0)
    for turn in range(setting.steps - 1):  # the last step has no next one
        chosen.shuffle(order)
        for name in order:
            took = running[name].step()
            if turn >= WARMUP:
                times[name].append(took)
    return times


def summary(setting: Setting, times: dict[str, Steps]) -> dict[str, dict[str, float]]:
    """Of each loop: median ms of a step, on the clock and of the processor, each with what it adds to bare's."""
    told = {}
    for name, steps in times.items():
        row = {}
        for place, kind in enumerate(("step", "processor")):
            row[f"{kind}_ms"] = median(step[place] for step in steps)
            more = [mine[place] - plain[place] for mine, plain in zip(steps, times["bare"], strict=True)]
            logging_ones = more[LOG_STEPS - 1 :: LOG_STEPS]  # the first turn here is a multiple of LOG_STEPS
            others = [value for index, value in enumerate(more) if (index + 1) % LOG_STEPS]
            row[f"{kind}_above_bare_when_logging_ms"] = median(logging_ones)
            # of a step on average: all those that log count, and not only the others, as in a median of all
            row[f"{kind}_above_bare_ms"] = (
                median(others) * (LOG_STEPS - 1) + row[f"{kind}_above_bare_when_logging_ms"]
            ) / LOG_STEPS
        told[name] = {**row, "tokens_per_second": 1000 * setting.batch_size * setting.seq_length / row["step_ms"]}
    return told


def tracing_off_us() -> float:
    """Microseconds of a step that go to what a trace would need, while none is taken: median."""
    around: Callable[[int], Any] = lambda step: nullcontext()  # noqa: E731 - as in the loop
    times = []
    for step in range(2000):
        begin = time.perf_counter_ns()
        with around(step):
            for name in ("forward", "backward", "optimizer"):
                with phase(name):
                    pass
        times.append((time.perf_counter_ns() - begin) / 1000)
    return median(times)


def setting_of(options: argparse.Namespace, folder: Path) -> Setting:
    """GPT-2 tiny on a CPU, GPT-2 124M on a GPU."""
    gpu = torch.cuda.is_available() and not options.cpu
    sizes: dict[str, Any] = {"vocab_size": 264, "bos_token_id": 0, "eos_token_id": 0}
    sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    if not gpu:
        sizes |= {"n_layer": 2, "n_head": 4, "n_embd": 128, "n_positions": 256}
    else:
        sizes |= {"vocab_size": 50257}
    return Setting(
        device=torch.device("cuda" if gpu else "cpu"), config=AutoConfig.for_model("gpt2", **sizes),
        batch_size=options.batch_size or (32 if gpu else 4), seq_length=options.seq_length or (1024 if gpu else 64),
        steps=options.steps, compiled=gpu, folder=folder,
    )  # fmt: skip


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--seq-length", type=int)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that a loop's step may take")
    parser.add_argument("--cpu", action="store_true", help="also where there is a GPU")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(10 * options.limit, exit=True)  # also where a loop holds the interpreter's lock
    with tempfile.TemporaryDirectory() as folder:
        setting = setting_of(options, Path(folder))
        told = summary(setting, measure(setting, options.limit))
    faulthandler.cancel_dump_traceback_later()
    off_us = tracing_off_us()
    flops = flops_per_token(setting.config, "causal", seq_length=setting.seq_length)
    if options.json:
        print(json.dumps({"machine": machine(), "flops_per_token": flops, "tracing_off_us": off_us, "loops": told}))
        return
    rows = [
        "| loop | ms a step | above bare | when it logs | processor ms a step | above bare | when it logs | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {name} | {row['step_ms']:.3f} | {row['step_above_bare_ms']:+.3f} | "
        f"{row['step_above_bare_when_logging_ms']:+.3f} | {row['processor_ms']:.3f} | "
        f"{row['processor_above_bare_ms']:+.3f} | {row['processor_above_bare_when_logging_ms']:+.3f} | "
        f"{row['tokens_per_second']:,.0f} |"
        for name, row in told.items()
    ]
    config = setting.config
    size = f"{config.n_layer} layers of {config.n_embd}, vocabulary {config.vocab_size}"
    rows += [
        "",
        f"GPT-2 ({size}), {setting.batch_size} × {setting.seq_length} tokens, {setting.precision}, on "
        f"{setting.device.type}; {flops / 1e6:,.1f} MFLOP a token; {options.steps} steps of each "
        f"in turns; ours and Trainer log every {LOG_STEPS}th.",
        "",
        f"Tracing while it is off: {off_us:.1f} µs a step, {off_us / 10 / told['bare']['step_ms']:.2f} % of bare's.",
    ]
    given = [f"--{name.replace('_', '-')} {value}" for name, value in vars(options).items()
             if value not in (None, False, parser.get_default(name)) and name != "write"]  # fmt: skip
    text = section("Training loops", " ".join(["python benchmarks/train.py", *given]), "\n".join(rows))
    print(text)
    if options.write:
        write_section(text)


if __name__ == "__main__":
    main()
