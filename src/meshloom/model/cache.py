"""Keys and values of the tokens so far, in memory that is made once: what decoding reads instead of computing again.

Hugging Face's cache with layers of our own where a layer attends to all tokens; sliding windows, recurrent states and
the like keep HF's. A rank holds the heads that it computes, of the layers of its stage, because memory is made when a
layer is first run.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache
from transformers.generation.utils import GenerationMixin

from meshloom.errors import ModelError
from meshloom.model.build import ask_no_padding
from meshloom.model.weights import inner_model


@dataclass(slots=True)
class _Clock:
    """How many tokens of each sequence were fed before the running step."""

    length: int = 0


class _Filled(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer: attention sees what is filled, as of HF's growing cache, but nothing is moved.

    Its length is the clock's, also on a stage that never runs the layer.
    """

    def __init__(self, clock: _Clock, max_length: int) -> None:
        super().__init__()
        self.clock, self.max_length = clock, max_length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep keys and values (B, H/tp, S, D), and return all until now (B, H/tp, length + S, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, count = self.clock.length, key_states.shape[-2]
        self.keys.narrow(2, begin, count).copy_(key_states)
        self.values.narrow(2, begin, count).copy_(value_states)
        return self.keys.narrow(2, 0, begin + count), self.values.narrow(2, 0, begin + count)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the memory, by the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_zeros((*states.shape[:2], self.max_length, states.shape[-1]))
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """How many tokens were fed before this step."""
        return self.clock.length


@dataclass(slots=True, kw_only=True)
class Fixed:
    """Position and mask of a decode step in memory of their own, so that a graph of the step finds them there."""

    position: Tensor  # (B, 1) int64
    attends: Tensor  # (B, 1, 1, max_length) bool

    def arguments(self, ids: Tensor, begin: int, positions: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """What the model's forward gets to continue with the tokens `ids` (B, S) after `begin` others."""
        count, most = ids.shape[1], positions.shape[1]
        if count == 1:
            return {"input_ids": ids, "position_ids": self.position, "attention_mask": self.attends}
        places = torch.arange(most, device=ids.device)
        sees = places <= places[begin : begin + count, None]  # (S, max_length)
        sees = sees.expand(ids.shape[0], 1, count, most)
        if mask is not None:
            sees = sees & mask.bool()[:, None, None, :]
        return {"input_ids": ids, "position_ids": positions.narrow(1, begin, count), "attention_mask": sees}

    def settle(self, begin: int, positions: Tensor, mask: Tensor | None) -> None:
        """Write what the decode step after `begin` tokens needs."""
        self.position.copy_(positions.narrow(1, begin, 1))
        self.attends.zero_()
        self.attends[:, 0, 0, : begin + 1] = True if mask is None else mask[:, : begin + 1].bool()


@dataclass(slots=True, kw_only=True)
class Cache:
    """What steps of one batch of sequences share on a rank: keys and values, and where each sequence stands.

    `positions` (B, max_length) int64 and `mask` (B, max_length) int64 are those of all steps, so that none computes
    them; without padding there is no mask. `takes` are the arguments that the model's forward knows.
    """

    past: Any  # HF's
    clock: _Clock
    max_length: int
    positions: Tensor
    mask: Tensor | None
    takes: frozenset[str]
    attends: Tensor | None = None  # (B, 1, 1, max_length) bool: the mask of a decode step as attention takes it
    constant: dict[str, Any] = field(default_factory=dict)  # arguments that are the same in each step
    fixed: Fixed | None = None  # where every decode step must have the same shapes and memory

    @property
    def length(self) -> int:
        """How many tokens of each sequence were fed, with padding."""
        return self.clock.length

    def arguments(self, ids: Tensor) -> dict[str, Any]:
        """What the model's forward gets to continue with the tokens `ids` (B, S)."""
        begin, count = self.clock.length, ids.shape[1]
        if self.fixed is not None:
            return self.fixed.arguments(ids, begin, self.positions, self.mask) | self.constant
        found = {"input_ids": ids, **self.constant}
        if "position_ids" in self.takes:
            found["position_ids"] = self.positions.narrow(1, begin, count)
        if self.attends is not None and count == 1:
            found["attention_mask"] = self.attends.narrow(3, 0, begin + 1)
        elif self.mask is not None:
            found["attention_mask"] = self.mask.narrow(1, 0, begin + count)
        return found

    def advance(self, count: int) -> None:
        """Tell that `count` more tokens of each sequence were fed."""
        self.clock.length += count
        if self.fixed is not None and self.clock.length < self.max_length:
            self.fixed.settle(self.clock.length, self.positions, self.mask)
        for layer in self.past.layers:  # of other stages, which are not run here, but asked for their length
            if isinstance(getattr(layer, "cumulative_length", None), int):
                layer.cumulative_length = self.clock.length

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values that this rank holds."""
        return sum(
            value.numel() * value.element_size()
            for layer in self.past.layers
            for value in vars(layer).values()
            if isinstance(value, Tensor)
        )


def make_cache(
    model: nn.Module,
    *,
    batch_size: int,
    max_length: int,
    device: torch.device,
    mask: Tensor | None = None,
    fixed: bool = False,
) -> Cache:
    """A cache for `batch_size` sequences of up to `max_length` tokens, of a whole or cut model.

    `mask` (B, S) tells which tokens of prompts padded on the left are none: 0. If `fixed`, and the model can, all
    decode steps have the same shapes and memory: HF's static cache. Raises ModelError if the model cannot continue from
    a cache.
    """
    inner: Any = inner_model(model)
    known = inspect.signature(type(inner).forward).parameters
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    if "past_key_values" not in known:
        raise ModelError(
            f"{type(inner).__name__}: expected a forward that takes past_key_values, to generate with a cache"
        )
    ask_no_padding(inner)
    clock = _Clock()
    past = DynamicCache(config=inner.config)
    past.layers = [_Filled(clock, max_length) if type(layer) is DynamicLayer else layer for layer in past.layers]
    positions = torch.arange(max_length, device=device).repeat(batch_size, 1)
    full = None
    if mask is not None and not bool((mask == 1).all()):
        full = torch.ones(batch_size, max_length, dtype=torch.long, device=device)
        full[:, : mask.shape[1]] = mask
        positions = (full.cumsum(1) - 1).clamp(min=0)
    steady = None
    if fixed and "position_ids" in known and _takes_attention_masks(inner, past):
        past = StaticCache(config=inner.config, max_cache_len=max_length)
        steady = Fixed(
            position=torch.zeros(batch_size, 1, dtype=torch.long, device=device),
            attends=torch.zeros(batch_size, 1, 1, max_length, dtype=torch.bool, device=device),
        )
        steady.settle(0, positions, full)
    takes = frozenset(name for name in ("position_ids", "logits_to_keep") if name in known or open_ended)
    constant: dict[str, Any] = {"past_key_values": past, "use_cache": True}
    if "logits_to_keep" in known:  # what passes it on with all others may know it or not
        constant["logits_to_keep"] = 1
    return Cache(
        past=past,
        clock=clock,
        max_length=max_length,
        positions=positions,
        mask=full,
        takes=takes,
        attends=None if full is None or not _takes_attention_masks(inner, past) else full.bool()[:, None, None, :],
        constant=constant,
        fixed=steady,
    )


def _takes_attention_masks(model: Any, past: Any) -> bool:
    """Whether the model hands a mask of four dims on to its attention as it is, so that none need be made each step."""
    return (
        all(isinstance(layer, _Filled) for layer in past.layers)
        and getattr(model, "_can_compile_fullgraph", False)
        and type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
        and model.config._attn_implementation == "sdpa"
    )
