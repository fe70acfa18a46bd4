"""Options of `meshloom train` for how long it trains, what it evaluates on, and how it computes; and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import click

from meshloom.errors import UsageError
from meshloom.hardware.device import load_device
from meshloom.train.sinks import check_wandb
from meshloom.train.sources import Source, find_sources

_TEST_STEPS = 10
_PEAKS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # precisions, and what a device file calls them


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the options here ask of a run; `epochs` is None where steps are counted."""

    epochs: float | None
    eval_steps: int | None
    eval_data: Sequence[str]
    eval_fraction: float | None
    eval_sequences: int | None
    attention: Any
    hardware: str | None


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command."""
    positive = click.FloatRange(0, min_open=True)
    options = [
        click.option("--test", is_flag=True, help=f"See whether it runs: {_TEST_STEPS} steps, or --max-steps."),
        click.option("--train", is_flag=True, help="Train on --data for --epochs, or for --max-steps."),
        click.option("--epochs", type=positive, help="How often each sequence comes, such as 3 or 0.5; means --train.  "
                     "[default: 1 with --train]"),
        click.option("--max-steps", type=click.IntRange(1), help="Optimizer steps.  "
                     f"[default: {_TEST_STEPS}, or what --epochs need]"),
        click.option("--eval-data", multiple=True, help="What to evaluate on, as --data."),
        click.option("--eval-fraction", type=click.FloatRange(0, 1, min_open=True, max_open=True),
                     help="Hold out this share of --data, the end of each source, to evaluate on."),
        click.option("--eval-steps", type=click.IntRange(1), help="Steps between evaluations.  "
                     "[default: at the end only]"),
        click.option("--eval-sequences", type=click.IntRange(1), help="Sequences to evaluate on, evenly spread.  "
                     "[default: all]"),
        click.option("--attention", type=click.Choice(["sdpa", "eager", "flash"]), help="How attention is computed.  "
                     "[default: sdpa where the model has it]"),
        click.option("--zero", default="0", show_default=True, type=click.Choice(["0", "1"]), callback=_number,
                     help="1: dp ranks share the optimizer's states, as ZeRO-1 does."),
        click.option("--compile", "compiled", is_flag=True, help="Compile each layer with torch.compile."),
        click.option("--hardware", help="The device to count MFU by, such as h100-sxm, or a TOML file."),
        click.option("--wandb", metavar="PROJECT", is_flag=False, flag_value="meshloom",
                     help="Also report to this project of Weights & Biases."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _number(context: Any, parameter: Any, value: str) -> int:
    return int(value)


def take(options: dict[str, Any]) -> Asked:
    """Take what is ours from `options`, and put in `max_steps`, None where epochs decide it; raises UsageError."""
    test, train, epochs = (options.pop(name, None) for name in ("test", "train", "epochs"))
    steps = options.get("max_steps")
    if test and (train or epochs):
        raise UsageError("--test: expected it alone; it runs a few steps, --train and --epochs run through the data")
    if epochs and steps:
        raise UsageError(f"--epochs {epochs:g}: expected it or --max-steps, both say how long to train")
    if (train or epochs) and not options.get("data"):
        raise UsageError("--train: expected --data; to see whether a model runs, use --test")
    if train and not steps:
        epochs = epochs or 1.0
    options["max_steps"] = None if epochs else steps or _TEST_STEPS
    names = ("eval_steps", "eval_data", "eval_fraction", "eval_sequences", "attention", "hardware")
    asked = Asked(epochs=epochs, **{name: options.pop(name, None) for name in names})
    if asked.eval_data and asked.eval_fraction:
        raise UsageError("--eval-fraction: expected it or --eval-data, both say what to evaluate on")
    given = asked.eval_data or asked.eval_fraction
    for name in ("eval_steps", "eval_sequences"):
        if getattr(asked, name) and not given:
            raise UsageError(f"--{name.replace('_', '-')}: expected --eval-data or --eval-fraction with it")
    if asked.attention == "flash" and options.get("precision", "fp32") == "fp32":
        raise UsageError("--attention flash: expected --precision bf16 or fp16, its kernels know no fp32")
    if options.get("wandb") is not None:
        check_wandb()
    return asked


def complete(job: Any, asked: Asked, open_stream: Callable[[Sequence[Source]], Any]) -> Any:
    """The job with its length, what it evaluates on and what MFU is counted by; raises DataError, HardwareError."""
    from meshloom.model.build import flops_per_token
    from meshloom.train.data import hold_out
    from meshloom.train.evaluate import Evaluation

    held = None
    if asked.eval_fraction:
        kept, held = hold_out(job.stream, asked.eval_fraction)
        job = replace(job, stream=kept)
    elif asked.eval_data:
        held = open_stream(find_sources(asked.eval_data))
    if asked.epochs is not None:
        job = job.for_epochs(asked.epochs)
    if held is not None:
        every = asked.eval_steps or job.max_steps
        job = replace(job, evaluation=Evaluation(stream=held, steps=every, num_sequences=asked.eval_sequences))
    if asked.hardware:
        peak = load_device(asked.hardware).peak(_PEAKS[job.precision])
        flops = flops_per_token(job.config, job.objective, seq_length=job.seq_length)
        job = replace(job, peak_flops=peak, flops_per_token=flops)
    return job


def length(job: Any, asked: Asked) -> list[str]:
    """How long a run of epochs is, and what it evaluates on, in words: a line each."""
    told = []
    if asked.epochs is not None:
        num_sequences = job.stream.num_sequences
        told.append(
            f"{asked.epochs:g} epoch{'s' * (asked.epochs != 1)} of {num_sequences * job.seq_length:,} tokens "
            f"({num_sequences:,} sequences): {job.max_steps:,} steps of {job.tokens_per_step:,} tokens, "
            f"{job.max_steps * job.tokens_per_step:,} in all"
        )
    what = job.evaluation
    if what is not None:
        num_sequences = min(what.stream.num_sequences, what.num_sequences or what.stream.num_sequences)
        when = "at the end" if what.steps >= job.max_steps else f"every {what.steps:,} steps and at the end"
        told.append(f"evaluation on {num_sequences:,} sequences, {num_sequences * job.seq_length:,} tokens, {when}")
    return told
