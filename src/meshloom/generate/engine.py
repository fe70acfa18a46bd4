"""Repeat the decode step: prompts in, tokens out, on every rank of a plan alike. Knows neither text nor terminals."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meshloom.errors import UsageError
from meshloom.generate.sample import Sampler, Sampling
from meshloom.model.cache import Cache, make_cache
from meshloom.model.graph import Graphed
from meshloom.model.step import Choose, decode_step, prefill_step
from meshloom.model.tape import Replay
from meshloom.parallel.candidates import most_likely
from meshloom.parallel.mesh import Mesh
from meshloom.parallel.pipeline import Pipeline
from meshloom.parallel.relay import Run, run_plainly

Around = Callable[[int], AbstractContextManager[Any]]  # what stands around step s; step 0 is the prefill
OnTokens = Callable[[list[int | None]], None]  # the newest token of each sequence, None of one that has ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What came out: the new tokens of each prompt, with the one that ended it, and how long each step took."""

    tokens: list[list[int]]
    step_ns: list[int]  # the first is the prefill's, which gives the first token
    recorded: frozenset[int]  # steps whose time tells nothing
    cache_bytes: int

    @property
    def num_tokens(self) -> int:
        """New tokens of all prompts."""
        return sum(map(len, self.tokens))


def padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths as one tensor (B, S), zeros on the left, and its mask (B, S): 1 where a token is."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    mesh: Mesh,
    max_new_tokens: int,
    sampling: Sampling,
    eos_ids: frozenset[int] = frozenset(),
    first: int = 0,
    around: Around = lambda step: nullcontext(),
    at_least: int = 0,
    on_tokens: OnTokens = lambda tokens: None,
    plainly: bool = False,
    cuda_graph: bool = True,
    compiled: bool = False,
) -> Generation:
    """Continue all prompts together until each has met an end token or `max_new_tokens` are there.

    `model` is what `parallelize` returned, with its weights, in eval mode. Every rank of the mesh must call this with
    the same arguments, and gets the same tokens. `first` is the number of the first prompt in the whole run, `at_least`
    how many steps are done even if all sequences have ended; `plainly` runs the model's own code at every step,
    `cuda_graph` captures a decode step where the device and the model can, and there is one stage. `compiled` lets
    torch.compile make kernels of the decode step of a model that is not cut. Raises UsageError if there is nothing to
    continue, or the model's decode steps cannot be compiled.
    """
    if not prompts or not all(prompts):
        raise UsageError("generate: expected prompts of at least one token each")
    ids, mask = padded(prompts, mesh.device)
    graph = cuda_graph and mesh.device.type == "cuda" and not (isinstance(model, Pipeline) or plainly)
    cache = make_cache(
        model,
        batch_size=len(prompts),
        max_length=ids.shape[1] + max_new_tokens,
        device=mesh.device,
        mask=mask,
        fixed=graph or compiled,
    )
    decoding = _compiled(model, cache) if compiled else model
    _learn_shapes(model, ids)
    replay = _replay(cache, graph=graph)
    choose: Choose = most_likely  # which a step knows as a part of the forward
    if not sampling.is_greedy:
        choose = Sampler(sampling, range(first, first + len(prompts)), max_new_tokens)
    run = _Run(cache, len(prompts), eos_ids, on_tokens)
    tokens = torch.empty(0)
    for step in range(max_new_tokens):
        if run.all_ended and step >= at_least:
            break
        context, begin_ns = around(step), time.perf_counter_ns()
        recorded = not isinstance(context, nullcontext)
        with context:
            if step == 0:
                tokens = prefill_step(model, ids, mesh=mesh, cache=cache, choose=choose)
            else:
                way = run_plainly if recorded or plainly else replay
                tokens = decode_step(decoding, tokens, mesh=mesh, cache=cache, choose=choose, run=way)
        if recorded and cache.fixed is None:
            replay = _replay(cache, graph=graph)  # which counts the steps that it sees, and has missed this one
        run.note(step, tokens.tolist(), begin_ns, recorded=recorded)
    return run.result()


def _replay(cache: Cache, *, graph: bool) -> Run:
    """What calls the forward of a decode step."""
    if cache.fixed is None:
        return Replay()
    return Graphed() if graph else run_plainly


def _compiled(model: nn.Module, cache: Cache) -> nn.Module:
    if cache.fixed is None:
        raise UsageError(
            f"--compile: expected a model whose decode steps have one shape, which {type(model).__name__} is not known "
            "to have; leave it out"
        )
    compiled: nn.Module = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    return compiled


class _Run:
    """What one batch has come to."""

    def __init__(self, cache: Cache, num_sequences: int, eos_ids: frozenset[int], on_tokens: OnTokens) -> None:
        self.cache, self.eos_ids, self.on_tokens = cache, eos_ids, on_tokens
        self.tokens: list[list[int]] = [[] for _ in range(num_sequences)]
        self.ended = [False] * num_sequences
        self.step_ns: list[int] = []
        self.recorded: set[int] = set()

    @property
    def all_ended(self) -> bool:
        """Whether every sequence has met an end token."""
        return all(self.ended)

    def note(self, step: int, tokens: list[int], begin_ns: int, *, recorded: bool) -> None:
        """Take the tokens of a step that began at `begin_ns`, and are there now."""
        self.step_ns.append(time.perf_counter_ns() - begin_ns)
        if recorded:
            self.recorded.add(step)
        newest: list[int | None] = []
        for number, token in enumerate(tokens):
            newest.append(None if self.ended[number] else token)
            if not self.ended[number]:
                self.tokens[number].append(token)
                self.ended[number] = token in self.eos_ids
        self.on_tokens(newest)

    def result(self) -> Generation:
        """All of it."""
        return Generation(
            tokens=self.tokens,
            step_ns=self.step_ns,
            recorded=frozenset(self.recorded),
            cache_bytes=self.cache.num_bytes,
        )


def _learn_shapes(model: nn.Module, ids: Tensor) -> None:
    """Find what stages will send one another before the first step, which is not to be the slower for it."""
    if isinstance(model, Pipeline):
        for example in (ids, ids[:, :1]):
            model.shapes({"input_ids": example})
