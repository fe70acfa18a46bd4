"""What an op costs: floating-point operations and bytes moved, from its name and the shapes of its tensors. No torch.

One table serves captured and synthesised traces, so that both are counted alike. Counts follow
`torch.utils.flop_counter`: a product of (m, k) by (k, n) is 2·m·k·n; attention is its products without the causal
half; its backward recomputes the scores. Everything else is one operation an output element. Fused kernels inside an
op are not seen: bytes are each tensor once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Literal, NamedTuple

Shape = Sequence[int]
OpClass = Literal["gemm", "attention", "memory", "host"]


class Tensor(NamedTuple):
    """A tensor's shape and the size of one element in bytes."""

    shape: tuple[int, ...]
    itemsize: int

    @property
    def num_elements(self) -> int:
        """How many elements it has."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """How many bytes it holds."""
        return prod(self.shape) * self.itemsize


class Cost(NamedTuple):
    """FLOPs, bytes read and written, the class that decides how it is timed, and (batch, m, n, k) of a product."""

    flops: int
    num_bytes: int
    op_class: OpClass
    gemm: tuple[int, int, int, int] | None = None


def _mm(a: Shape, b: Shape) -> tuple[int, int, int, int]:  # (m, k) x (k, n)
    return 1, a[0], b[1], a[1]


def _bmm(a: Shape, b: Shape) -> tuple[int, int, int, int]:  # (b, m, k) x (b, k, n)
    return a[0], a[1], b[2], a[2]


_GEMM: dict[str, tuple[int, Callable[[Shape, Shape], tuple[int, int, int, int]]]] = {
    # name: (index of the first factor among the tensor inputs, dims)
    "aten::mm": (0, _mm),
    "aten::addmm": (1, _mm),
    "aten::_addmm_activation": (1, _mm),
    "aten::bmm": (0, _bmm),
    "aten::baddbmm": (1, _bmm),
}

# Products in an attention kernel: forward q·kᵀ and p·v; backward those of flash attention, which recomputes q·kᵀ.
_ATTENTION = {"forward": 2, "backward": 5}

# Ops that move no tensor data: they return another view, or memory that nobody has written.
HOST_OPS = frozenset(
    [
        "aten::view",
        "aten::_unsafe_view",
        "aten::reshape",
        "aten::_reshape_alias",
        "aten::as_strided",
        "aten::t",
        "aten::transpose",
        "aten::permute",
        "aten::expand",
        "aten::slice",
        "aten::select",
        "aten::narrow",
        "aten::split",
        "aten::split_with_sizes",
        "aten::chunk",
        "aten::unbind",
        "aten::squeeze",
        "aten::unsqueeze",
        "aten::detach",
        "aten::alias",
        "aten::lift_fresh",
        "aten::empty",
        "aten::empty_like",
        "aten::empty_strided",
        "aten::new_empty",
        "aten::new_empty_strided",
        "aten::result_type",
        "aten::resolve_conj",
        "aten::resolve_neg",
        "aten::item",
        "aten::_local_scalar_dense",
        "aten::is_nonzero",
        "aten::numpy_T",
        "aten::unflatten",
        "aten::view_as",
        "aten::set_",
        "aten::resize_",
        "aten::contiguous",
        "aten::to",
        "aten::is_pinned",
        "aten::record_stream",
        "aten::diagonal",
        "aten::movedim",
        "aten::_conj",
        "aten::real",
        "aten::imag",
        "aten::view_as_real",
        "aten::view_as_complex",
        "aten::swapaxes",
        "aten::expand_as",
        "aten::flatten",
        "aten::_nested_tensor_size",
        "detach",
        "_c10d_functional::wait_tensor",
        "_c10d_functional::_wrap_tensor_autograd",
    ]
)

# Ops that read only as many rows of their first input as they write, and ops that only write.
_GATHERS = frozenset(("aten::embedding", "aten::index_select", "aten::gather", "aten::index"))
_FILLS = frozenset(
    (
        "aten::zeros",
        "aten::ones",
        "aten::full",
        "aten::fill_",
        "aten::zero_",
        "aten::arange",
        "aten::zeros_like",
        "aten::ones_like",
        "aten::full_like",
        "aten::scalar_tensor",
    )
)


def cost(op: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Cost:
    """The cost of `op` (a name such as `aten::mm`, without overload) on tensors `inputs` -> `outputs`.

    `outputs` holds what the op writes: new tensors, and those of its inputs that it changes in place.
    """
    if op in HOST_OPS:
        return Cost(0, 0, "host")
    written = sum(tensor.num_bytes for tensor in outputs)
    num_bytes = sum(tensor.num_bytes for tensor in inputs) + written
    if op in _GEMM and len(inputs) > _GEMM[op][0] + 1:
        first, dims = _GEMM[op]
        batch, m, n, k = gemm = dims(inputs[first].shape, inputs[first + 1].shape)
        return Cost(2 * batch * m * n * k, num_bytes, "gemm", gemm)
    if op.startswith("aten::_scaled_dot_product") or op.startswith("aten::_flash_attention"):
        return Cost(_attention_flops(op, inputs), num_bytes, "attention")
    if op in _GATHERS:
        return Cost(sum(tensor.num_elements for tensor in outputs), 2 * written, "memory")
    if op in _FILLS:
        return Cost(sum(tensor.num_elements for tensor in outputs), written, "memory")
    # a reduction works on what it reads, an optimizer over many tensors on all that it writes
    elements = max((tensor.num_elements for tensor in inputs), default=0)
    elements = max(elements, sum(tensor.num_elements for tensor in outputs))
    return Cost(elements, num_bytes, "memory" if num_bytes else "host")


def _attention_flops(op: str, inputs: Sequence[Tensor]) -> int:
    backward = op.endswith("backward")
    query, key = (inputs[1], inputs[2]) if backward else (inputs[0], inputs[1])  # (B, H, S, D)
    if len(query.shape) < 4 or len(key.shape) < 4:
        return 0
    batch, heads, length, width = query.shape[-4:]
    return _ATTENTION["backward" if backward else "forward"] * 2 * batch * heads * length * key.shape[-2] * width
