"""`meshloom train`."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from meshloom.chakra.check import check
from meshloom.chakra.file import read_all
from meshloom.errors import FolderError, MeshloomError, UsageError
from meshloom.plan import Plan


@click.command()
@click.option(
    "--model",
    required=True,
    help="A preset (gpt2, gpt2-tiny, bert-base-uncased), a config.json, a folder, or a hub id. Weights start random.",
)
@click.option("--data", required=True, help="A SQuAD file (.json, .json.gz), 'squad' for the hub's, 'sample' for ours.")
@click.option("--tokenizer", help="A tokenizer folder, a hub id, or 'bytes'.  [default: that of --model]")
@click.option("--plan", default="dp1", show_default=True, help="How the work is cut, such as dp2 or tp2.dp2.")
@click.option("--max-steps", default=10, show_default=True, type=click.IntRange(1), help="Optimizer steps.")
@click.option("--batch-size", default=4, show_default=True, type=click.IntRange(1), help="Sequences a micro-batch.")
@click.option(
    "--gradient-accumulation", default=1, show_default=True, type=click.IntRange(1), help="Micro-batches a step."
)
@click.option("--seq-length", default=128, show_default=True, type=click.IntRange(2), help="Tokens a sequence.")
@click.option("--learning-rate", default=5e-4, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--weight-decay", default=0.1, show_default=True, type=click.FloatRange(0))
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
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(**options: Any) -> None:
    """Train a model on a plan of ranks, and record a step if asked.

    On one host the ranks are started here. Under torchrun each process is one rank; then give --out.

    \b
    Examples:
      meshloom train --model gpt2-tiny --tokenizer bytes --data sample --plan dp2 --max-steps 20 --trace
      torchrun --nproc-per-node 2 --no-python meshloom train --model gpt2-tiny --tokenizer bytes \\
          --data sample --plan dp2 --out runs/by-torchrun
    """
    folder = train(**options)
    if folder is not None:
        result = outcome(folder)
        click.echo(json.dumps(result) if options["as_json"] else _sentence(result))


def train(
    *,
    model: str,
    data: str,
    plan: str,
    out: str | None,
    device: str = "auto",
    trace: bool = False,
    trace_step: int | None = None,
    trace_active: int = 1,
    trace_separate: bool = False,
    trace_stacks: bool = False,
    as_json: bool = False,
    **options: Any,
) -> Path | None:
    """Train as the command does and return the run folder; None on ranks of a torchrun other than 0."""
    cut = Plan.parse(plan)
    max_steps = options["max_steps"]
    first_traced = _first_traced(trace_step, trace_active, max_steps)

    from meshloom.parallel.launch import run_ranks, world_from_environment
    from meshloom.train.loop import check_job, train_rank
    from meshloom.train.runs import new_run, set_state, write_facts

    world = world_from_environment()
    if world is not None:
        cut.with_world_size(world[1])
        if out is None:
            raise UsageError("expected --out where each rank is started by itself, so that all write to one folder")
    job = _job(model=model, data=data, plan=cut, **options)
    num_parameters = check_job(job, _free_memory() if world is None and device != "cuda" else None)
    is_first = world is None or world[0] == 0
    folder = new_run(out, model=model, plan=cut) if is_first else Path(str(out))
    recording = {
        "step": first_traced - 1,
        "active": trace_active,
        "separate": trace_separate,
        "stacks": trace_stacks,
        "facts": {"plan": str(cut), "model": model},
    }
    around = _recorder(folder, cut, recording) if trace else None
    if is_first:
        command = {"model": model, "data": data, "plan": plan, "trace": trace, **options}
        write_facts(folder, config=job.config, plan=job.plan, command=command)
        if not as_json:
            _announce(job, model, data, num_parameters, folder)
    arguments = (job, str(folder), device, around, not as_json)
    try:
        if world is None:
            run_ranks(train_rank, *arguments, num_ranks=cut.world_size, log_dir=folder / "logs")
        else:
            train_rank(*arguments)
    except (MeshloomError, KeyboardInterrupt) as error:
        if is_first:
            state = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            set_state(folder, state, reason=str(error) or "interrupted")
        raise
    if not is_first:
        return None
    set_state(folder, "finished")
    return folder


def _announce(job: Any, model: str, data: str, num_parameters: int, folder: Path) -> None:
    world_size = job.plan.world_size
    click.echo(
        f"{model}: {num_parameters:,} parameters, random weights, {job.objective} language model; plan {job.plan} "
        f"on {world_size} rank{'s' * (world_size > 1)}; {data}: {len(job.documents):,} documents\nrun folder: {folder}"
    )


def _first_traced(step: int | None, active: int, max_steps: int) -> int:
    """The first of the steps to record, counted from 1; raises UsageError if they go beyond the last step."""
    if step is not None and step > max_steps:
        raise UsageError(f"--trace-step {step}: expected at most --max-steps, which is {max_steps}")
    first = step or max(1, min(3, max_steps - active + 1))
    if first + active - 1 > max_steps:
        raise UsageError(
            f"--trace-active {active}: expected at most {max_steps - first + 1} steps from step {first} to "
            f"--max-steps, which is {max_steps}"
        )
    return first


def _job(
    *,
    model: str,
    data: str,
    plan: Plan,
    tokenizer: str | None,
    objective: Any,
    gradient_accumulation: int,
    schedule: Any = "1f1b",
    virtual_stages: int = 1,
    **numbers: Any,
) -> Any:
    """What is trained, found and checked before any process is started."""
    from meshloom.model.config import load_config, load_tokenizer, objective_of
    from meshloom.train.data import check_tokenizer, load_squad
    from meshloom.train.loop import Job

    config = load_config(model)
    job = Job(
        config=config,
        objective=objective or objective_of(config),
        tokenizer=load_tokenizer(tokenizer or model),
        documents=load_squad(data),
        plan=replace(plan, num_micro_batches=gradient_accumulation, schedule=schedule, virtual_stages=virtual_stages),
        **numbers,
    )
    check_tokenizer(job.tokenizer, config, job.objective)
    return job


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
    plain = sorted(step["tokens_per_second"] for step in steps if not step["recorded"])
    return {
        "folder": str(folder),
        "num_steps": len(steps),
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "median_tokens_per_second": plain[len(plain) // 2] if plain else None,
        "traces": [str(file) for file in files],
        "faults": faults,
    }


def _sentence(result: dict[str, Any]) -> str:
    speed = result["median_tokens_per_second"]
    text = f"{result['num_steps']} steps, loss {result['first_loss']:.4f} -> {result['last_loss']:.4f}"
    text += f", {speed:,.0f} tokens/s (median)" if speed else ""
    traces = result["traces"]
    if not traces:
        return text
    faults = result["faults"]
    text += f"\ntraces: {traces[0]}" + (f" … {Path(traces[-1]).name}" if traces[1:] else "")
    return text + "\n".join([f", {len(faults) or 'no'} fault{'s' * (len(faults) != 1)}", *faults[:20]])
