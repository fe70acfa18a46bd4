"""The steps that real ranks run and synthesis imagines: models, plans and what is asked of the step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from meshloom.plan import Plan
from tests.synth.steps import config

MICRO_BATCH, SEQ_LENGTH = 2, 16
NUM_INPUT, NUM_OUTPUT = 10, 4
# plan -> what the schedule is told beside it
PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    "dp2": ("dp2", {}),
    "tp2": ("tp2", {}),
    "pp2": ("pp2", {"num_micro_batches": 4}),
    "pp2 interleaved": ("pp2", {"num_micro_batches": 4, "schedule": "interleaved", "virtual_stages": 2}),
    "tp2.pp2": ("tp2.pp2", {"num_micro_batches": 2}),
    "dp2.tp2": ("tp2.dp2", {"num_micro_batches": 2}),
}
FAMILIES = ("gpt2", "bert", "llama")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A step of a family on a plan; `options` are those of `train_step` and `make_optimizer`."""

    family: str
    plan: Plan
    generates: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        """Four layers where each rank holds two stages, else two."""
        return config(self.family, 4 if self.plan.virtual_stages > 1 else 2)


def _case(family: str, plan: str, more: dict[str, Any] | None = None, **rest: Any) -> Case:
    return Case(family=family, plan=replace(Plan.parse(plan), **(more or {})), **rest)


TRAINING = {f"{family} {name}": _case(family, *plan) for family in FAMILIES for name, plan in PLANS.items()} | {
    "llama tp2.sp": _case("llama", "tp2.sp"),
    "gpt2 pp2 zero-bubble": _case("gpt2", "pp2", {"num_micro_batches": 3, "schedule": "zero-bubble"}),
    "gpt2 dp2 of three micro-batches": _case("gpt2", "dp2", {"num_micro_batches": 3}),
    "llama dp2 recomputed": _case("llama", "dp2", {"recompute": "full"}),
    "gpt2 tp2 recomputed in part": _case("gpt2", "tp2", {"recompute": "selective"}),
    "gpt2 dp2 bf16": _case("gpt2", "dp2", options={"precision": "bf16"}),
    "gpt2 tp2 fp16": _case("gpt2", "tp2", options={"precision": "fp16"}),
    "gpt2 dp2 zero": _case("gpt2", "dp2", options={"zero": 1}),
    "llama dp2.tp2 zero": _case("llama", "tp2.dp2", options={"zero": 1}),
}
GENERATION = {
    f"{family} {plan} generates": _case(family, plan, generates=True)
    for family in ("gpt2", "llama")
    for plan in ("tp2", "pp2", "tp2.pp2")
}
CASES = TRAINING | GENERATION
