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
from meshloom.cli.dry_run import commands, describe, in_words
from meshloom.cli.hosts import NAMES, Start, host_options, sbatch, take_hosts
from meshloom.cli.styles import styles_option, take_styles
from meshloom.cli.tracing import take_tracing, trace_options
from meshloom.cli.training import Asked, complete, length, take, training_options
from meshloom.errors import FolderError, MeshloomError, UsageError
from meshloom.plan import Plan
from meshloom.train.sources import SAMPLE, Reading, find_sources


@click.command()
@click.option(
    "--model",
    required=True,
    help="A preset (gpt2, bert-base-uncased, koen-sllm, llama-3-8b, …) or a config.json, which start with random "
    "weights; a folder or a hub id, which start with the weights that are there.",
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
@styles_option
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
@click.option("--stage-layers", help="With pp: how many layers each stage has, such as 10,14.  [default: balanced]")
@trace_options
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
@click.option(
    "--collective-timeout",
    "timeout_s",
    default=1800.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Seconds that a rank waits for others before the run ends.",
)
@host_options
@click.option("--dry-run", is_flag=True, help="Print the command, sizes, memory and time; start and write nothing.")
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
    if options["launcher"] == "slurm":
        given = given_arguments(context, leave_out=("out", "background", "prepared", *NAMES))
        told = {name: options[name] for name in ("out", "device", "nnodes")}
        click.echo(sbatch(given, plan=Plan.parse(options["plan"]), restarts=options["max_restarts"], **told))
        return
    left_out = ("out", "background", "prepared", "dry_run") + (NAMES if options["dry_run"] else ("resume",))
    folder = train(arguments=given_arguments(context, leave_out=left_out), **options)
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
    resume: str | None = None,
    no_save_initial: bool = False,
    as_json: bool = False,
    background: bool = False,
    prepared: bool = False,
    dry_run: bool = False,
    arguments: Sequence[str] = (),
    **options: Any,
) -> Path | None:
    """Train as the command does and return the run folder; None on ranks of a torchrun other than 0, or if dry."""
    cut = Plan.parse(plan)
    _check_saving(options)
    start = take_hosts(options, cut, out=out, background=background)
    asked, tracing = take(options), take_tracing(options)

    from meshloom.parallel.launch import world_from_environment

    world = world_from_environment()
    if world is not None:
        cut.with_world_size(world[1])
        start.check_alone(out)
    resumed = _resumed(resume, out)
    if options["max_steps"] is not None:  # as early as can be
        tracing.first(options["max_steps"], resumed)
    checkpoint = str(resumed.checkpoint) if resumed and resumed.checkpoint else None
    is_first = start.host_rank == 0 if world is None else world[0] == 0
    options |= {} if options.get("data") else _dummy(options)
    free = start.num_hosts * _free_memory() if world is None and device != "cuda" and not dry_run else None
    save: dict[str, Any] = {"save_initial": not no_save_initial, "resume": checkpoint}
    show: dict[str, Any] = {"show": is_first, "quiet": as_json, "dry": dry_run}
    job, num_parameters = _job(model=model, plan=cut, asked=asked, free=free, **show, **save, **options)
    if dry_run:
        told = describe(job, model, num_parameters, options["data"], device, start, asked)
        told["commands"] = commands(arguments, start, out)
        click.echo(json.dumps(told) if as_json else in_words(told))
        return None
    first_traced = tracing.first(job.max_steps, resumed)
    makes = is_first and not prepared
    folder = _folder(out, model, cut, resumed) if makes else Path(str(out))
    around = tracing.recorder(folder, cut, model=model, first=first_traced, num_tokens=job.tokens_per_step)
    if is_first:
        told = {"model": model, "plan": plan, "trace": tracing.trace, "resume": checkpoint, **options}
        _note(folder, job, {**told, "max_steps": job.max_steps}, arguments, "starting" if background else "running")
        if background:
            _detach(folder, arguments, checkpoint)
            return folder
        if not as_json:
            _announce(job, model, num_parameters, folder, length(job, asked))
    _run(job, folder, device, around, start if world is None else None, show=not as_json, is_first=is_first)
    return folder if is_first else None


