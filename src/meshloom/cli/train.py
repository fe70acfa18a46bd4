"""`meshloom train`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from meshloom.chakra.check import check
from meshloom.chakra.file import read_all
from meshloom.cli.data import DUMMY, open_stream
from meshloom.cli.training import Asked, complete, length, take, training_options
from meshloom.errors import FolderError, MeshloomError, UsageError
from meshloom.plan import Plan
from meshloom.train.sources import SAMPLE, Reading, find_sources


@click.command()
@click.option(
    "--model",
    required=True,
    help="A preset (gpt2, gpt2-tiny, bert-base-uncased) or a config.json, which start with random weights; a folder or "
    "a hub id, which start with the weights that are there.",
)
@click.option("--from-scratch", is_flag=True, help="Start with random weights, whatever --model holds.")
@click.option("--shard-cache", help="A folder that keeps each rank's part of the weights of --model for the next time.")
@click.option(
    "--data",
    multiple=True,
    help="A file (.json of SQuAD, .jsonl, .txt, .parquet), a folder, a hub id such as squad, or 'sample'; several with "
    "shares: a.jsonl:0.7.  [default: a dummy set]",
)
@click.option("--text-field", default="text", show_default=True, help="The field of a line or row that holds the text.")
@click.option("--skip-bad-lines", is_flag=True, help="Count lines that cannot be read, instead of ending.")
@click.option("--cache-dir", help="Where tokenised data is kept.  [default: MESHLOOM_CACHE_DIR, or ~/.cache/meshloom]")
@click.option("--tokenizer", help="A tokenizer folder, a hub id, or 'bytes'.  [default: that of --model]")
@click.option("--plan", default="dp1", show_default=True, help="How the work is cut, such as dp2 or tp2.dp2.")
@training_options
@click.option("--batch-size", default=4, show_default=True, type=click.IntRange(1), help="Sequences a micro-batch.")
@click.option(
    "--gradient-accumulation", default=1, show_default=True, type=click.IntRange(1), help="Micro-batches a step."
)
@click.option("--seq-length", default=128, show_default=True, type=click.IntRange(2), help="Tokens a sequence.")
@click.option("--learning-rate", default=5e-4, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--weight-decay", default=0.1, show_default=True, type=click.FloatRange(0))
@click.option("--lr-schedule", default="constant", show_default=True,
              type=click.Choice(["constant", "linear", "cosine", "wsd"]), help="What follows the warmup.")  # fmt: skip
@click.option("--warmup-steps", default=0, show_default=True, type=click.IntRange(0), help="Steps to the full rate.")
@click.option("--precision", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16", "fp16"]),
              help="What the forward computes in; weights and optimizer stay fp32.")  # fmt: skip
@click.option("--recompute", default="none", show_default=True, type=click.Choice(["none", "selective", "full"]),
              help="What backward computes again instead of keeping it.")  # fmt: skip
@click.option("--log-steps", type=click.IntRange(1), help="Steps between reports.  [default: 1, or 10 above 100 steps]")
@click.option("--max-grad-norm", default=1.0, show_default=True, type=click.FloatRange(0), help="0 switches it off.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--objective", type=click.Choice(["causal", "masked"]), help="  [default: what the model is for]")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--out", help="The run folder, new or empty.  [default: runs/<model>.<plan>.<time>]")
@click.option(
    "--schedule",
    type=click.Choice(["gpipe", "1f1b", "interleaved", "zero-bubble"]),
    default="1f1b",
    show_default=True,
    help="With pp: the order of a rank's passes.",
)
@click.option("--virtual-stages", default=1, show_default=True, type=click.IntRange(1), help="With pp: stages a rank.")
@click.option("--trace", is_flag=True, help="Record one step on each rank as a Chakra trace.")
@click.option("--trace-step", type=click.IntRange(1), help="Which step to record.  [default: the third, or the last]")
@click.option("--trace-active", type=click.IntRange(1), default=1, show_default=True, help="How many steps to record.")
@click.option("--trace-separate", is_flag=True, help="Write each recorded step into a folder of its own.")
@click.option("--trace-stacks", is_flag=True, help="Add a table of times as text beside each trace.")
@click.option(
    "--save-steps", default=0, show_default=True, type=click.IntRange(0), help="Steps between checkpoints; 0: none."
)
@click.option("--keep-last", type=click.IntRange(1), help="Checkpoints to keep.  [default: all]")
@click.option("--no-save-initial", is_flag=True, help="With --save-steps: do not save the weights before training.")
@click.option(
    "--resume",
    is_flag=False,
    flag_value="",
    help="Go on from a checkpoint or a run's newest one, on any plan; without a value from --out, if it is there.",
)
@click.option("--background", is_flag=True, help="Return at once; `meshloom runs` tells how it goes.")
@click.option("--prepared", is_flag=True, hidden=True, help="The run folder was made by who started this process.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(**options: Any) -> None:
    """Train a model on a plan of ranks, and record a step if asked.

    On one host the ranks are started here. Under torchrun each process is one rank; then give --out.

    \b
    Examples:
      meshloom train --model gpt2-tiny --tokenizer bytes --data sample --plan dp2 --max-steps 20 --trace
      meshloom train --model gpt2-tiny --tokenizer bytes --data sample --train --epochs 3 --eval-fraction 0.1 \\
          --eval-steps 20
      torchrun --nproc-per-node 2 --no-python meshloom train --model gpt2-tiny --tokenizer bytes \\
          --data sample --plan dp2 --out runs/by-torchrun
      meshloom train --model gpt2-tiny --tokenizer bytes --data sample --plan tp2 --max-steps 40 --save-steps 10 \\
          --resume runs/by-torchrun
    """
    context = click.get_current_context()
    folder = train(arguments=given_arguments(context, leave_out=("out", "resume", "background", "prepared")), **options)
    if folder is not None and options["background"]:
        click.echo(json.dumps({"run": folder.name, "folder": str(folder)}) if options["as_json"] else folder.name)
    elif folder is not None:
        result = outcome(folder)
        click.echo(json.dumps(result) if options["as_json"] else _sentence(result))


def train(
    *,
    model: str,
    plan: str,
    out: str | None,
    device: str = "auto",
    trace: bool = False,
    trace_step: int | None = None,
    trace_active: int = 1,
    trace_separate: bool = False,
    trace_stacks: bool = False,
    resume: str | None = None,
    no_save_initial: bool = False,
    as_json: bool = False,
    background: bool = False,
    prepared: bool = False,
    arguments: Sequence[str] = (),
    **options: Any,
) -> Path | None:
    """Train as the command does and return the run folder; None on ranks of a torchrun other than 0."""
    cut = Plan.parse(plan)
    _check_saving(options)
    asked = take(options)

    from meshloom.parallel.launch import world_from_environment
    from meshloom.train.runs import write_facts

    world = world_from_environment()
    if world is not None:
        cut.with_world_size(world[1])
        if out is None:
            raise UsageError("expected --out where each rank is started by itself, so that all write to one folder")
    resumed = _resumed(resume, out)
    if options["max_steps"] is not None:  # as early as can be
        _first_traced(trace_step, trace_active, options["max_steps"], resumed)
    checkpoint = str(resumed.checkpoint) if resumed and resumed.checkpoint else None
    is_first = world is None or world[0] == 0
    options |= {} if options.get("data") else _dummy(options)
    free = _free_memory() if world is None and device != "cuda" else None
    save: dict[str, Any] = {"save_initial": not no_save_initial, "resume": checkpoint}
    show: dict[str, Any] = {"show": is_first, "quiet": as_json}
    job, num_parameters = _job(model=model, plan=cut, asked=asked, free=free, **show, **save, **options)
    first_traced = _first_traced(trace_step, trace_active, job.max_steps, resumed)
    makes = is_first and not prepared
    folder = _folder(out, model, cut, resumed) if makes else Path(str(out))
    recording = {
        "step": first_traced - 1,
        "active": trace_active,
        "separate": trace_separate,
        "stacks": trace_stacks,
        "facts": {"plan": str(cut), "model": model},
    }
    around = _recorder(folder, cut, recording) if trace else None
    if is_first:
        command = {
            "model": model,
            "plan": plan,
            "trace": trace,
            "resume": checkpoint,
            **options,
            "max_steps": job.max_steps,
        }
        state = "starting" if background else "running"
        write_facts(folder, config=job.config, plan=job.plan, command=command, arguments=arguments, state=state)
        if background:
            _detach(folder, arguments, checkpoint)
            return folder
        if not as_json:
            _announce(job, model, num_parameters, folder)
            for line in length(job, asked):
                click.echo(line)
    _run(job, folder, device, around, show=not as_json, alone=world is None, is_first=is_first)
    return folder if is_first else None


def _run(job: Any, folder: Path, device: str, around: Any, *, show: bool, alone: bool, is_first: bool) -> None:
    """Train on all ranks, which are started here unless this process is one of them, and note how it ended."""
    from meshloom.parallel.launch import run_ranks
    from meshloom.train.loop import train_rank
    from meshloom.train.runs import is_asked_to_stop, set_state

    arguments = (job, str(folder), device, around, show)
    try:
        if alone:
            run_ranks(train_rank, *arguments, num_ranks=job.plan.world_size, log_dir=folder / "logs")
        else:
            train_rank(*arguments)
    except (MeshloomError, KeyboardInterrupt) as error:
        if is_first:
            state = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            set_state(folder, state, reason=str(error) or "interrupted")
        raise
    if is_first:
        set_state(folder, "stopped" if is_asked_to_stop(folder) else "finished")


def given_arguments(context: click.Context, *, leave_out: Sequence[str]) -> list[str]:
    """What the user gave on the command line, to give it again."""
    found: list[str] = []
    for parameter in context.command.params:
        name = str(parameter.name)
        if name in leave_out or context.get_parameter_source(name) is click.core.ParameterSource.DEFAULT:
            continue
        value, option = context.params[name], parameter.opts[0]
        if getattr(parameter, "is_flag", False) and isinstance(value, bool):
            found += [option] * value
        else:
            for item in value if isinstance(value, tuple) else (value,):
                found += [option, str(item)]
    return found


def _detach(folder: Path, arguments: Sequence[str], checkpoint: str | None) -> None:
    from meshloom.train.processes import describe_process, detach
    from meshloom.train.runs import note_process

    resume = ["--resume", checkpoint] if checkpoint else []
    command = [sys.executable, "-m", "meshloom.cli", "train", *arguments, "--out", str(folder), "--prepared", *resume]
    pid = detach(command, folder / "logs" / "console.log")
    note_process(folder, describe_process(pid))


def _check_saving(options: dict[str, Any]) -> None:
    if options.get("keep_last") and not options.get("save_steps"):
        raise UsageError(f"--keep-last {options['keep_last']}: expected --save-steps too, or nothing is saved")


def _resumed(resume: str | None, out: str | None) -> Any:
    """Where the run goes on, None if it begins; what is wrong with newer checkpoints is told."""
    if resume is None:
        return None
    from meshloom.train.runs import find_resumed

    resumed = find_resumed(resume, out)
    for trouble in resumed.troubles:
        click.echo(f"meshloom: warning: {trouble}; going on from an older one", err=True)
    return resumed


def _folder(out: str | None, model: str, plan: Plan, resumed: Any) -> Path:
    from meshloom.train.runs import new_run, reopen_run

    if resumed and resumed.folder is not None:
        return reopen_run(resumed.folder)
    return new_run(out, model=model, plan=plan)


def _announce(job: Any, model: str, num_parameters: int, folder: Path) -> None:
    world_size = job.plan.world_size
    source = job.resume or job.weights
    weights = "random weights" if source is None else f"weights of {source}"
    click.echo(
        f"{model}: {num_parameters:,} parameters, {weights}, {job.objective} language model; plan {job.plan} "
        f"on {world_size} rank{'s' * (world_size > 1)}\nrun folder: {folder}"
    )


def _first_traced(step: int | None, active: int, max_steps: int, resumed: Any) -> int:
    """The first of the steps to record, counted from 1; raises UsageError if they are not all among those to do."""
    begun = resumed.step if resumed else 0
    if begun >= max_steps:
        raise UsageError(f"--max-steps {max_steps}: expected more than the {begun} steps of {resumed.checkpoint}")
    if step is not None and step > max_steps:
        raise UsageError(f"--trace-step {step}: expected at most --max-steps, which is {max_steps}")
    if step is not None and step <= begun:
        raise UsageError(f"--trace-step {step}: expected more than the {begun} steps that were done before")
    first = step or max(begun + 1, min(begun + 3, max_steps - active + 1))
    if first + active - 1 > max_steps:
        raise UsageError(
            f"--trace-active {active}: expected at most {max_steps - first + 1} steps from step {first} to "
            f"--max-steps, which is {max_steps}"
        )
    return first


def _dummy(options: dict[str, Any]) -> dict[str, Any]:
    """A dummy set needs nothing from elsewhere: it comes with a tokenizer that every model has room for."""
    return {"data": [SAMPLE], "tokenizer": options.get("tokenizer") or "bytes", "dummy": True}


def _job(
    *,
    model: str,
    plan: Plan,
    asked: Asked,
    free: int | None,
    show: bool,
    quiet: bool,
    data: Sequence[str],
    tokenizer: str | None,
    objective: Any,
    gradient_accumulation: int,
    from_scratch: bool = False,
    dummy: bool = False,
    text_field: str = "text",
    skip_bad_lines: bool = False,
    cache_dir: str | None = None,
    schedule: Any = "1f1b",
    virtual_stages: int = 1,
    recompute: Any = "none",
    max_steps: int | None = None,
    **numbers: Any,
) -> tuple[Any, int]:
    """What is trained, and how many parameters it has; found, checked and tokenised before any process is started."""
    from meshloom.model.config import choose_attention, load_config, load_tokenizer, objective_of
    from meshloom.model.pretrained import find_weights
    from meshloom.train.data import check_tokenizer
    from meshloom.train.job import Job, check_job

    sources = find_sources(data)
    config = load_config(model)
    if asked.attention:
        choose_attention(config, asked.attention)
    weights = None if from_scratch or numbers.get("resume") else find_weights(model)
    job = Job(
        weights=None if weights is None else str(weights),
        config=config,
        objective=objective or objective_of(config),
        tokenizer=load_tokenizer(tokenizer or model),
        plan=replace(
            plan,
            num_micro_batches=gradient_accumulation,
            schedule=schedule,
            virtual_stages=virtual_stages,
            recompute=recompute,
        ),
        max_steps=max_steps or 1,
        **numbers,
    )
    check_tokenizer(job.tokenizer, config, job.objective)
    num_parameters = check_job(job, free)
    if dummy and show:
        click.echo(DUMMY, err=True)
    reading = Reading(text_field=text_field, skip_bad_lines=skip_bad_lines)
    opened = partial(open_stream, job=job, reading=reading, cache_dir=cache_dir, show=show, quiet=quiet)
    return complete(replace(job, stream=opened(sources)), asked, partial(opened, what="eval data")), num_parameters


def _recorder(folder: Path, plan: Plan, recording: dict[str, Any]) -> Any:
    """What stands around each step: the recorder of the capture room, made on each rank."""

    def make(mesh: Any, model: Any) -> Any:
        from meshloom.capture.record import Recorder
        from meshloom.parallel.mesh import axis_groups

        return Recorder(folder / "trace", model=model, axes=axis_groups(plan, mesh.rank), **recording)

    return make


def _free_memory() -> int | None:
    """Bytes that the host has free; None where the system does not tell."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def outcome(folder: Path) -> dict[str, Any]:
    """What the run in `folder` came to: its losses, speed and traces, with what is wrong in them."""
    path = folder / "metrics.jsonl"
    try:
        steps = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise FolderError(f"{path}: expected one line a step, got '{error.strerror}'") from error
    files = sorted((folder / "trace").rglob("*.et"))
    faults = [str(fault) for where in sorted({file.parent for file in files}) for fault in check(read_all(where))]
    evaluated = [step["eval_loss"] for step in steps if step.get("eval_loss") is not None]
    plain = sorted(step["tokens_per_second"] for step in steps if not step["recorded"])
    return {
        "folder": str(folder),
        "num_steps": len(steps),
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "last_eval_loss": evaluated[-1] if evaluated else None,
        "best_eval_loss": min(evaluated) if evaluated else None,
        "median_tokens_per_second": plain[len(plain) // 2] if plain else None,
        "traces": [str(file) for file in files],
        "faults": faults,
    }


def _sentence(result: dict[str, Any]) -> str:
    speed = result["median_tokens_per_second"]
    first, last = ("nan" if result[name] is None else f"{result[name]:.4f}" for name in ("first_loss", "last_loss"))
    text = f"{result['num_steps']} steps, loss {first} -> {last}"
    if result["last_eval_loss"] is not None:
        text += f", eval loss {result['last_eval_loss']:.4f} (best {result['best_eval_loss']:.4f})"
    text += f", {speed:,.0f} tokens/s (median)" if speed else ""
    traces = result["traces"]
    if not traces:
        return text
    faults = result["faults"]
    text += f"\ntraces: {traces[0]}" + (f" … {Path(traces[-1]).name}" if traces[1:] else "")
    return text + "\n".join([f", {len(faults) or 'no'} fault{'s' * (len(faults) != 1)}", *faults[:20]])
