"""`meshloom synth`."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from meshloom.chakra.file import paused_collection, read
from meshloom.cli.inference import OF_INFERENCE, OF_TRAINING, told_of, write_inference
from meshloom.cli.styles import styles_option, take_styles
from meshloom.errors import PlanError, UsageError
from meshloom.hardware.device import load_device
from meshloom.plan import Plan

_CPU_MEMORY = (
    "memory is what PyTorch's CPU kernels hold: with dropout in attention they keep the scores, which flash attention "
    "on a GPU does not; `meshloom simulate --model` estimates a GPU's"
)


@click.command()
@click.option(
    "--model",
    required=True,
    help="A preset (gpt2, bert-base-uncased, koen-sllm, llama-3-8b, …), a config.json, a folder, or a hub id.",
)
@click.option("--plan", required=True, help="How the work is cut, such as tp2.dp4.")
@styles_option
@click.option("--micro-batch", default=4, show_default=True, type=click.IntRange(1), help="Sequences a micro-batch.")
@click.option("--gradient-accumulation", type=click.IntRange(1), help="Micro-batches a step.  [default: 1]")
@click.option("--global-batch", type=click.IntRange(1), help="Sequences a step of all ranks, instead of the above.")
@click.option(
    "--schedule",
    type=click.Choice(["gpipe", "1f1b", "interleaved", "zero-bubble"]),
    default="1f1b",
    show_default=True,
    help="With pp: the order of a rank's passes.",
)
@click.option("--virtual-stages", default=1, show_default=True, type=click.IntRange(1), help="With pp: stages a rank.")
@click.option("--stage-layers", help="With pp: how many layers each stage has, such as 10,14.  [default: balanced]")
@click.option("--seq-length", default=128, show_default=True, type=click.IntRange(2), help="Tokens a sequence.")
@click.option("--precision", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16", "fp16"]),
              help="What the forward computes in; weights and optimizer stay fp32.")  # fmt: skip
@click.option("--recompute", default="none", show_default=True, type=click.Choice(["none", "selective", "full"]),
              help="What backward computes again instead of keeping it.")  # fmt: skip
@click.option("--no-fused", is_flag=True, help="AdamW as several ops, not as one.")
@click.option("--zero", default="0", show_default=True, type=click.Choice(["0", "1"]), callback=lambda c, p, v: int(v),
              help="1: dp ranks share the optimizer's states, as ZeRO-1 does.")  # fmt: skip
@click.option("--max-grad-norm", default=1.0, show_default=True, type=click.FloatRange(0), help="0 switches it off.")
@click.option("--objective", type=click.Choice(["causal", "masked"]), help="  [default: what the model is for]")
@click.option("--inference", is_flag=True, help="A prefill and a step for each new token, instead of a training step.")
@click.option("--num-input-tokens", type=click.IntRange(1), help="With --inference: of each prompt.  [default: 128]")
@click.option("--num-output-tokens", type=click.IntRange(1), help="With --inference: new ones.  [default: 32]")
@click.option("--batch-size", type=click.IntRange(1), help="With --inference: prompts at once.  [default: 1]")
@click.option("--temperature", type=float, help="With --inference: taken as generate does, and told: it changes no op.")
@click.option("--top-k", type=int, help="With --inference: likewise.")
@click.option("--top-p", type=float, help="With --inference: likewise.")
@click.option("--roles", is_flag=True, help="Write one trace for all ranks that run the same, and ranks.json.")
@click.option("--capture-all", is_flag=True, help="Capture what repeats as often as it does: slow, and the same.")
@click.option("--device", help="Say whether the fullest rank fits: h100-sxm, a100-80gb-sxm, … or a device file.")
@click.option("--out", required=True, help="The folder for rank<r>.et, new or empty.")
@click.option("--visualize-trace", is_flag=True, help="Draw rank 0: tensor_trace_graph.png and .json, and two more.")
@click.option("--force", is_flag=True, help="Replace the traces that are in --out.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(as_json: bool, visualize_trace: bool, inference: bool, device: str | None, **options: Any) -> None:
    """Synthesise the traces of a step on ranks that you do not have: no processes, no memory, no GPU.

    \b
    Examples:
      meshloom synth --model gpt2 --plan tp2.dp4 --seq-length 1024 --out synth.gpt2
      meshloom synth --model gpt3.json --plan tp8.pp16.dp64 --micro-batch 1 --global-batch 1536 \\
          --seq-length 2048 --roles --out synth.gpt3
      meshloom synth --inference --model llama-3-8b --plan tp4 --num-output-tokens 20 --out synth.8b
    """
    held = None if device is None else load_device(device)
    with paused_collection():  # also of imports, which make millions of objects and leave none
        told = _write(inference, options)
    if visualize_trace:
        from meshloom.view.graph_files import visualize_trace as draw

        told["pictures"] = [str(path) for path in draw(read(Path(options["out"]) / "rank0.et"), Path(options["out"]))]
    if held is not None:
        fits = told["peak_bytes"] <= held.memory_bytes
        told |= {"device": held.name, "device_bytes": held.memory_bytes, "fits": fits}
        told["notes"] += [_CPU_MEMORY] * (not inference and not fits)
    if as_json:
        click.echo(json.dumps(told))
        return
    for note in told["notes"]:
        click.echo(f"note: {note}", err=True)
    click.echo(
        f"{told['num_files']} traces of {told['num_ranks']} ranks in {told['num_roles']} roles, "
        f"{told['nodes_per_rank']:,} nodes on rank 0, {told['num_bytes'] / 1e6:,.1f} MB: {told['folder']}"
    )
    click.echo(f"memory: {told['peak_bytes'] / 1e6:,.2f} MB at the peak of the fullest rank" + _fits(told))
    for path in told.get("pictures", ()):
        click.echo(path)


def _fits(told: dict[str, Any]) -> str:
    if "device" not in told:
        return ""
    fits = "fits into" if told["fits"] else "DOES NOT FIT into"
    return f", which {fits} the {told['device_bytes'] / 1e6:,.0f} MB of {told['device']}"


def _write(inference: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Write the traces of a training step or of a generation; what was given for the other is a mistake."""
    source = click.get_current_context().get_parameter_source
    given = {name for name in options if source(name) is ParameterSource.COMMANDLINE}
    for name in sorted(given & (OF_TRAINING if inference else OF_INFERENCE)):
        told = "a training step; leave out --inference" if inference else "inference; add --inference"
        raise UsageError(f"--{name.replace('_', '-')}: expected with {told}")
    if not inference:
        return write_traces(forks=True, **{name: options[name] for name in options if name not in OF_INFERENCE})
    wanted = {name: value for name, value in options.items() if name not in OF_TRAINING and value is not None}
    return write_inference(**wanted)


