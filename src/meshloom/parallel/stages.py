"""The stages of a pipeline: which layers each has, balanced by what layers cost or as the plan says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import Tensor, nn

from meshloom.errors import PlanError
from meshloom.parallel.answers import Answers
from meshloom.parallel.flow import Flow, trace_flow
from meshloom.parallel.schedule import SCHEDULES, play
from meshloom.plan import Plan


def balance(costs: Sequence[float], num_stages: int) -> list[int]:
    """Where stages begin and end, `num_stages + 1` numbers, so that the dearest stage is as cheap as can be.

    `costs` are those of the layers in order. Raises PlanError if there are fewer layers than stages.
    """
    if len(costs) < num_stages:
        raise PlanError(
            f"pipeline parallel: expected at least {num_stages} layers for as many stages, got {len(costs)}"
        )
    # best[i]: (dearest stage, bounds) of the first i layers; Pinedo's linear partition, in O(stages · layers²)
    best: list[tuple[float, list[int]]] = [(sum(costs[:end]), [0, end]) for end in range(len(costs) + 1)]
    for stages in range(2, num_stages + 1):
        best = [
            min(
                ((max(best[cut][0], sum(costs[cut:end])), [*best[cut][1], end]) for cut in range(stages - 1, end)),
                default=(float("inf"), []),
            )
            for end in range(len(costs) + 1)
        ]
    return best[-1][1]


def stage_bounds(plan: Plan, costs: Sequence[float]) -> list[int]:
    """Where the stages of `plan` begin and end: as it says, else balanced by the layers' `costs`; raises PlanError."""
    if not plan.stage_layers:
        return balance(costs, plan.pp * plan.virtual_stages)
    if sum(plan.stage_layers) != len(costs):
        raise PlanError(
            f"plan {plan}: expected stages of {len(costs)} layers together, which the model has, got "
            f"{' + '.join(map(str, plan.stage_layers))} = {sum(plan.stage_layers)}"
        )
    return [0, *accumulate(plan.stage_layers)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """What flows through a model, and where its stages begin and end: one number more than there are stages."""

    flow: Flow
    bounds: tuple[int, ...]

    @property
    def layers(self) -> list[tuple[str, ...]]:
        """The layers of each stage."""
        return [self.flow.layers[begin:end] for begin, end in pairwise(self.bounds)]


def find_stages(model: nn.Module, plan: Plan, example: Mapping[str, Tensor], answers: Answers | None = None) -> Stages:
    """The stages of `plan`; raises PlanError if the model has too few layers, or the schedule cannot be."""
    flow = trace_flow(model, example, answers)
    # layers that hand on more than one tensor may do so in one mode only, as a state that training does without
    if answers is None and any(output.leaf for part in flow.needs for output in part):
        other = trace_flow(model, example, training=True)
        if (other.needs, other.returns) != (flow.needs, flow.returns):
            raise PlanError(
                f"plan {plan}: expected layers that return the same in training as else, but {flow.layers[0]} and "
                "those after it do not; use pp1"
            )
    bounds = stage_bounds(plan, layer_costs(model, flow))
    play(SCHEDULES[plan.schedule](plan.pp, plan.num_micro_batches, plan.virtual_stages))
    return Stages(flow=flow, bounds=tuple(bounds))


def layer_costs(model: nn.Module, flow: Flow) -> list[float]:
    """What each layer costs, in parameters it multiplies with; the last one also bears what follows the layers."""
    costs = [float(sum(p.numel() for p in model.get_submodule(path).parameters())) for path in flow.layers]
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    costs[-1] += sum(sizes[name] for name in flow.parameters[-1])
    return costs
