"""`parallelize`: a single-device model, cut in place for one rank of a mesh, and the story of what was done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshloom.errors import PlanError
from meshloom.parallel.answers import Answers, CannotFollow
from meshloom.parallel.discover import Discovery, discover
from meshloom.parallel.fake import learn_answers
from meshloom.parallel.fit import fit
from meshloom.parallel.gather import gather_around
from meshloom.parallel.mesh import Mesh
from meshloom.parallel.pipeline import Pipeline, check_stages
from meshloom.parallel.shard import Shard, shard_of
from meshloom.parallel.styles import Part, cut_linear
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
        return _found(model, plan, example, None)
    except PlanError:
        raise
    except Exception as error:  # of other people's forwards: CannotFollow, or a fake tensor where it wants a number
        try:
            return _found(model, plan, example, learn_answers(model, example))
        except PlanError:
            raise
        except Exception as other:
            cause = other if isinstance(error, CannotFollow) else error
            told = f"{'' if isinstance(cause, CannotFollow) else type(cause).__name__ + ': '}{cause}".splitlines()[0]
            raise PlanError(f"plan {plan}: expected a forward that runs on tensors without data, but {told}") from error


def _found(model: nn.Module, plan: Plan, example: Mapping[str, Tensor], answers: Answers | None) -> Discovery:
    if plan.pp > 1:
        check_stages(model, plan, example, answers)
    if plan.tp == 1:
        return Discovery(pairs=(), kept={}, answers=answers)
    found = discover(model, example, answers)
    if not found.pairs:
        why = next(iter(found.kept.items()), ("the model", "it has no linear layer"))
        raise PlanError(f"plan {plan}: expected layers that can be cut, found none ({why[0]}: {why[1]}); use tp1")
    for pair in found.pairs:
        for path, units in pair.units.items():
            if units % plan.tp and (pair.num_copies(path, plan.tp) == 1 or units == max(pair.units.values())):
                what = "heads" if pair.num_units < pair.width else "features"
                raise PlanError(
                    f"plan {plan}: {path} has {units} {what}, which tp{plan.tp} does not divide; "
                    f"use a divisor of {units}"
                )
    return fit(model, found, example, plan, _cut)


def parallelize(model: nn.Module, *, plan: Plan, mesh: Mesh, example: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Cut `model` in place for this rank of `mesh` and return it; raises PlanError if the plan cannot be taken.

    `example` is a batch of one sequence that the forward accepts; by default eight token ids.
    """
    if example is None:
        example = {"input_ids": torch.zeros(1, 8, dtype=torch.long, device=next(model.parameters()).device)}
    found = check_plan(model, plan, example)
    stages = check_stages(model, plan, example, found.answers) if plan.pp > 1 else None
    if found.pairs:
        _cut(model, found, mesh)
    for name in found.partial:  # such as the norm of each head
        model.get_parameter(name).register_hook(partial(sum_over, group=mesh.groups["tp"]))
    for path, name, count in found.counts:
        setattr(model.get_submodule(path), name, count)
    if plan.pp == 1:
        model.depends_on_values = found.answers is not None  # type: ignore[assignment]
        return model
    return Pipeline(model, mesh=mesh, example=example, stages=stages, answers=found.answers)


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
    whole = [gradient(parameter) for parameter in counted if shard_of(parameter) is None]
    cut = [
        gradient(parameter) / shard.num_copies**0.5 if shard.num_copies > 1 else gradient(parameter)
        for parameter in counted
        if (shard := shard_of(parameter)) is not None
    ]
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


def _cut(model: nn.Module, found: Discovery, mesh: Mesh) -> None:
    pairs = found.pairs
    degree, index, group = mesh.degree("tp"), mesh.index("tp"), mesh.groups["tp"]
    parts: dict[nn.Module, nn.Module] = {}
    made: dict[tuple[int, str, int], nn.Parameter] = {}  # layers that were tied stay tied
    for pair in pairs:
        styles = {**dict.fromkeys(pair.columns, "column"), **dict.fromkeys(pair.rows, "row")}
        for path, style in styles.items():
            whole = model.get_submodule(path)
            num_blocks = pair.columns.get(path, 1)
            num_copies = pair.num_copies(path, degree) if style == "column" else 1
            what = Part(num_blocks=num_blocks, num_copies=num_copies, group=group, index=index, degree=degree)
            part = cut_linear(style, whole, what)
            for name, parameter in list(part.named_parameters()):
                key = id(getattr(whole, name)), style, num_blocks
                if key not in made and num_copies > 1:
                    parameter.register_hook(partial(sum_over, group=_sharers(mesh, num_copies)))
                setattr(part, name, made.setdefault(key, parameter))
            parts[whole] = part
    by_whole = {whole: parameter for (whole, _, _), parameter in made.items()}
    for module in list(model.modules()):  # a layer may stand in several places, and so may its parameter
        for name, held in module._parameters.items():
            if id(held) in by_whole and module not in parts:
                module._parameters[name] = by_whole[id(held)]
        for name, child in module._modules.items():
            if child in parts:
                module._modules[name] = parts[child]
    for candidate in found.owned:
        _cut_parameter(model, candidate.parameter, Shard(dim=candidate.dim), index, degree)
    for path, sources in found.gathered.items():
        pair = next(pair for pair in pairs if sources & pair.columns.keys())
        num_copies = pair.num_copies(next(iter(sources & pair.columns.keys())), degree)
        gather_around(model.get_submodule(path), group, index, degree, num_copies)


def _cut_parameter(model: nn.Module, name: str, shard: Shard, index: int, degree: int) -> None:
    whole = model.get_parameter(name)
    part = nn.Parameter(shard.take(whole.detach(), index, degree), requires_grad=whole.requires_grad)
    part.tensor_shard = shard  # type: ignore[attr-defined]
    for module in model.modules():
        for key, held in module._parameters.items():
            if held is whole:
                module._parameters[key] = part


def _sharers(mesh: Mesh, num_copies: int) -> dist.ProcessGroup:
    """The group of the neighbours that hold the same heads as this rank."""
    begins = range(0, mesh.degree("tp"), num_copies)
    groups = [mesh.part("tp", tuple(range(begin, begin + num_copies))) for begin in begins]
    return next(group for group in groups if group is not None)
