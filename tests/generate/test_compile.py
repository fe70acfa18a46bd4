"""Decode steps that go through torch.compile: one graph for all of them, and the tokens of the plain model."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from meshloom.errors import UsageError
from meshloom.generate import engine
from meshloom.generate.sample import Sampling
from meshloom.model import cache
from meshloom.model.build import build_model
from meshloom.parallel.mesh import Mesh
from meshloom.plan import Plan
from tests.generate.ranks import PROMPTS, config

ALONE = Mesh(plan=Plan(), rank=0, device=torch.device("cpu"), groups={})


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_compiled_steps_give_the_same_tokens_from_few_graphs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a backend that counts graphs and runs them as they are."""
    graphs: list[Any] = []
    calls: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)

        def run(*given: Any) -> Any:
            calls.append(len(graphs))
            return graph.forward(*given)

        return run

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    model = build_model(config(family), "causal", seed=3).eval().requires_grad_(False)
    run = partial(engine.generate, model, PROMPTS, mesh=ALONE, max_new_tokens=24, sampling=Sampling())
    plain = run()
    assert not graphs
    compiled = run(compiled=True)
    assert compiled.tokens == plain.tokens
    assert 1 <= len(graphs) <= 3, "later steps compile nothing"
    assert len(calls) >= 23, "each decode step runs a graph"


def test_a_model_whose_steps_differ_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_takes_attention_masks", lambda model, past: False)
    model = build_model(config("gpt2"), "causal", seed=3).eval()
    with pytest.raises(UsageError, match="--compile: expected a model whose decode steps have one shape"):
        engine.generate(model, PROMPTS, mesh=ALONE, max_new_tokens=4, sampling=Sampling(), compiled=True)
