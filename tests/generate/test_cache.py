"""Caches: fixed shapes give what growing ones give, and memory is that of the tokens that may come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from meshloom.generate.engine import generate, padded
from meshloom.generate.sample import Sampling
from meshloom.model.build import build_model
from meshloom.model.cache import make_cache
from meshloom.model.step import decode_step, prefill_step
from meshloom.parallel.mesh import Mesh
from meshloom.plan import Plan
from tests.generate.ranks import FAMILIES, PROMPTS, config

CPU = torch.device("cpu")
ALONE = Mesh(plan=Plan(), rank=0, device=CPU, groups={})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1], [[7]]])
def test_fixed_shapes_change_nothing(family: str, prompts: list[list[int]]) -> None:
    model = build_model(config(family), "causal", seed=3).eval()
    ids, mask = padded(prompts, CPU)
    found = []
    for fixed in (False, True):
        cache = make_cache(model, batch_size=len(prompts), max_length=40, device=CPU, mask=mask, fixed=fixed)
        assert (cache.fixed is not None) == fixed
        logits: list[Any] = []

        def choose(given: Any, kept: list[Any] = logits) -> Any:
            kept.append(given.clone())
            return given.argmax(dim=-1)

        tokens = prefill_step(model, ids, mesh=ALONE, cache=cache, choose=choose)
        addresses = set()
        for _ in range(20):
            tokens = decode_step(model, tokens, mesh=ALONE, cache=cache, choose=choose)
            addresses.add(cache.fixed.position.data_ptr() if cache.fixed is not None else 0)
        assert len(addresses) == 1
        found.append(torch.stack(logits))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


def test_a_step_that_is_recorded_later_changes_nothing() -> None:
    model = build_model(config("llama"), "causal", seed=3).eval()
    seen: list[int] = []

    @contextmanager
    def watch(step: int) -> Iterator[None]:
        seen.append(step)
        yield

    def run(around: Any) -> Any:
        return generate(model, PROMPTS, mesh=ALONE, max_new_tokens=30, sampling=Sampling(), around=around)

    plain = run(lambda step: nullcontext())
    told = run(lambda step: watch(step) if step in (0, 10, 20) else nullcontext())
    assert told.tokens == plain.tokens
    assert seen == [0, 10, 20]
    assert told.recorded == {0, 10, 20}
    assert plain.recorded == frozenset()


def test_the_memory_of_keys_and_values() -> None:
    model = build_model(config("llama"), "causal", seed=3).eval()
    cache = make_cache(model, batch_size=2, max_length=40, device=CPU)
    prefill_step(model, torch.ones(2, 5, dtype=torch.long), mesh=ALONE, cache=cache)
    # layers x keys and values x batch x heads x tokens x features of a head x bytes
    assert cache.num_bytes == 4 * 2 * 2 * 2 * 40 * 8 * 4
    assert cache.length == 5
