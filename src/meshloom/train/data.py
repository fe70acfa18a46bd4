"""From tokenised shards to batches: every sequence of a run has a number, and the number alone decides what it holds.

So a run goes on from any position, on any number of ranks, and the sequences of a step do not depend on the plan.
Causal models read documents packed without padding. Masked ones read pairs, [CLS] question [SEP] context [SEP], cut or
padded to one sequence, and other text packed between [CLS] and [SEP]; what is masked is drawn from the number too.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from meshloom.errors import DataError
from meshloom.model.config import Objective
from meshloom.model.step import Batch
from meshloom.train.order import mixed, permuted, turns
from meshloom.train.shards import Shard

_IGNORED = -100  # the label that the loss of every HF model leaves out
_MASKED_SHARE = 0.15  # Devlin et al. 2019, section 3.1: 80 % become [MASK], 10 % a random token, 10 % stay
_BLOCK = 1024  # positions whose places are computed at a time

Row = dict[str, NDArray[np.int64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The ids around the text of a masked sequence, and those that masking needs."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    mask: int
    pad: int
    num_ids: int

    @property
    def num_around(self) -> int:
        """Special tokens of a pair."""
        return len(self.before) + len(self.between) + len(self.after)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The shards of one source, and its share of the sequences."""

    shards: tuple[Shard, ...]
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """The endless sequences of a run: what they are read from, and all that decides their order.

    Of each source's packed texts, and of its pairs, only those from `begin` to `end` are read, as shares of all.
    """

    parts: tuple[Part, ...]
    seq_length: int
    seed: int
    frame: Frame | None  # None for causal models
    begin: float = 0.0
    end: float = 1.0

    @property
    def num_sequences(self) -> int:
        """Sequences of an epoch: as many as the data holds, also where shares let some come twice and some not."""
        return sum(_Reader(part, self).num_sequences for part in self.parts)

    @property
    def num_tokens(self) -> int:
        """Tokens that the data holds."""
        return sum(shard.num_tokens for part in self.parts for shard in part.shards)

    @property
    def num_documents(self) -> int:
        """Documents that the data holds."""
        return sum(shard.num_documents for part in self.parts for shard in part.shards)


def make_stream(
    shards: Sequence[Sequence[Shard]],
    weights: Sequence[float | None],
    tokenizer: Any,
    objective: Objective,
    *,
    seq_length: int,
    seed: int,
) -> Stream:
    """The stream of each source's shards by the sources' weights; without weights, each sequence comes once an epoch.

    Raises DataError if a source holds not one sequence, or a sequence has no room for text.
    """
    weighted = [(tuple(of_one), weight) for of_one, weight in zip(shards, weights) if weight is not None]
    if not weighted:
        weighted = [(tuple(shard for of_one in shards for shard in of_one), 1.0)]
    stream = Stream(
        parts=tuple(Part(shards=of_one, weight=weight) for of_one, weight in weighted),
        seq_length=seq_length,
        seed=seed,
        frame=_frame(tokenizer) if objective == "masked" else None,
    )
    if stream.frame is not None and seq_length <= stream.frame.num_around:
        raise DataError(
            f"--seq-length {seq_length}: expected more than {stream.frame.num_around}, the special tokens of a sequence"
        )
    for part in stream.parts:
        if not _Reader(part, stream).num_sequences:
            name = part.shards[0].name if weights[0] is not None else "data"
            raise DataError(
                f"{name}: expected at least one sequence of {seq_length} tokens, the documents hold fewer; "
                "use a smaller --seq-length or more data"
            )
    return stream


def hold_out(stream: Stream, fraction: float) -> tuple[Stream, Stream]:
    """What is left to train on, and what is held out: the last `fraction` of each source's sequences.

    Raises DataError if either would be empty.
    """
    kept, held = replace(stream, end=1.0 - fraction), replace(stream, begin=1.0 - fraction)
    for what in (kept, held):
        for part in what.parts:
            num_sequences = _Reader(part, what).num_sequences
            if not num_sequences:
                in_all = _Reader(part, stream).num_sequences
                raise DataError(
                    f"--eval-fraction {fraction}: expected a share that leaves sequences on both sides, the data holds "
                    f"{in_all:,}; give --eval-data, or another share"
                )
    return kept, held


