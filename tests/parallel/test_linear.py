"""Columns that read one tensor enter their region together: fewer sums, the same gradients, nothing kept alive."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from meshloom.parallel.apply import parallelize
from meshloom.parallel.linear import ColumnParallelLinear
from meshloom.parallel.mesh import Mesh, make_mesh
from meshloom.plan import Plan
from meshloom.synth.world import fake_world


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    """Rank 0 of two, whose sums return what they are given: as if the other rank's part were zero."""
    with fake_world(0, 2):
        yield make_mesh(Plan(tp=2), torch.device("cpu"))


class _Sums(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "_c10d_functional" and "all_reduce" in func.overloadpacket.__name__:
            self.seen["sums"] += 1
        return func(*args, **(kwargs or {}))


def _llama(layers: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


IDS = torch.arange(10).view(2, 5)


def test_a_layer_sums_twice_forward_and_twice_backward(mesh: Mesh) -> None:
    model = parallelize(_llama(layers=3), plan=mesh.plan, mesh=mesh)
    with _Sums() as forward:
        loss = model(input_ids=IDS, labels=IDS).loss
    with _Sums() as backward:
        loss.backward()
    # beside the layers: the embedding and two of the cross-entropy; what the head sends back
    assert (forward.seen["sums"], backward.seen["sums"]) == (2 * 3 + 3, 2 * 3 + 1)


class _Branches(nn.Module):
    """Three linear layers that read one tensor, as query, key and value do."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.before, self.layers = nn.Linear(6, 6), nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.before(x)
        return torch.cat([layer(hidden) for layer in self.layers], dim=-1)


def _pair(mesh: Mesh, bias: bool, input_major: bool) -> tuple[_Branches, _Branches]:
    """The same branches, by plain layers and by columns."""
    torch.manual_seed(1)
    plain = [nn.Linear(6, out, bias=bias) for out in (4, 3, 5)]
    columns: list[nn.Module] = []
    for layer in plain:
        weight = layer.weight.detach().t().contiguous() if input_major else layer.weight.detach().clone()
        bias_ = layer.bias.detach().clone() if bias else None
        columns.append(ColumnParallelLinear(weight, bias_, mesh.groups["tp"], input_major))
    single, cut = _Branches([*plain]).double(), _Branches(columns).double()
    cut.before.load_state_dict(single.before.state_dict())
    return single, cut


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("input_major", [True, False])
@pytest.mark.parametrize("frozen", [(), (0,), (1,), (0, 1, 2)])
def test_gradients_are_those_of_plain_layers(mesh: Mesh, bias: bool, input_major: bool, frozen: tuple[int]) -> None:
    single, cut = _pair(mesh, bias, input_major)
    for number in frozen:
        cut.layers[number].requires_grad_(False)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    scale = torch.randn(2, 3, 12, dtype=torch.float64)
    for model in (single, cut):
        (model(x) * scale).sum().backward()
    torch.testing.assert_close(single(x), cut(x), rtol=1e-12, atol=1e-12)
    for expected, got in zip(single.before.parameters(), cut.before.parameters(), strict=True):
        assert got.grad is not None
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-12, atol=1e-12)
    for number, (plain, column) in enumerate(zip(single.layers, cut.layers, strict=True)):
        for name, parameter in column.named_parameters():
            if number in frozen:
                assert parameter.grad is None
                continue
            expected_grad = plain.get_parameter(name).grad
            assert parameter.grad is not None
            assert expected_grad is not None
            expected_grad = expected_grad.t() if input_major and name == "weight" else expected_grad
            torch.testing.assert_close(parameter.grad, expected_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("used", [0, 1])
def test_a_column_whose_output_nobody_uses(mesh: Mesh, used: int) -> None:
    single, cut = _pair(mesh, bias=True, input_major=False)
    for model in (single, cut):
        hidden = model.before(torch.ones(2, 6, dtype=torch.float64))
        outs = [layer(hidden) for layer in model.layers]
        outs[used].square().sum().backward()
    torch.testing.assert_close(cut.before.weight.grad, single.before.weight.grad, rtol=1e-12, atol=1e-12)


def test_an_input_changed_in_place_enters_anew(mesh: Mesh) -> None:
    single, cut = _pair(mesh, bias=True, input_major=False)
    for model in (single, cut):
        hidden = model.before(torch.ones(2, 6, dtype=torch.float64)) * 1
        first = model.layers[0](hidden.clone())
        (first.sum() + model.layers[1](hidden.mul_(3)).sum() + model.layers[2](hidden).sum()).backward()
    torch.testing.assert_close(cut.before.weight.grad, single.before.weight.grad, rtol=1e-12, atol=1e-12)


def test_recomputed_activations_give_the_same_gradients(mesh: Mesh) -> None:
    grads = []
    for recompute in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = parallelize(_llama(), plan=mesh.plan, mesh=mesh).train()
        if recompute is not None:
            model.gradient_checkpointing_enable(recompute)
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for other in grads[1:]:
        for expected, got in zip(grads[0], other, strict=True):
            torch.testing.assert_close(got, expected)


def test_the_input_may_be_what_is_recomputed_from(mesh: Mesh) -> None:
    """The region's entry outlives the forward on its input, and must not be taken for the recomputed one."""
    grads = []
    for recompute in (False, True):
        _, cut = _pair(mesh, bias=True, input_major=False)

        def branches(hidden: Tensor, cut: _Branches = cut) -> Tensor:
            return torch.cat([layer(hidden) for layer in cut.layers], dim=-1)

        hidden = cut.before(torch.ones(2, 6, dtype=torch.float64))
        if recompute:
            out = torch.utils.checkpoint.checkpoint(branches, hidden, use_reentrant=False)
        else:
            out = branches(hidden)
        out.square().sum().backward()
        grads.append([parameter.grad for parameter in cut.parameters()])
    for expected, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_under_autocast(mesh: Mesh) -> None:
    single, cut = _pair(mesh, bias=True, input_major=False)
    single, cut = single.float(), cut.float()
    x = torch.randn(2, 3, 6)
    for model in (single, cut):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
    torch.testing.assert_close(cut.before.weight.grad, single.before.weight.grad, rtol=0.02, atol=0.02)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it
def test_a_compiler_sees_through_a_cut_layer(mesh: Mesh) -> None:
    model = parallelize(_llama(layers=1), plan=mesh.plan, mesh=mesh)
    model(input_ids=IDS, labels=IDS).loss.backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    layer = model.model.layers[0]
    layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.parametrize("leaf", [True, False])
def test_nothing_is_kept_alive(mesh: Mesh, leaf: bool) -> None:
    _, cut = _pair(mesh, bias=True, input_major=False)
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    hidden = x if leaf else cut.before(x)
    out = torch.cat([layer(hidden) for layer in cut.layers], dim=-1)
    out.sum().backward()
    alive = weakref.ref(hidden)
    del x, hidden, out
    gc.collect()
    assert alive() is None