def _note(folder: Path, job: Any, command: dict[str, Any], arguments: Sequence[str], state: str) -> None:
    from meshloom.train.runs import write_facts

    write_facts(folder, config=job.config, plan=job.plan, command=command, arguments=arguments, state=state)


def _run(job: Any, folder: Path, device: str, around: Any, start: Start | None, *, show: bool, is_first: bool) -> None:
    """Train on all ranks, which are started here unless this process is one of them, and note how it ended."""
    from meshloom.parallel.launch import run_ranks
    from meshloom.train.again import saved_before, train_again
    from meshloom.train.loop import train_rank
    from meshloom.train.runs import is_asked_to_stop, set_state

    arguments = (job, str(folder), device, around, show)
    try:
        if start is not None:
            run_ranks(
                train_again, saved_before(folder), *arguments, num_ranks=start.num_ranks, log_dir=folder / "logs",
                hosts=start.hosts, max_restarts=start.max_restarts,
            )  # fmt: skip
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


def _announce(job: Any, model: str, num_parameters: int, folder: Path, more: Sequence[str]) -> None:
    world_size = job.plan.world_size
    source = job.resume or job.weights
    weights = "random weights" if source is None else f"weights of {source}"
    click.echo(
        f"{model}: {num_parameters:,} parameters, {weights}, {job.objective} language model; plan {job.plan} "
        f"on {world_size} rank{'s' * (world_size > 1)}\nrun folder: {folder}"
    )
    for line in more:
        click.echo(line)


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
    dry: bool,
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
    stage_layers: str | None = None,
    recompute: Any = "none",
    max_steps: int | None = None,
    styles: str | None = None,
    **numbers: Any,
) -> tuple[Any, int]:
    """What is trained, and how many parameters it has; found, checked and tokenised before any process is started."""
    from meshloom.model.config import choose_attention, load_config, objective_of
    from meshloom.model.pretrained import find_weights
    from meshloom.train.data import check_tokenizer
    from meshloom.train.job import Job, check_job

    sources = find_sources(data)
    config = load_config(model)
    if asked.attention:
        choose_attention(config, asked.attention)
    local = not dry or Path(model).is_dir()  # a dry run downloads nothing
    weights = None if from_scratch or numbers.get("resume") or not local else find_weights(model)
    job = Job(
        weights=None if weights is None else str(weights),
        config=config,
        objective=objective or objective_of(config),
        tokenizer=_tokenizer(tokenizer or model, dry),
        plan=replace(
            plan, num_micro_batches=gradient_accumulation, schedule=schedule, virtual_stages=virtual_stages,
            stage_layers=Plan.parse_stage_layers(stage_layers), recompute=recompute,
        ),
        max_steps=max_steps or 1,
        styles=take_styles(styles),
        **numbers,
    )  # fmt: skip
    if job.tokenizer is not None:
        check_tokenizer(job.tokenizer, config, job.objective)
    num_parameters = check_job(job, free)
    if dry:
        return job, num_parameters
    if dummy and show:
        click.echo(DUMMY, err=True)
    reading = Reading(text_field=text_field, skip_bad_lines=skip_bad_lines)
    opened = partial(open_stream, job=job, reading=reading, cache_dir=cache_dir, show=show, quiet=quiet)
    return complete(replace(job, stream=opened(sources)), asked, partial(opened, what="eval data")), num_parameters


def _tokenizer(name: str, dry: bool) -> Any:
    """The tokenizer; a dry run downloads none, and does without: None."""
    from meshloom.model.config import load_tokenizer

    try:
        return load_tokenizer(name, download=not dry)
    except MeshloomError:
        if not dry:
            raise
        return None


def _free_memory() -> int:
    """Bytes that the host has free; more than there can be where the system does not tell."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 1 << 62


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
