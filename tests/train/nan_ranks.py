"""A run on two ranks of which one gives a loss that is no number in its fourth step; started as a script."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

import meshloom.train.loop as loop
from meshloom.cli.__main__ import _run
from meshloom.parallel.mesh import Mesh


def _poisoned(mesh: Mesh, model: nn.Module) -> Callable[[int], AbstractContextManager[None]]:
    passes = 0

    def poison(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal passes
        passes += 1
        return output * torch.nan if mesh.rank == 1 and passes == 4 else output

    model.get_submodule("transformer.ln_f").register_forward_hook(poison)
    return lambda step: nullcontext()


if __name__ == "__main__":
    plain = loop.train_rank

    def train_rank(job: Any, folder: str, device: str, around: Any, show: bool) -> None:
        plain(job, folder, device, _poisoned, show)

    loop.train_rank = train_rank
    sys.exit(_run(["train", *sys.argv[1:]]))
