"""The half of `meshloom synth` that is about generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meshloom.cli.styles import take_styles
from meshloom.errors import UsageError
from meshloom.plan import Plan

# options that mean something for one of the two only
OF_INFERENCE = frozenset(("num_input_tokens", "num_output_tokens", "batch_size", "temperature", "top_k", "top_p"))
OF_TRAINING = frozenset(
    ("micro_batch", "gradient_accumulation", "global_batch", "schedule", "virtual_stages", "stage_layers",
     "seq_length", "recompute", "no_fused", "max_grad_norm", "zero", "objective")
)  # fmt: skip


def write_inference(
    *,
    model: str,
    plan: str,
    out: str | Path,
    num_input_tokens: int = 128,
    num_output_tokens: int = 32,
    batch_size: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    precision: Any = "fp32",
    roles: bool = False,
    capture_all: bool = False,
    styles: str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write the traces of a generation on every rank of a plan; returns what the command prints as JSON.

    How tokens are drawn is checked and told, but traced greedily. Raises UsageError, PlanError, FolderError.
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise UsageError(
            f"--temperature {temperature} --top-k {top_k} --top-p {top_p}: expected a temperature and a count of at "
            "least 0, and a share above 0 and at most 1"
        )
    from meshloom.synth.folder import check_folder

    folder = Path(out)
    check_folder(folder, force=force)

    from meshloom.model.config import load_config
    from meshloom.synth.inference import Inference, synthesise_inference

    step = Inference(
        config=load_config(model),
        plan=Plan.parse(plan),
        batch_size=batch_size,
        num_input_tokens=num_input_tokens,
        num_output_tokens=num_output_tokens,
        precision=precision,
        model_name=model,
        styles=take_styles(styles),
    )
    found = synthesise_inference(step, stamped=not capture_all)
    num_bytes = found.write(folder, roles_only=roles)
    drawn = temperature not in (0.0, 1.0) or top_k > 0 or top_p < 1
    told = told_of(folder, found, num_bytes, roles)
    told["notes"] += ["tokens are drawn from the gathered candidates; the trace is of the most likely one"] * drawn
    return told


def told_of(folder: Path, found: Any, num_bytes: int, roles: bool) -> dict[str, Any]:
    """What `synth` prints as JSON of the roles that it found and wrote."""
    return {
        "folder": str(folder),
        "num_ranks": found.plan.world_size,
        "num_roles": len(found.roles),
        "num_files": len(found.roles) if roles else found.plan.world_size,
        "num_nodes": sum(role.num_nodes * (1 if roles else len(role.ranks)) for role in found.roles),
        "num_bytes": num_bytes,
        "num_flops": sum(role.num_flops * len(role.ranks) for role in found.roles),
        "nodes_per_rank": found.roles[0].num_nodes,
        "peak_bytes": max(role.peak_bytes for role in found.roles),
        "notes": list(found.notes),
    }
