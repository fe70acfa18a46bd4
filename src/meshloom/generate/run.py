"""What each rank of a run of generation does: from the model's weights to the last prompt, and what is told of it."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from meshloom.chakra.file import whole_file
from meshloom.errors import DataError, PlanError, UsageError
from meshloom.generate.engine import Generation, generate
from meshloom.generate.sample import Sampling
from meshloom.generate.text import TextStream
from meshloom.model.build import build_model, example_batch, num_parameters
from meshloom.model.layout import lay_out_for_one_row
from meshloom.model.pretrained import check_weights, fill_from
from meshloom.model.weights import build_part, inner_model
from meshloom.parallel.apply import check_plan
from meshloom.parallel.compiled import check_compiler
from meshloom.parallel.launch import rank_context
from meshloom.parallel.mesh import Mesh, make_mesh
from meshloom.plan import Plan

# A hook for each rank: given the mesh and the model, it returns what stands around step number s. Capture is one.
AroundStep = Callable[[Mesh, nn.Module], Callable[[int], AbstractContextManager[Any]]]
RESULT = "result.json"  # what rank 0 leaves in the folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is continued, by what model; `prompts` are tokens, `batch_size` of them are continued together."""

    config: Any
    plan: Plan
    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    sampling: Sampling
    batch_size: int
    tokenizer: Any = None  # None: tokens stay numbers
    eos_ids: frozenset[int] = frozenset()
    weights: str | None = None  # the folder of the weights, random ones if None
    shard_cache: str | None = None
    seed: int = 0  # of random weights
    dtype: str = "float32"
    cuda_graph: bool = True
    styles: Mapping[str, str] = field(default_factory=dict)  # a plan written by hand
    compiled: bool = False  # decode steps go through torch.compile
    traced_step: int | None = None  # the decode step that is recorded, beside the prefill


def check_job(job: Job) -> int:
    """How many parameters the model has; raises if the plan, the prompts or the weights cannot be."""
    if job.plan.dp > 1 or job.plan.cp > 1 or job.plan.sequence_parallel:
        raise PlanError(
            f"plan {job.plan}: expected tp and pp only, to generate; start a run for each part of the prompts"
        )
    if job.compiled and job.plan.tp * job.plan.pp > 1:
        raise PlanError(f"--compile: expected a plan of one rank, got {job.plan}; leave it out, or use dp1")
    size = job.config.vocab_size
    if job.tokenizer is not None and len(job.tokenizer) > size:
        raise DataError(
            f"tokenizer: expected at most {size} tokens, which is the model's vocabulary, got {len(job.tokenizer)}; "
            "use the model's own tokenizer"
        )
    limit = getattr(job.config, "max_position_embeddings", None)
    for number, prompt in enumerate(job.prompts, start=1):
        if not prompt:
            raise UsageError(f"prompt {number}: expected at least one token, got an empty prompt")
        if limit is not None and len(prompt) + job.max_new_tokens > limit:
            raise UsageError(
                f"prompt {number}: expected at most {limit} tokens, the positions that the model has, got "
                f"{len(prompt)} and --max-new-tokens {job.max_new_tokens}; shorten either"
            )
    if job.traced_step is not None and job.traced_step >= job.max_new_tokens:
        raise UsageError(f"--max-new-tokens {job.max_new_tokens}: expected at least 2, to record a decode step")
    model = build_model(job.config, "causal", seed=job.seed, device="meta")
    example = example_batch("causal", micro_batch=1, seq_length=8, device="meta")
    check_plan(model, job.plan, example, job.styles)
    if job.weights is not None:
        check_weights(Path(job.weights), model)
    return num_parameters(model)


def generate_rank(job: Job, folder: str, device: str, around_step: AroundStep | None, show: bool) -> None:
    """Generate on the calling rank; rank 0 shows the text as it comes if `show`, and leaves RESULT in `folder`."""
    with rank_context(device) as chosen:
        if job.compiled:
            check_compiler(chosen.type)
        begin_ns = time.perf_counter_ns()
        mesh = make_mesh(job.plan, chosen)
        model = load_part(job, mesh)
        load_ns = time.perf_counter_ns() - begin_ns
        around: Any = around_step(mesh, inner_model(model)) if around_step is not None else lambda step: nullcontext()
        if job.traced_step is not None:  # what only happens the first time is no part of a trace
            _continue(replace(job, max_new_tokens=2), model, mesh, 0, lambda step: nullcontext(), show=False)
        done = []
        for first in range(0, len(job.prompts), job.batch_size):
            done.append(_continue(job, model, mesh, first, around, show=show and mesh.rank == 0))
            around = lambda step: nullcontext()  # noqa: E731 - the first batch is recorded
        memory = _of_all_ranks([_weight_bytes(model), max(one.cache_bytes for one in done), _most_memory(chosen)], mesh)
        if mesh.rank == 0:
            with whole_file(Path(folder) / RESULT) as file:
                file.write(json.dumps(_told(job, done, load_ns, memory)).encode())


