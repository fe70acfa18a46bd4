"""`parallelize`: a single-device model, cut in place for one rank of a mesh, and the story of what was done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from meshloom.errors import PlanError
from meshloom.parallel.answers import Answers, CannotFollow
from meshloom.parallel.borders import border_modules
from meshloom.parallel.borders import install as install_sequence
from meshloom.parallel.compiled import compile_layers
from meshloom.parallel.data import data_parallel
from meshloom.parallel.discover import discover
from meshloom.parallel.dropout import OwnRandom, has_dropout
from meshloom.parallel.embeddings import Vocabulary, find_vocabulary
from meshloom.parallel.fake import fake_copy, learn_answers, trouble_of_part
from meshloom.parallel.fit import fit
from meshloom.parallel.flow import find_layers
from meshloom.parallel.gather import Features, gather_around
from meshloom.parallel.mesh import Mesh, make_mesh
from meshloom.parallel.pairs import Discovery, NoShare
from meshloom.parallel.pipeline import Pipeline
from meshloom.parallel.recompute import recompute
from meshloom.parallel.sequence import cut_sequence, sequence_example
from meshloom.parallel.shard import Shard, mark, shard_of
from meshloom.parallel.stages import Stages, find_stages
from meshloom.parallel.styles import Part, cut_linear
from meshloom.parallel.unused import find_unused
from meshloom.parallel.vocab import CutVocabulary
from meshloom.parallel.vocab import Part as VocabularyPart
from meshloom.parallel.written import apply_styles, check_names
from meshloom.plan import Plan


def check_plan(
    model: nn.Module, plan: Plan, example: Mapping[str, Tensor], styles: Mapping[str, str] | None = None
) -> Discovery:
    """How the model is cut by `plan`; raises PlanError naming the module and number that the plan cannot take."""
    return find_cut(model, plan, example, styles)[0]


def find_cut(
    model: nn.Module, plan: Plan, example: Mapping[str, Tensor], styles: Mapping[str, str] | None = None
) -> tuple[Discovery, Stages | None]:
    """How the layers are cut by `plan`, and its pipeline's stages if it has one.

    `styles` is a plan written by hand (`written.py`). Raises PlanError as `check_plan`, or naming an entry of `styles`.
    """
    check_names(styles or {})
    if plan.cp > 1:
        raise PlanError(f"plan {plan}: context parallel is not built yet; use cp1 and more dp or tp")
    if plan.sequence_parallel and plan.tp == 1:
        raise PlanError(f"plan {plan}: sequence parallel needs tensor parallel; write tp2.sp, or leave out sp")
    if styles and plan.tp == 1:
        raise PlanError(f"plan {plan}: styles say how tensor parallel cuts; write tp2 or more, or leave them out")
    if plan.tp == plan.pp == 1:
        return Discovery(pairs=(), kept={}), None
    if all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        with suppress(Exception):  # whatever a forward does on meta that it does not on fake tensors
            return _found(model, plan, example, None, styles)
        model = fake_copy(model)
    try:
        return _found(model, plan, example, None, styles)
    except PlanError:
        raise
    except Exception as error:  # of other people's forwards: CannotFollow, or a fake tensor where it wants a number
        try:
            return _found(model, plan, example, learn_answers(model, example), styles)
        except PlanError:
            raise
        except Exception as other:
            cause = other if isinstance(error, CannotFollow) else error
            told = f"{'' if isinstance(cause, CannotFollow) else type(cause).__name__ + ': '}{cause}".splitlines()[0]
            raise PlanError(f"plan {plan}: expected a forward that runs on tensors without data, but {told}") from error


def _found(
    model: nn.Module,
    plan: Plan,
    example: Mapping[str, Tensor],
    answers: Answers | None,
    styles: Mapping[str, str] | None,
) -> tuple[Discovery, Stages | None]:
    stages = find_stages(model, plan, example, answers) if plan.pp > 1 else None
    if plan.tp == 1:
        return Discovery(pairs=(), kept={}, answers=answers), stages
    found = discover(model, example, answers)
    taken = {path for pair in found.pairs for path in (*pair.columns, *pair.rows)}
    found = replace(found, vocabulary=find_vocabulary(model, example, taken, answers))
    if styles:
        found = apply_styles(model, found, styles, plan)
    if not found.pairs and not found.cuts_vocabulary:
        why = next(iter(found.kept.items()), ("the model", "it has no linear layer"))
        raise PlanError(f"plan {plan}: expected layers that can be cut, found none ({why[0]}: {why[1]}); use tp1")
    for pair in found.pairs:
        try:
            pair.share(plan.tp)
        except NoShare as error:
            raise PlanError(f"plan {plan}: {error}") from error
    if found.pairs:
        found = fit(model, found, example, plan, _cut)
    if plan.sequence_parallel:
        found = replace(found, sequence=_sequence(model, found, example, plan))
    return found, stages


def _sequence(model: nn.Module, found: Discovery, example: Mapping[str, Tensor], plan: Plan) -> Any:
    if not found.pairs:
        raise PlanError(f"plan {plan}: sequence parallel needs layers that tensor parallel cuts; leave out sp")
    if found.gathered or found.owned or found.answers is not None:
        why = next(iter(found.gathered), "") or next(
            (c.parameter for c in found.owned), "its forward decides by values"
        )
        raise PlanError(f"plan {plan}: sequence parallel does not know what to make of {why}; leave out sp")
    return cut_sequence(model, sequence_example(example, plan.tp), found.pairs)


def parallelize(
    model: nn.Module,
    *,
    plan: Plan | str,
    mesh: Mesh | DeviceMesh | None = None,
    example: Mapping[str, Tensor] | None = None,
    styles: Mapping[str, str] | None = None,
) -> nn.Module:
    """Cut `model` in place for this rank and return it, with its gradients averaged over data parallel ranks.

    `plan` may be text, such as tp2.pp2.dp2. `mesh` is `make_mesh`'s, or torch's with axes named as in the plan; by
    default it is made of the default process group. `example` is a batch of one sequence that the forward accepts; by
    default eight token ids. `styles` overrules what is found: a pattern of module paths -> column, row, vocabulary or
    whole. With a pipeline, `train_step` or `.run(micro_batches)` runs it. Every rank must call this at the same point.
    Raises PlanError if the plan cannot be taken.
    """
    plan = Plan.parse(plan) if isinstance(plan, str) else plan
    if not isinstance(mesh, Mesh):
        device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
        mesh = make_mesh(plan, None if device.type == "meta" else device, like=mesh)
    elif replace(plan, num_micro_batches=1) != replace(mesh.plan, num_micro_batches=1):
        raise PlanError(f"plan {plan}: expected a mesh made for it, got one of plan {mesh.plan}")
    return data_parallel(cut_model(model, plan=plan, mesh=mesh, example=example, styles=styles), mesh)


def cut_model(
    model: nn.Module,
    *,
    plan: Plan,
    mesh: Mesh,
    example: Mapping[str, Tensor] | None = None,
    styles: Mapping[str, str] | None = None,
    cut: tuple[Discovery, Stages | None] | None = None,
    compiled: bool = False,
) -> nn.Module:
    """`parallelize` but for the averaging over data parallel ranks, which generation has no use for.

    `cut` is what `find_cut` found on the same model, where that is known already. `compiled` layers go through
    torch.compile, each by itself. Raises PlanError.
    """
    if example is None:
        example = {"input_ids": torch.zeros(1, 8, dtype=torch.long, device=next(model.parameters()).device)}
    found, stages = cut or find_cut(model, plan, example, styles)
    # the same in the cut model, whose forward needs a group
    unused = find_unused(model, example) if stages is None and "dp" in mesh.groups else frozenset()
    if found.pairs:
        _cut(model, found, mesh)
    for name in found.partial:  # such as the norm of each head
        model.get_parameter(name).register_hook(partial(sum_gradient, group=mesh.groups["tp"]))
    for path, name, count in found.counts[mesh.index("tp")] if found.counts else ():
        setattr(model.get_submodule(path), name, count)
    if found.sequence is not None:
        _install_sequence(model, found, example, plan, mesh)
    if found.vocabulary is not None and found.cuts_vocabulary:
        _cut_vocabulary(model, found.vocabulary, mesh)
    if found.pairs and has_dropout(model):
        _draw_apart(model, found, mesh)
    layers = find_layers(model)
    recompute(model, layers, plan.recompute)
    if compiled:  # after recompute, which the compiler so sees
        # stages are looked for on meta tensors, into which forwards without a cache look
        compile_layers(model, layers, keep_cache=stages is not None)
    if stages is None:
        model.unused_parameters = unused  # type: ignore[assignment]
        return model
    return Pipeline(model, mesh=mesh, stages=stages, answers=found.answers)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, mesh: Mesh) -> Tensor:
    """Scale all gradients so that their norm over the whole model is at most `max_norm`; return the norm before.

    `parameters` are all those that this rank holds. Cut ones are summed over the tensor-parallel group, whole ones
    counted once; then all over the pipeline, where a parameter that several stages hold counts on the first.
    """
    gradients: list[Tensor] = []
    whole: list[Tensor] = []
    cut: list[Tensor] = []
    for parameter in parameters:  # once through them: this is part of what a step costs beside its work
        grad = parameter.grad
        if grad is None:
            continue
        gradients.append(grad)
        if getattr(parameter, "counted_elsewhere", False):
            continue
        shard = shard_of(parameter)
        if shard is None:
            whole.append(grad)
        else:
            cut.append(grad / shard.num_copies**0.5 if shard.num_copies > 1 else grad)
    # torch.nn.utils.get_total_norm takes another road for fake tensors than for real ones; these ops do not.
    squares = [torch.stack(torch._foreach_norm(grads)).square().sum() for grads in (whole, cut) if grads]
    if cut:
        squares[-1] = sum_over(squares[-1], mesh.groups["tp"])
    total = sum(squares[1:], squares[0]) if squares else torch.zeros((), device=mesh.device)
    if "pp" in mesh.groups:
        total = sum_over(total, mesh.groups["pp"])
    norm = total.sqrt()
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def sum_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of x over the group."""
    functional = torch.ops._c10d_functional
    result: Tensor = functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group.group_name))
    return result


