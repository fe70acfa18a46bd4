"""`meshloom parallelize`."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from meshloom.cli.styles import styles_option, take_styles
from meshloom.errors import FolderError, PlanError
from meshloom.plan import Plan

_SHOWN = 12  # decisions printed without --explain


@click.command()
@click.option(
    "--model",
    required=True,
    help="A preset (gpt2, bert-base-uncased, koen-sllm, llama-3-8b, …), a config.json, a folder, or a hub id.",
)
@click.option("--plan", required=True, help="How the work is cut, such as tp2.pp2.")
@click.option("--objective", type=click.Choice(["causal", "masked"]), help="  [default: what the model is for]")
@click.option("--gradient-accumulation", type=click.IntRange(1), help="Micro-batches a step.  [default: 2·pp]")
@click.option("--schedule", type=click.Choice(["gpipe", "1f1b", "interleaved", "zero-bubble"]), default="1f1b",
              show_default=True, help="With pp: the order of a rank's passes.")  # fmt: skip
@click.option("--virtual-stages", default=1, show_default=True, type=click.IntRange(1), help="With pp: stages a rank.")
@click.option("--stage-layers", help="With pp: how many layers each stage has, such as 10,14.  [default: balanced]")
@styles_option
@click.option("--explain", is_flag=True, help="Print every layer: how it is cut, and why.")
@click.option("--certify", is_flag=True, help="Run it on real ranks, and hold loss and gradients to the single model.")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True)
@click.option("--layers", type=click.IntRange(1), help="Certify a copy with so many layers.  [default: all]")
@click.option("--out", type=click.Path(dir_okay=False), help="Write the decisions, and the certificate, as JSON.")
def command(
    model: str,
    plan: str,
    objective: str | None,
    gradient_accumulation: int | None,
    schedule: Any,
    virtual_stages: int,
    stage_layers: str | None,
    styles: str | None,
    explain: bool,
    certify: bool,
    dtype: str,
    layers: int | None,
    out: str | None,
) -> int:
    """Say how a model is cut by a plan, layer by layer and why; with --certify prove that it computes the same.

    Nothing is written by hand: layers, heads, stages and what they share are found from the model's own forward.

    \b
    Examples:
      meshloom parallelize --model gpt2 --plan tp2.pp2 --explain
      meshloom parallelize --model gpt2-tiny --plan tp2.pp2 --certify --dtype float64
    """
    cut = Plan.parse(plan)
    cut = replace(
        cut,
        num_micro_batches=gradient_accumulation or max(1, 2 * cut.pp),
        schedule=schedule,
        virtual_stages=virtual_stages,
        stage_layers=Plan.parse_stage_layers(stage_layers),
    )

    from meshloom.model.config import load_config, objective_of

    config = load_config(model)
    chosen: Any = objective or objective_of(config)
    written = take_styles(styles)
    told = _decisions(config, chosen, cut, written)
    _show(model, cut, told, everything=explain)
    result: dict[str, Any] = {"model": model, "plan": str(cut), **told}
    passed = True
    if certify:
        result["certificate"] = certificate = _certificate(config, chosen, cut, written, dtype, layers)
        passed = certificate["passes"]
        click.echo(
            f"certificate ({dtype}{f', {layers} layers' if layers else ''}, dropout off): loss differs by "
            f"{certificate['loss']:.1e}, the worst gradient by {certificate['gradient']:.1e} of its scale "
            f"({certificate['parameter']}): {'passes' if passed else 'FAILS'} {certificate['tolerance']:.0e}"
        )
    if out is not None:
        try:
            Path(out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise FolderError(f"{out}: expected to write here, got '{error.strerror}'; choose another --out") from error
    return 0 if passed else 1


def _decisions(config: Any, objective: Any, plan: Plan, styles: dict[str, str]) -> dict[str, Any]:
    """What becomes of each layer, found on a model without data."""
    from meshloom.model.build import build_model, example_batch, num_parameters
    from meshloom.parallel.apply import find_cut
    from meshloom.parallel.explain import explain
    from meshloom.parallel.written import differences

    model = build_model(config, objective, seed=0, device="meta")
    example = example_batch(objective, micro_batch=1, seq_length=8, device="meta")
    found, stages = find_cut(model, plan, example, styles)
    agree, differ = differences(model, found) if plan.tp > 1 else (0, {})
    return {
        "num_parameters": num_parameters(model),
        "layers": [asdict(decision) for decision in explain(found, plan.tp)],
        "shipped_plan": {"agree": agree, "differ": differ},
        "summed_gradients": list(found.partial),
        "stages": [list(stage) for stage in stages.layers] if stages is not None else [],
    }


def _show(model: str, plan: Plan, told: dict[str, Any], *, everything: bool) -> None:
    world_size = plan.world_size
    click.echo(
        f"{model}: {told['num_parameters']:,} parameters; plan {plan} on {world_size} rank{'s' * (world_size > 1)}"
    )
    rows = told["layers"]
    counts = Counter(row["style"] for row in rows)
    if rows:
        click.echo("tensor parallel: " + ", ".join(f"{count} {style}" for style, count in counts.items()))
    for row in rows if everything else rows[:_SHOWN]:
        click.echo(f"  {row['style']:7} {row['module']}: {row['reason']}")
    if len(rows) > _SHOWN and not everything:
        click.echo(f"  … and {len(rows) - _SHOWN} more: --explain shows all")
    if told["summed_gradients"] and everything:
        click.echo("  whole, gradients summed over tp: " + ", ".join(told["summed_gradients"]))
    shipped = told["shipped_plan"]
    if shipped["agree"] or shipped["differ"]:
        entries = f"{shipped['agree']} of {shipped['agree'] + len(shipped['differ'])} entries"
        click.echo(f"the plan that transformers ships for it: {entries} do as was found")
        for pattern, difference in shipped["differ"].items():
            click.echo(f"  {pattern}: {difference}")
    for number, stage in enumerate(told["stages"]):
        click.echo(
            f"stage {number} on pipeline rank {number % plan.pp}: {stage[0]} … {stage[-1]} ({len(stage)} layers)"
        )
    if told["stages"]:
        from meshloom.parallel.schedule import SCHEDULES, bubble, draw

        schedule = SCHEDULES[plan.schedule](plan.pp, plan.num_micro_batches, plan.virtual_stages)
        click.echo(f"{plan.schedule}, {plan.num_micro_batches} micro-batches, {bubble(schedule):.1%} idle:")
        click.echo(draw(schedule))


def _certificate(
    config: Any, objective: Any, plan: Plan, styles: dict[str, str], dtype: str, layers: int | None
) -> dict[str, Any]:
    from meshloom.parallel.launch import run_ranks

    if layers is not None:
        if layers > config.num_hidden_layers:
            raise PlanError(f"--layers {layers}: expected at most {config.num_hidden_layers}, which the model has")
        config.num_hidden_layers = layers
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (config, objective, plan, styles, dtype, folder)
        run_ranks(_certify_rank, *arguments, num_ranks=plan.world_size, log_dir=Path(folder) / "logs")
        told: dict[str, Any] = json.loads((Path(folder) / "certificate.json").read_text())
    return told


def _certify_rank(config: Any, objective: Any, plan: Plan, styles: dict[str, str], dtype: str, folder: str) -> None:
    """What each rank runs: both models from one seed, some batches, and the comparison."""
    import torch

    from meshloom.model.build import build_model, example_batch
    from meshloom.parallel.apply import parallelize
    from meshloom.parallel.certify import TOLERANCE, certify
    from meshloom.parallel.launch import rank_context
    from meshloom.parallel.mesh import make_mesh

    kind = getattr(torch, dtype)
    with rank_context("cpu") as device:
        mesh = make_mesh(plan, device)
        single, model = (build_model(config, objective, seed=0).to(kind) for _ in range(2))
        example = example_batch(objective, micro_batch=1, seq_length=8)
        parallel = parallelize(model, plan=plan, mesh=mesh, example=example, styles=styles)
        random = torch.Generator().manual_seed(0)
        batches = []
        for _ in range(plan.dp * plan.num_micro_batches):
            batch = dict(example_batch(objective, micro_batch=2, seq_length=16))
            batch["input_ids"] = torch.randint(1, config.vocab_size, (2, 16), generator=random)
            batches.append({**batch, "labels": batch["input_ids"].clone()})
        told = certify(single, parallel, batches, mesh)
        if mesh.rank == 0:
            tolerance = TOLERANCE[kind]
            # transformers computes the loss in float32, whatever the model's type
            passes = told.gradient <= tolerance and told.loss <= max(tolerance, TOLERANCE[torch.float32])
            text = json.dumps({**asdict(told), "tolerance": tolerance, "passes": passes})
            Path(folder, "certificate.json").write_text(text)