def load_part(job: Job, mesh: Mesh) -> nn.Module:
    """This rank's part of the model, with its weights."""
    fill = None
    if job.weights is not None:
        whole = build_model(job.config, "causal", seed=job.seed, device="meta")
        cache = None if job.shard_cache is None else Path(job.shard_cache)
        fill = fill_from(Path(job.weights), whole, mesh=mesh, cache=cache)
    model = build_part(job.config, "causal", mesh=mesh, seed=job.seed, fill=fill, styles=job.styles).eval()
    return lay_out_for_one_row(model.requires_grad_(False).to(getattr(torch, job.dtype)))


def _continue(job: Job, model: nn.Module, mesh: Mesh, first: int, around: Any, *, show: bool) -> Generation:
    """One batch of the prompts, from number `first` on."""
    prompts = job.prompts[first : first + job.batch_size]
    teller = Teller(job.tokenizer, len(job.prompts), first, len(prompts), job.eos_ids) if show else None
    done = generate(
        model,
        prompts,
        mesh=mesh,
        max_new_tokens=job.max_new_tokens,
        sampling=job.sampling,
        eos_ids=job.eos_ids,
        first=first,
        around=around,
        cuda_graph=job.cuda_graph,
        compiled=job.compiled,
        at_least=0 if job.traced_step is None or first else job.traced_step + 1,
        on_tokens=teller.tell if teller is not None else lambda tokens: None,
    )
    if teller is not None:
        teller.finish()
    return done


class Teller:
    """Writes text to the terminal as it comes: of one prompt piece by piece, of several each when it has ended."""

    def __init__(self, tokenizer: Any, num_prompts: int, first: int, batch_size: int, eos_ids: frozenset[int]) -> None:
        self.tokenizer, self.num_prompts, self.first, self.eos_ids = tokenizer, num_prompts, first, eos_ids
        self.streams = [TextStream(tokenizer) if tokenizer is not None else None for _ in range(batch_size)]
        self.texts = [""] * batch_size
        self.told = [False] * batch_size

    def tell(self, tokens: list[int | None]) -> None:
        """Take the newest token of each sequence."""
        for number, token in enumerate(tokens):
            if token is not None:
                stream = self.streams[number]
                self._add(number, f"{token} " if stream is None else stream.add([token]))
            if token is None or token in self.eos_ids:
                self._end(number)

    def finish(self) -> None:
        """No more comes."""
        for number in range(len(self.streams)):
            self._end(number)

    def _add(self, number: int, text: str) -> None:
        self.texts[number] += text
        if self.num_prompts == 1:
            sys.stdout.write(text)
            sys.stdout.flush()

    def _end(self, number: int) -> None:
        if self.told[number]:
            return
        self.told[number] = True
        stream = self.streams[number]
        self._add(number, stream.finish() if stream is not None else "")
        if self.num_prompts == 1:
            sys.stdout.write("\n")
        else:
            sys.stdout.write(f"[{self.first + number + 1}] {self.texts[number]}\n")
        sys.stdout.flush()


def _told(job: Job, done: Sequence[Generation], load_ns: int, memory: list[list[int]]) -> dict[str, Any]:
    """What is told in the end: tokens, texts, times and memory."""
    tokens = [row for one in done for row in one.tokens]
    plain = [ns for one in done for step, ns in enumerate(one.step_ns) if step and step not in one.recorded]
    total_ns = sum(sum(one.step_ns) for one in done)
    texts = (
        [job.tokenizer.decode(row, skip_special_tokens=True) for row in tokens] if job.tokenizer is not None else None
    )
    return {
        "plan": str(job.plan),
        "num_prompts": len(job.prompts),
        "num_prompt_tokens": sum(map(len, job.prompts)),
        "num_new_tokens": sum(map(len, tokens)),
        "tokens": tokens,
        "texts": texts,
        "load_ms": load_ns / 1e6,
        "time_to_first_token_ms": done[0].step_ns[0] / 1e6,
        "ms_per_token_median": median(plain) / 1e6 if plain else None,
        "ms_per_token_p90": _p90(plain) / 1e6 if plain else None,
        "tokens_per_second": sum(map(len, tokens)) / (total_ns / 1e9),
        "memory": [
            {"rank": rank, "weight_bytes": weights, "cache_bytes": cache, "peak_bytes": peak}
            for rank, (weights, cache, peak) in enumerate(memory)
        ],
    }


def _p90(values: Sequence[int]) -> float:
    return quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else float(values[0])


def _weight_bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _most_memory(device: torch.device) -> int:
    """The most bytes that this rank held at once: of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _of_all_ranks(numbers: list[int], mesh: Mesh) -> list[list[int]]:
    """These numbers of each rank, by rank."""
    mine = torch.tensor(numbers, dtype=torch.int64, device=mesh.device)
    everyone = [torch.empty_like(mine) for _ in range(mesh.plan.world_size)]
    dist.all_gather(everyone, mine)
    return [one.tolist() for one in everyone]