def synth(*, out: str | Path, **options: Any) -> tuple[list[Path], int]:
    """Write the traces as the command does; returns the files and the number of nodes of the first rank."""
    told = write_traces(out=out, **options)
    return sorted(Path(out).glob("rank*.et"), key=lambda path: int(path.stem[4:])), told["nodes_per_rank"]


def write_traces(
    *,
    model: str,
    plan: str,
    seq_length: int,
    out: str | Path,
    micro_batch: int = 4,
    gradient_accumulation: int | None = None,
    global_batch: int | None = None,
    objective: Any = None,
    schedule: Any = "1f1b",
    virtual_stages: int = 1,
    stage_layers: str | None = None,
    precision: Any = "fp32",
    recompute: Any = "none",
    no_fused: bool = False,
    max_grad_norm: float = 1.0,
    zero: int = 0,
    roles: bool = False,
    capture_all: bool = False,
    styles: str | None = None,
    force: bool = False,
    forks: bool = False,
) -> dict[str, Any]:
    """Write the traces as the command does; returns what it prints as JSON. `forks`: the process does nothing else."""
    cut = Plan.parse(plan)
    cut = replace(
        cut,
        num_micro_batches=micro_batches(cut, micro_batch, gradient_accumulation, global_batch),
        schedule=schedule,
        virtual_stages=virtual_stages,
        stage_layers=Plan.parse_stage_layers(stage_layers),
        recompute=recompute,
    )
    folder = Path(out)

    from meshloom.synth.folder import check_folder

    check_folder(folder, force=force)

    from meshloom.model.config import load_config, objective_of
    from meshloom.synth.roles import Step, find_roles

    config = load_config(model)
    _check_positions(config, seq_length)
    step = Step(
        config=config, objective=objective or objective_of(config), plan=cut, micro_batch=micro_batch,
        seq_length=seq_length, max_grad_norm=max_grad_norm, precision=precision, fused=not no_fused, zero=zero,
        model_name=model, styles=take_styles(styles),
    )  # fmt: skip
    cores = os.cpu_count() or 1
    # a pass more than there are cores: three on two so end together
    found = find_roles(step, stamped=not capture_all, num_processes=1 + cores if forks else 1)
    num_bytes = found.write(folder, roles_only=roles, num_processes=cores if forks else 1)
    return told_of(folder, found, num_bytes, roles)


def _check_positions(config: Any, seq_length: int) -> None:
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and seq_length > limit:
        raise UsageError(f"--seq-length {seq_length}: expected at most {limit}, the positions that the model has")


def micro_batches(plan: Plan, micro_batch: int, accumulation: int | None, global_batch: int | None) -> int:
    """How many micro-batches a step has on a rank; raises UsageError, PlanError."""
    if global_batch is None:
        return accumulation or 1
    if accumulation is not None:
        raise UsageError("--global-batch: expected without --gradient-accumulation, which it decides; leave one out")
    count, rest = divmod(global_batch, micro_batch * plan.dp)
    if rest or not count:
        raise PlanError(
            f"--global-batch {global_batch}: expected a multiple of {micro_batch * plan.dp}, the sequences of one "
            f"micro-batch of {micro_batch} on dp{plan.dp}"
        )
    return count