def check_tokenizer(tokenizer: Any, config: Any, objective: str) -> None:
    """Raise DataError if the model has no room for the tokenizer's ids, or masking needs a token that is not there."""
    if len(tokenizer) > config.vocab_size:
        raise DataError(
            f"tokenizer: expected at most {config.vocab_size} tokens, which is the model's vocabulary, got "
            f"{len(tokenizer)}; use the model's own tokenizer"
        )
    masked = ("mask_token_id", "cls_token_id", "sep_token_id", "pad_token_id")
    needed = masked if objective == "masked" else ("eos_token_id",)
    missing = [name.removesuffix("_id") for name in needed if getattr(tokenizer, name, None) is None]
    if missing:
        raise DataError(f"tokenizer: expected a {missing[0]}, which a {objective} model needs; use the model's own")


def batches(stream: Stream, *, batch_size: int, rank: int, num_ranks: int, first_sequence: int = 0) -> Iterator[Batch]:
    """Endless batches for data-parallel rank `rank` of `num_ranks`: int64 (batch_size, seq_length) tensors on the CPU.

    The first batch begins at sequence `first_sequence`, each takes num_ranks * batch_size of them; sequence i of these
    goes to rank i mod num_ranks.
    """
    sequences = Sequences(stream)
    for begin in _count(first_sequence + rank, num_ranks * batch_size):
        yield sequences.batch(range(begin, begin + batch_size * num_ranks, num_ranks))


def _count(first: int, step: int) -> Iterator[int]:
    while True:
        yield first
        first += step


class Sequences:
    """A stream with its files mapped into memory."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._readers = [
            _Reader(part, stream, seed=mixed(stream.seed, place)) for place, part in enumerate(stream.parts)
        ]
        self._turns = turns([part.weight for part in stream.parts])
        self._starts = [0, *accumulate(reader.num_sequences for reader in self._readers)]

    def __len__(self) -> int:
        """How many sequences there are, each once."""
        return self._starts[-1]

    def batch(self, numbers: Sequence[int]) -> Batch:
        """What the sequences of these numbers give the model: argument names -> int64 (len(numbers), seq_length)."""
        if self._stream.frame is not None:
            rows = [self.row(number) for number in numbers]
            return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
        ids = np.empty((len(numbers), self._stream.seq_length), np.int64)
        for place, number in enumerate(numbers):  # part of what a step costs beside its work: one copy each
            part, turn = self._turns.at(number)
            self._readers[part].fill(turn, ids[place])
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(ids.copy())}

    def row(self, number: int) -> Row:
        """What sequence `number` gives the model: argument names -> int64 (seq_length,)."""
        part, turn = self._turns.at(number)
        row = self._readers[part].row(turn)
        return row if self._stream.frame is None else _mask(row, self._stream.frame, self._stream.seed, number)

    def once(self, number: int) -> Row:
        """What sequence `number` of len(self) gives the model, in an order that has each of them once."""
        part = bisect_right(self._starts, number) - 1
        row = self._readers[part].row(number - self._starts[part])
        return row if self._stream.frame is None else _mask(row, self._stream.frame, self._stream.seed, number)


class _Reader:
    """The sequences of one part: those packed from text, then the pairs."""

    def __init__(self, part: Part, stream: Stream, *, seed: int = 0) -> None:
        self._seed = seed
        self._length, self._frame = stream.seq_length, stream.frame
        around = len(self._frame.before) + len(self._frame.after) if self._frame else 0
        self._width = stream.seq_length - around
        texts = [shard for shard in part.shards if shard.layout == "text"]
        pairs = [shard for shard in part.shards if shard.layout == "pairs"]
        self._texts, self._pairs = [shard.tokens() for shard in texts], [shard.tokens() for shard in pairs]
        self._ends = [shard.ends() for shard in pairs]
        self._text_starts = [0, *accumulate(shard.num_tokens for shard in texts)]
        self._pair_starts = [0, *accumulate(shard.num_segments // 2 for shard in pairs)]
        packed, pairs_held = self._text_starts[-1] // self._width, self._pair_starts[-1]
        self._first_packed, self._first_pair = round(stream.begin * packed), round(stream.begin * pairs_held)
        self._num_packed = round(stream.end * packed) - self._first_packed
        self.num_sequences = self._num_packed + round(stream.end * pairs_held) - self._first_pair
        self._block: tuple[int, int, NDArray[np.uint64]] | None = None

    def row(self, turn: int) -> Row:
        """The sequence of the part's `turn`: each comes once an epoch, in an order of that epoch."""
        place = self._place(turn)
        if place >= self._num_packed:
            return self._pair(self._first_pair + place - self._num_packed)
        ids = np.empty(self._width, np.int64)
        self._pack(self._first_packed + place, ids)
        if self._frame is None:
            return {"input_ids": ids, "labels": ids.copy()}
        ids = np.concatenate([self._frame.before, ids, self._frame.after])
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    def fill(self, turn: int, ids: NDArray[np.int64]) -> None:
        """Write the ids of a causal model's sequence of `turn` into `ids`, (seq_length,)."""
        self._pack(self._first_packed + self._place(turn), ids)

    def _place(self, turn: int) -> int:
        epoch, index = divmod(turn, self.num_sequences)
        block = index // _BLOCK
        if self._block is None or self._block[:2] != (epoch, block):
            indices = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, self.num_sequences), dtype=np.uint64)
            self._block = (epoch, block, permuted(indices, self.num_sequences, seed=mixed(self._seed, epoch)))
        return int(self._block[2][index % _BLOCK])

    def _pack(self, place: int, ids: NDArray[np.int64]) -> None:
        """Put tokens of the shards, joined, from place * width on into `ids`, (width,)."""
        begin = place * self._width
        filled = 0
        shard = bisect_right(self._text_starts, begin) - 1
        while filled < self._width:
            inside = begin + filled - self._text_starts[shard]
            piece = self._texts[shard][inside : inside + self._width - filled]
            ids[filled : filled + len(piece)] = piece
            filled += len(piece)
            shard += 1

    def _pair(self, index: int) -> Row:
        assert self._frame is not None
        shard = bisect_right(self._pair_starts, index) - 1
        first = 2 * (index - self._pair_starts[shard])
        ends = self._ends[shard]
        begin, middle, end = (int(ends[first + place]) if first + place >= 0 else 0 for place in (-1, 0, 1))
        frame, tokens = self._frame, self._pairs[shard]
        room = self._length - frame.num_around
        question, context = _cut(middle - begin, end - middle, room)
        filled = np.concatenate(
            [frame.before, tokens[begin : begin + question], frame.between, tokens[middle : middle + context],
             frame.after]
        )  # fmt: skip
        ids = np.full(self._length, frame.pad, np.int64)
        ids[: len(filled)] = filled
        return {"input_ids": ids, "attention_mask": (np.arange(self._length) < len(filled)).astype(np.int64)}