def sum_gradient(gradient: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of a parameter's gradient over the group, in memory that nothing else refers to.

    A collective may hold on to its result for a moment; autograd would then copy the gradient, or not.
    """
    return sum_over(gradient, group).clone()


def _cut(model: nn.Module, found: Discovery, mesh: Mesh) -> None:
    pairs = found.pairs
    degree, index, group = mesh.degree("tp"), mesh.index("tp"), mesh.groups["tp"]
    parts: dict[nn.Module, nn.Module] = {}
    made: dict[tuple[int, str, int], nn.Parameter] = {}  # layers that were tied stay tied
    for pair in pairs:
        styles = {**dict.fromkeys(pair.columns, "column"), **dict.fromkeys(pair.rows, "row")}
        share = pair.share(degree)
        for path, style in styles.items():
            whole = model.get_submodule(path)
            num_blocks = pair.columns.get(path, 1)
            num_copies = pair.num_copies(path, degree) if style == "column" else 1
            what = Part(
                num_blocks=num_blocks, num_copies=num_copies, share=share, group=group, index=index, degree=degree
            )
            part = cut_linear(style, whole, what)
            for name, parameter in list(part.named_parameters()):
                key = id(getattr(whole, name)), style, num_blocks
                if key not in made and num_copies > 1:
                    parameter.register_hook(partial(sum_gradient, group=_sharers(mesh, num_copies)))
                setattr(part, name, made.setdefault(key, parameter))
            parts[whole] = part
    _replace(model, parts)
    _retie(model, {whole: parameter for (whole, _, _), parameter in made.items()})
    for candidate, sources in found.owned.items():
        share = found.pair_of(sources).share(degree)
        whole_size = model.get_parameter(candidate.parameter).size(candidate.dim)
        shard = Shard(dim=candidate.dim, unit=whole_size // share.num_units, num_groups=share.num_groups)
        _cut_parameter(model, candidate.parameter, shard, index, degree)
    for path, sources in found.gathered.items():
        pair = found.pair_of(sources)
        num_copies = pair.num_copies(next(iter(sources & pair.columns.keys())), degree)
        held = [1] * degree if num_copies > 1 else [pair.share(degree).held(rank, degree) for rank in range(degree)]
        gather_around(model.get_submodule(path), Features(group=group, index=index, held=held, num_copies=num_copies))


def _install_sequence(
    model: nn.Module, found: Discovery, example: Mapping[str, Tensor], plan: Plan, mesh: Mesh
) -> None:
    cut, index = found.sequence, mesh.index("tp")
    install_sequence(model, cut, mesh.groups["tp"])
    for name in cut.partial:
        model.get_parameter(name).register_hook(partial(sum_gradient, group=mesh.groups["tp"]))
    told = trouble_of_part(
        model, sequence_example(example, plan.tp), replace(found, seen=cut.seen).shapes(index, plan.tp)
    )
    if told:
        raise PlanError(f"plan {plan}: the forward does not run on a rank's part of the sequence: {told}; leave out sp")


def _draw_apart(model: nn.Module, found: Discovery, mesh: Mesh) -> None:
    """Within regions, or between the borders of a cut sequence, each rank has random numbers of its own."""
    if found.sequence is not None:
        begins, ends = border_modules(model)
    else:
        begins = [model.get_submodule(path) for pair in found.pairs for path in pair.columns]
        ends = [model.get_submodule(path) for pair in found.pairs for path in pair.rows]
    OwnRandom(mesh.index("tp")).install(model, begins, ends)


def _cut_vocabulary(model: nn.Module, vocabulary: Vocabulary, mesh: Mesh) -> None:
    degree, index, group = mesh.degree("tp"), mesh.index("tp"), mesh.groups["tp"]
    made = {}
    for path in vocabulary.heads:
        whole: Any = model.get_submodule(path)
        part = Part(num_blocks=1, num_copies=1, group=group, index=index, degree=degree)
        head = cut_linear("column", whole, part)
        for name, parameter in head.named_parameters():
            made[id(getattr(whole, name))] = parameter
        _replace(model, {whole: head})
    for path, size in vocabulary.embeddings.items():
        embedding: Any = model.get_submodule(path)
        if id(embedding.weight) not in made:
            shard = Shard(dim=0)
            parameter = nn.Parameter(shard.take(embedding.weight.detach(), index, degree))
            parameter.requires_grad_(embedding.weight.requires_grad)
            made[id(embedding.weight)] = mark(parameter, shard)
        rows = VocabularyPart(size=size, index=index, degree=degree, group=group)
        begin, end = rows.range
        pad = embedding.padding_idx
        embedding.padding_idx = pad - begin if pad is not None and begin <= pad < end else None
        embedding.num_embeddings = end - begin
        CutVocabulary(rows).install_embedding(embedding)
    _retie(model, made)
    for path, size in vocabulary.heads.items():
        rows = VocabularyPart(size=size, index=index, degree=degree, group=group)
        cut = CutVocabulary(rows)
        cut.install_head(model, model.get_submodule(path))
        model.cut_head = cut  # type: ignore[assignment]


def _replace(model: nn.Module, parts: Mapping[nn.Module, nn.Module]) -> None:
    """Put each part where its whole stands; a layer may stand in several places."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and child in parts:
                module._modules[name] = parts[child]


def _cut_parameter(model: nn.Module, name: str, shard: Shard, index: int, degree: int) -> None:
    whole = model.get_parameter(name)
    part = nn.Parameter(shard.take(whole.detach(), index, degree), requires_grad=whole.requires_grad)
    _retie(model, {id(whole): mark(part, shard)})


def _retie(model: nn.Module, made: Mapping[int, nn.Parameter]) -> None:
    """Put each cut parameter where its whole stands, `made` by the id of the whole; they may be tied."""
    for module in list(model.modules()):
        for name, held in module._parameters.items():
            if id(held) in made:
                module._parameters[name] = made[id(held)]


def _sharers(mesh: Mesh, num_copies: int) -> dist.ProcessGroup:
    """The group of the neighbours that hold the same heads as this rank."""
    begins = range(0, mesh.degree("tp"), num_copies)
    groups = [mesh.part("tp", tuple(range(begin, begin + num_copies))) for begin in begins]
    return next(group for group in groups if group is not None)
