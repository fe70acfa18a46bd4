"""`parallelize`: a single-device model, cut in place for one rank of a mesh, and the story of what was done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshloom.errors import PlanError
from meshloom.parallel.discover import Discovery, Pair, discover
from meshloom.parallel.fake import trouble_of_part
from meshloom.parallel.linear import shard_of
from meshloom.parallel.mesh import Mesh
from meshloom.parallel.pipeline import Pipeline, check_stages
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
    if plan.cp > 1:
        raise PlanError(f"plan {plan}: context parallel is not built yet; use cp1 and more dp or tp")
    if plan.sequence_parallel:
        raise PlanError(f"plan {plan}: sequence parallel is not built yet; leave out sp")
    if plan.tp == plan.pp == 1:
        return Discovery(pairs=(), kept={})
    try:
        if plan.pp > 1:
            check_stages(model, plan, example)
        if plan.tp == 1:
            return Discovery(pairs=(), kept={})
        found = discover(model, example)
    except RuntimeError as error:  # of CannotFollow, or of a forward that fails on fake tensors
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PlanError(f"plan {plan}: expected a forward that runs on tensors without data, but {why}") from error
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
    for name in found.partial:  # such as the norm of each head
        model.get_parameter(name).register_hook(partial(sum_over, group=mesh.groups["tp"]))
    if found.pairs and trouble_of_part(model, example, found.shapes(plan.tp)):
        # The forward reshapes or splits by numbers of its own, which must now count this rank's part.
        for pair in found.pairs:
            _divide_counts(model, pair, plan.tp)
        if trouble := trouble_of_part(model, example, found.shapes(plan.tp)):
            raise PlanError(f"plan {plan}: the model's forward does not run on a rank's part: {trouble}; use tp1")
    return Pipeline(model, mesh=mesh, example=example) if plan.pp > 1 else model


def explain(found: Discovery) -> list[Decision]:
    """One decision a linear layer."""
    decisions = []
    for pair in found.pairs:
        decisions += [Decision(module=path, style="column", reason=pair.reason) for path in pair.columns]
        decisions += [Decision(module=path, style="row", reason=pair.reason) for path in pair.rows]
    return decisions + [Decision(module=path, style="whole", reason=why) for path, why in found.kept.items()]


def clip_gradients(model: nn.Module, max_norm: float, mesh: Mesh) -> Tensor:
    """Scale all gradients so that their norm over the whole model is at most `max_norm`; return the norm before.

    Cut parameters are summed over the tensor-parallel group, whole ones counted once; then all over the pipeline, where
    a parameter that several stages hold counts on the first.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    counted = [parameter for parameter in parameters if not getattr(parameter, "counted_elsewhere", False)]
    cut = [gradient(parameter) for parameter in counted if shard_of(parameter) is not None]
    whole = [gradient(parameter) for parameter in counted if shard_of(parameter) is None]
    # torch.nn.utils.get_total_norm takes another road for fake tensors than for real ones; these ops do not.
    squares = [torch.stack(torch._foreach_norm(grads)).square().sum() for grads in (whole, cut) if grads]
    if cut:
        squares[-1] = sum_over(squares[-1], mesh.groups["tp"])
    total = sum(squares[1:], squares[0]) if squares else torch.zeros((), device=mesh.device)
    if "pp" in mesh.groups:
        total = sum_over(total, mesh.groups["pp"])
    norm = total.sqrt()
    torch._foreach_mul_([gradient(parameter) for parameter in parameters], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def gradient(parameter: nn.Parameter) -> Tensor:
    """The parameter's gradient, which is there."""
    assert parameter.grad is not None
    return parameter.grad


def sum_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of x over the group."""
    functional = torch.ops._c10d_functional
    result: Tensor = functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group.group_name))
    return result


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
