"""What is synthesised: the model of a config or one written by hand; and what is told if its forward needs data."""

from __future__ import annotations

import copy
import linecache
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from meshloom.errors import ModelError
from meshloom.model.build import build_model
from meshloom.model.config import Objective
from meshloom.parallel.answers import NEEDS_DATA
from meshloom.parallel.fake import fake_copy

_NOT_THE_MODEL = (str(Path(torch.__file__).parent), str(Path(__file__).resolve().parents[1]))  # torch, and ourselves


def build(subject: Any, objective: Objective, *, device: str = "cpu") -> nn.Module:
    """The model without data: on meta, or of fake tensors within a FakeTensorMode.

    `subject` is a config, or a model whose forward takes input_ids and labels and returns what has a loss; that one is
    left as it is. Raises ModelError.
    """
    if not isinstance(subject, nn.Module):
        return build_model(subject, objective, seed=0, device=device)
    modes = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, FakeTensorMode)]
    if modes:
        return fake_copy(subject, modes[-1]).train()
    memo: dict[int, Any] = {}
    for parameter in subject.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to(device), parameter.requires_grad)
    for buffer in subject.buffers():
        memo[id(buffer)] = buffer.detach().to(device)
    return copy.deepcopy(subject, memo).train()


@contextmanager
def without_data() -> Iterator[None]:
    """Within this, a forward that asks for values raises ModelError with the line where it does."""
    try:
        yield
    except NEEDS_DATA as error:
        raise ModelError(
            f"{_line_of(error.__traceback__)}: the forward decides by the values of a tensor, and synthesis has none "
            f"({str(error).splitlines()[0]}); let it decide by shapes or settings, or give the op a result of known "
            "shape (torch.where, a mask); or record a real step with `meshloom train --trace`"
        ) from error


def _line_of(trace: TracebackType | None) -> str:
    """`file:line, in function: code` of the innermost frame that is the model's."""
    found = "the model"
    while trace is not None:
        code = trace.tb_frame.f_code
        if not code.co_filename.startswith(_NOT_THE_MODEL):
            text = linecache.getline(code.co_filename, trace.tb_lineno).strip()
            found = f"{code.co_filename}:{trace.tb_lineno}, in {code.co_name}: `{text}`"
        trace = trace.tb_next
    return found