def _cut(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of two texts that fit: the longer one is cut first, then both to halves, as HF's longest_first does."""
    if first + second <= room:
        return first, second
    short = min(first, second, room // 2)
    return (short, room - short) if first <= second else (room - short, short)


def _frame(tokenizer: Any) -> Frame:
    """The tokenizer's own template of a pair; [CLS] and [SEP] where it has none."""
    around: dict[str, tuple[int, ...]] = {
        "before": (tokenizer.cls_token_id,),
        "between": (tokenizer.sep_token_id,),
        "after": (tokenizer.sep_token_id,),
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    encoded = backend.encode("a", "b") if backend is not None else None
    if encoded is not None and None in encoded.sequence_ids:
        ids, owner = encoded.ids, encoded.sequence_ids
        first, second = owner.index(0), owner.index(1)
        first_end, second_end = first + owner.count(0), second + owner.count(1)
        around = {"before": (*ids[:first],), "between": (*ids[first_end:second],), "after": (*ids[second_end:],)}
    return Frame(**around, mask=tokenizer.mask_token_id, pad=tokenizer.pad_token_id, num_ids=len(tokenizer))


def _mask(row: Row, frame: Frame, seed: int, number: int) -> Row:
    """BERT's masking of one sequence, drawn from the seed and the sequence's number; at least one token is masked."""
    random = np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, number], np.uint64)))
    ids = row["input_ids"]
    draw = random.random(len(ids))
    for special in {*frame.before, *frame.between, *frame.after}:
        draw[ids == special] = 2.0
    draw[row["attention_mask"] == 0] = 2.0
    chosen = draw < _MASKED_SHARE
    chosen[draw.argmin()] = True
    how = random.random(len(ids))
    others = random.integers(frame.num_ids, size=len(ids))
    masked = np.where(chosen & (how < 0.8), frame.mask, ids)
    masked = np.where(chosen & (how >= 0.9), others, masked)
    return {**row, "input_ids": masked, "labels": np.where(chosen, ids, _IGNORED)}
