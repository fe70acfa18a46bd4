"""The loss on held-out data: each sequence once, over all ranks, weighted by the tokens that count, on any plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from meshloom.model.config import Objective
from meshloom.model.step import IGNORED, Batch, Precision, eval_step
from meshloom.parallel.mesh import Mesh
from meshloom.train.data import Sequences, Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a run evaluates on: the first-to-last `num_sequences` of `stream`, evenly spread, every `steps` steps."""

    stream: Stream
    steps: int
    num_sequences: int | None = None  # None: all


class Evaluator:
    """Evaluates this rank's part of a model, which is not wrapped for data parallel, with the other ranks of a mesh."""

    def __init__(
        self,
        what: Evaluation,
        *,
        model: nn.Module,
        objective: Objective,
        batch_size: int,
        mesh: Mesh,
        precision: Precision,
    ) -> None:
        self._model, self._mesh, self._objective, self._precision = model, mesh, objective, precision
        self._batch_size = batch_size
        self._sequences = Sequences(what.stream)
        in_all = len(self._sequences)
        self.num_sequences = min(in_all, what.num_sequences or in_all)

    def loss(self) -> float:
        """The mean loss of a token; every rank of the mesh must call this at the same point.

        The model is left in training mode, and random states as they were.
        """
        device = self._mesh.device
        told = torch.zeros(2, dtype=torch.float64, device=device)  # sum of losses, tokens that count
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            self._model.eval()
            try:
                for batch in self._batches():
                    on_device = {name: tensor.to(device) for name, tensor in batch.items()}
                    loss, counted = eval_step(
                        self._model, on_device, objective=self._objective, mesh=self._mesh, precision=self._precision
                    )
                    told += torch.stack([loss.where(counted > 0, 0.0), counted.double()])
            finally:
                self._model.train()
        # ranks that differ in tensor and pipeline parallel only have the same sums, so each counts as often as all
        dist.all_reduce(told)
        total, num_tokens = told.tolist()
        return float(total / max(1.0, num_tokens))

    def _batches(self) -> Iterator[Batch]:
        """This rank's batches; one that is not full is filled with sequences that do not count, so that all shapes are
        equal."""
        in_all, size = len(self._sequences), self._batch_size
        mine = range(self._mesh.index("dp"), self.num_sequences, self._mesh.degree("dp"))
        for begin in range(0, len(mine), size):
            rows = [self._sequences.once(place * in_all // self.num_sequences) for place in mine[begin : begin + size]]
            empty = {**rows[0], "labels": np.full_like(rows[0]["labels"], IGNORED)}
            rows += [empty] * (size - len(rows))
            yield {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
