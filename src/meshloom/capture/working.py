"""Which op did the work where ops lie within ops. No torch.

Some ops are made of others, as a linear layer of a product. Others only hand on what they were asked: autocast calls
the same op after casting, and what looks on in Python calls it or does not, as where a layer is computed again for its
backward pass and the op's result was kept.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from meshloom.capture.link import Op

_LOOKS_ON = "PythonDispatchMode"  # the scope in which a dispatch mode sees an op; it may run it, or give what was kept

# Ops that others are made of, for host traces that came without a recorder's notes.
_COMPOSITE = frozenset((
    "aten::linear", "aten::matmul", "aten::to", "aten::contiguous", "aten::reshape", "aten::dropout",
    "aten::layer_norm", "aten::softmax", "aten::log_softmax", "aten::cross_entropy_loss",
    "aten::scaled_dot_product_attention", "aten::nll_loss", "aten::nll_loss_nd", "aten::flatten",
    "aten::unflatten", "aten::einsum", "aten::conv1d", "aten::conv2d", "aten::batch_norm", "aten::group_norm",
    "aten::rms_norm", "aten::instance_norm", "aten::max_pool2d", "aten::adaptive_avg_pool2d", "aten::chunk",
    "aten::narrow", "aten::expand_as", "aten::type_as", "aten::square", "aten::std", "aten::var", "aten::tile",
    "aten::repeat_interleave", "aten::pad", "aten::outer", "aten::lstm", "aten::gru", "aten::cosine_similarity",
    "aten::dropout_", "aten::relu6",
))  # fmt: skip


class Working:
    """What is known of the ops of one rank, by their place."""

    def __init__(self, ops: Sequence[Op], noted: Collection[str] | None) -> None:
        self._ops = ops
        self._composite = _COMPOSITE if noted is None else frozenset(noted)
        self._by_name = not any("." in name for name in self._composite)  # as older recorders noted them
        self._hands_on: set[int] = set()
        for op in ops:
            if op.schema or op.name == _LOOKS_ON:
                around = op.parent
                while around >= 0 and not ops[around].schema:
                    around = ops[around].parent
                if around >= 0 and (op.name == _LOOKS_ON or ops[around].schema == op.schema):
                    self._hands_on.add(around)

    def is_whole(self, index: int) -> bool:
        """Whether the op is neither made of others nor hands on what it was asked."""
        op = self._ops[index]
        name = op.name if self._by_name else op.schema.partition("(")[0]
        return name not in self._composite and index not in self._hands_on

    def hands_on(self, index: int) -> bool:
        """Whether others do, or did before, what the op was asked."""
        return index in self._hands_on
