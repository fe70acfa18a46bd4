"""`parallelize`: a single-device model, cut in place for one rank of a mesh, and the story of what was done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from meshloom.errors import PlanError
from meshloom.parallel.discover import Discovery, Pair, discover, trouble_of_part
from meshloom.parallel.linear import shard_of
from meshloom.parallel.mesh import Mesh
from meshloom.parallel.styles import cut_linear
from meshloom.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What becomes of one linear layer, and why: style is column, row or whole."""

    module: str
    style: str
    reason: str


def check_plan(model: nn.Module, plan: Plan, example: Mapping[str, Tensor]) -> Discovery:
    """How the model is cut by `plan`; raises PlanError naming the module and number that the plan cannot take."""
    for axis, issue in (("pp", "pipeline"), ("cp", "context")):
        if plan.degrees[axis] > 1:  # type: ignore[index]
            raise PlanError(f"plan {plan}: {issue} parallel is not built yet; use {axis}1 and more dp or tp")
    if plan.sequence_parallel:
        raise PlanError(f"plan {plan}: sequence parallel is not built yet; leave out sp")
    if plan.tp == 1:
        return Discovery(pairs=(), kept={})
    found = discover(model, example)
    if not found.pairs:
        why = next(iter(found.kept.items()), ("the model", "it has no linear layer"))
        raise PlanError(f"plan {plan}: expected layers that can be cut, found none ({why[0]}: {why[1]}); use tp1")
    for pair in found.pairs:
        if pair.num_units % plan.tp:
            what = "heads" if pair.num_units < pair.width else "features"
            raise PlanError(
                f"plan {plan}: {next(iter(pair.columns))} has {pair.num_units} {what}, which tp{plan.tp} "
                f"does not divide; use a divisor of {pair.num_units}"
            )
    return found


def parallelize(model: nn.Module, *, plan: Plan, mesh: Mesh, example: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Cut `model` in place for this rank of `mesh` and return it; raises PlanError if the plan cannot be taken.

    `example` is a batch of one sequence that the forward accepts; by default eight token ids.
    """
    if example is None:
        example = {"input_ids": torch.zeros(1, 8, dtype=torch.long, device=next(model.parameters()).device)}
    found = check_plan(model, plan, example)
    for pair in found.pairs:
        _cut(model, pair, mesh)
    if found.pairs and trouble_of_part(model, example, found.shapes(plan.tp)):
        # The forward reshapes or splits by numbers of its own, which must now count this rank's part.
        for pair in found.pairs:
            _divide_counts(model, pair, plan.tp)
        if trouble := trouble_of_part(model, example, found.shapes(plan.tp)):
            raise PlanError(f"plan {plan}: the model's forward does not run on a rank's part: {trouble}; use tp1")
    return model


def explain(found: Discovery) -> list[Decision]:
    """One decision a linear layer."""
    decisions = []
    for pair in found.pairs:
        decisions += [Decision(module=path, style="column", reason=pair.reason) for path in pair.columns]
        decisions += [Decision(module=path, style="row", reason=pair.reason) for path in pair.rows]
    return decisions + [Decision(module=path, style="whole", reason=why) for path, why in found.kept.items()]


def clip_gradients(model: nn.Module, max_norm: float, mesh: Mesh) -> Tensor:
    """Scale all gradients so that their norm over the whole model is at most `max_norm`; return the norm before.

    Cut parameters are summed over the tensor-parallel group, whole ones counted once.
    """
    gradients = [(parameter.grad, shard_of(parameter)) for parameter in model.parameters()]
    cut = [grad for grad, shard in gradients if grad is not None and shard is not None]
    whole = [grad for grad, shard in gradients if grad is not None and shard is None]
    # torch.nn.utils.get_total_norm takes another road for fake tensors than for real ones; these ops do not.
    squares = [torch.stack(torch._foreach_norm(grads)).square().sum() for grads in (whole, cut) if grads]
    if cut:
        functional = torch.ops._c10d_functional
        squares[-1] = functional.wait_tensor(functional.all_reduce(squares[-1], "sum", mesh.groups["tp"].group_name))
    norm = sum(squares[1:], squares[0]).sqrt()
    torch._foreach_mul_([*whole, *cut], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _cut(model: nn.Module, pair: Pair, mesh: Mesh) -> None:
    degree, index, group = mesh.degree("tp"), mesh.index("tp"), mesh.groups["tp"]
    styles = {**dict.fromkeys(pair.columns, "column"), **dict.fromkeys(pair.rows, "row")}
    for path, style in styles.items():
        part = cut_linear(
            style,
            model.get_submodule(path),
            num_blocks=pair.columns.get(path, 1),
            group=group,
            index=index,
            degree=degree,
        )
        model.set_submodule(path, part)


def _divide_counts(model: nn.Module, pair: Pair, degree: int) -> None:
    for owner in _owners(model, [*pair.columns, *pair.rows]):
        for name, value in _counts(owner, pair).items():
            setattr(owner, name, value // degree)


def _owners(model: nn.Module, paths: list[str]) -> list[nn.Module]:
    """The innermost module that holds all the layers of a pair, and those between it and the layers."""
    parents = [path.split(".")[:-1] for path in paths]
    depth = len(list(takewhile(lambda names: len(set(names)) == 1, zip(*parents))))
    between = {".".join(parent[:end]) for parent in parents for end in range(depth, len(parent) + 1)}
    return [model.get_submodule(path) for path in sorted(between)]


def _counts(owner: nn.Module, pair: Pair) -> dict[str, Any]:
    """The owner's own numbers that count cut heads or features: its forward reshapes and splits by them.

    The size of a single head is never cut, whatever number it happens to equal.
    """
    sizes = {pair.num_units, pair.width} if pair.num_units < pair.width else {pair.width}
    return {
        name: value
        for name, value in vars(owner).items()
        if type(value) is int and value in sizes and not name.endswith(("head_dim", "head_size"))
    }
