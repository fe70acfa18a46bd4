"""What is made again without asking an op is what the op gives; storages are told from one another while they live."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from meshloom.parallel.fake import tensors_among
from meshloom.synth import dispatch
from meshloom.synth.known import as_kernels_lay_it, results_of, signature
from meshloom.synth.memory import Memory
from meshloom.synth.roles import find_roles
from meshloom.synth.wide import fill, wide, wide_all
from tests.synth.steps import step

aten: Any = torch.ops.aten


class _Twice(TorchDispatchMode):
    """Makes the results of every op again from what it gave, and holds them to those of the op asked once more."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[str] = []
        self.asked: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        seen = signature(func, args, kwargs) if func.namespace == "aten" else None
        tensors = [] if seen is None else seen[1]
        before = [tensor.shape for tensor in tensors]
        out = func(*args, **kwargs)
        results = None if seen is None else results_of(func, tensors, before, out)
        if results is None:
            self.asked.append(func.overloadpacket.__name__)
            return out
        self.made.append(func.overloadpacket.__name__)
        again = results.make(tensors)
        assert type(again) is type(out)
        for mine, theirs in zip(tensors_among((again,)), tensors_among((out,)), strict=True):
            assert _read(mine, tensors) == _read(theirs, tensors)
        return again


def _read(tensor: Any, given: list[Tensor]) -> Any:
    address = tensor.untyped_storage()._cdata
    shares = [other.untyped_storage()._cdata == address for other in given]
    is_given = [other is tensor for other in given]
    layout = tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device
    return layout, shares, is_given, tensor.untyped_storage().nbytes(), torch._C._dispatch_key_set(tensor)


def _trained() -> None:
    """A step through views, changes in place, several results, missing gradients, and lists of tensors."""
    model = torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.LayerNorm(8), torch.nn.Dropout(0.1),
                                torch.nn.Linear(8, 12))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):
        query, key, value = model(torch.zeros(2, 4, dtype=torch.long)).split(4, dim=2)
        query, key, value = (part.unflatten(2, (2, 2)).transpose(1, 2) for part in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        (out.transpose(1, 2).reshape(2, 4, 4).bfloat16() @ torch.ones(4, 4).bfloat16().t()).float().sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.empty(3).add_(1)


def test_results_made_again_are_those_of_the_op() -> None:
    watch = _Twice()
    with FakeTensorMode(), watch:
        _trained()
    expected = {"view", "transpose", "split", "addmm", "add_", "native_layer_norm_backward", "_fused_adamw_"}
    assert expected <= {*watch.made}


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.nonzero(),
        lambda x: x.unsqueeze_(0),
        lambda x: x.resize_(7),
        lambda x: torch.tensor(3) + 1,
        lambda x: torch.view_as_complex(x).conj() * 2,
    ],
)
def test_what_depends_on_more_than_shapes_is_asked_each_time(ask: Callable[[Tensor], Tensor]) -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    watch = _Twice()
    with FakeTensorMode(shape_env=ShapeEnv()):
        x = torch.empty(3, 2)
        with watch:
            ask(x)
    assert watch.asked


def test_signatures_tell_numbers_and_shared_memory_apart() -> None:
    with FakeTensorMode():
        x, y = torch.empty(4, 4), torch.empty(4, 4)
        seen = [
            signature(aten.add.Tensor, args, {})
            for args in ((x, 1), (x, 1.0), (x, True), (x, x), (x, y), (x.t(), 1), (x[0], 1), (x[1], 1), (x.double(), 1))
        ]
        keys = [found[0] for found in seen if found is not None]
        assert len(set(keys)) == len(seen)
        again = signature(aten.add.Tensor, (y, x), {})
        assert again is not None
        assert again[0] == keys[4]


@pytest.mark.parametrize(
    ("kind", "plan", "more"),
    [("gpt2", "tp2.pp2", {"precision": "bf16"}), ("llama", "tp2.dp2", {"recompute": "selective"}), ("bert", "dp2", {})],
)
def test_a_trace_is_the_same_if_every_op_is_asked(
    kind: str, plan: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = dict(find_roles(step(kind, plan, 2, layers=2, **dict(more)), stamped=False).traces())
    monkeypatch.setattr(dispatch, "signature", lambda *args: None)
    for rank, trace in find_roles(step(kind, plan, 2, layers=2, **more), stamped=False).traces():
        assert list(trace.nodes) == list(quick[rank].nodes)
        assert trace.attrs == quick[rank].attrs


def test_a_storage_is_released_with_its_last_view_and_its_address_is_another_then() -> None:
    memory = Memory()
    with FakeTensorMode():
        held, new = torch.empty(5), torch.empty(3)
        memory.hold(held.untyped_storage())
        key = memory.key(new.untyped_storage(), is_read=False)
        view = new.view(3, 1)
        del new
        assert (memory.allocated(), memory.released()) == (12, 0)
        assert memory.key(view.untyped_storage(), is_read=False) == key
        other = torch.empty(3)
        memory.alias(other.untyped_storage(), view.untyped_storage())
        del view
        assert memory.released() == 0
        del other, held
        assert (memory.released(), memory.held_bytes, memory.peak_bytes) == (12, 20, 32)
        assert memory.key(torch.empty(3).untyped_storage(), is_read=False) != key


def test_numbers_of_one_width() -> None:
    import numpy as np

    data = np.zeros(9, np.uint8)
    fill(data, np.array([0, 3, 6]), np.array([0, 300, 1 << 20]), 3)
    assert data.tobytes() == wide(0, 3) + wide(300, 3) + wide(1 << 20, 3) == wide_all([0, 300, 1 << 20], 3)
    assert wide(300, 3) == b"\xac\x82\x00"


def test_views_have_the_strides_of_the_kernel() -> None:
    """FakeTensorMode's own view gives others along dims of one element, at which a product looks."""

    def view() -> Tensor:
        return torch.empty_strided((1, 1, 4, 8), (32, 8, 8, 1)).view(1, 1, 32)

    with FakeTensorMode():
        given = torch.empty_strided((1, 1, 4, 8), (32, 8, 8, 1))
        fake = given.view(1, 1, 32)
        laid = as_kernels_lay_it(torch.ops.aten.view.default, (given, [1, 1, 32]), fake)
    assert laid.stride() == view().stride()
    assert laid.untyped_storage()._cdata == given.untyped_storage()._cdata
    assert as_kernels_lay_it(torch.ops.aten.mm.default, (given,), fake) is fake
