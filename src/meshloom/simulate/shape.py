"""The nouns of the closed-form model: a transformer's dims (`Shape`) and what is asked of it (`Job`). No torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from meshloom.errors import PlanError
from meshloom.hardware.cluster import Cluster
from meshloom.plan import Plan
from meshloom.simulate.stack import Stack


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Dims of a dense decoder (or encoder) of equal layers, under the names of Hugging Face's configs.

    `gated`: the MLP has a gate beside its up projection (Llama). `tied`: input and output embeddings are one.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    gated: bool = False
    tied: bool = True
    learned_positions: int = 0

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(output, input) widths of a layer's products: q·k·v, attention output, up (and gate), down."""
        qkv = self.hidden_size + 2 * self.num_kv_heads * self.head_dim
        up = self.intermediate_size * (2 if self.gated else 1)
        return (
            (qkv, self.hidden_size),
            (self.hidden_size, self.hidden_size),
            (up, self.hidden_size),
            (self.hidden_size, self.intermediate_size),
        )

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer: its products, two norms, and biases where there is no gate (GPT)."""
        weights = sum(out * inner for out, inner in self.linears)
        biases = 0 if self.gated else sum(out for out, _ in self.linears)
        return weights + biases + (2 if self.gated else 4) * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model."""
        embeddings = (1 if self.tied else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * self.layer_parameters + embeddings + self.learned_positions * self.hidden_size

    def model_flops(self, seq_length: int) -> float:
        """FLOPs of one sequence, forward and backward, no recomputation: Narayanan et al. 2021, equation 3 without
        the recomputed third, for any MLP and number of key-value heads."""
        weights = sum(out * inner for out, inner in self.linears) * self.num_layers
        scores = 2 * self.num_layers * seq_length * self.hidden_size
        return 6.0 * seq_length * (weights + scores + self.vocab_size * self.hidden_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training step: a model, a plan, a batch, the software that runs it and the cluster below.

    `global_batch` sequences of `seq_length` tokens a step. `zero_stage` shards optimizer states (1), gradients (2)
    and parameters (3) over dp. `dtype` is that of the products, as a device file names it.
    """

    shape: Shape
    plan: Plan
    cluster: Cluster
    stack: Stack
    seq_length: int
    global_batch: int
    zero_stage: int = 0
    dtype: str = "bfloat16"

    @property
    def micro_batch(self) -> int:
        """Sequences of a micro-batch on one replica; raises PlanError if the batch does not divide."""
        parts = self.plan.dp * self.plan.num_micro_batches
        if self.global_batch % parts:
            raise PlanError(
                f"plan {self.plan}: expected a global batch that dp{self.plan.dp} × {self.plan.num_micro_batches} "
                f"micro-batches divide, got {self.global_batch}"
            )
        return self.global_batch // parts

    @property
    def half(self) -> str:
        """The dtype of what is not quantised: attention and logits."""
        return self.dtype if self.dtype in ("float32", "float16") else "bfloat16"

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one rank of cp."""
        return self.micro_batch * self.seq_length // self.plan.cp

    def check(self) -> None:
        """Raise PlanError or HardwareError where the model or the cluster cannot take the plan."""
        plan, shape = self.plan, self.shape
        if shape.num_heads % plan.tp:
            raise PlanError(f"plan {plan}: expected tp to divide {shape.num_heads} heads, got tp{plan.tp}")
        if plan.pp * plan.virtual_stages > shape.num_layers + 2:  # embedding and logits may count as layers
            raise PlanError(f"plan {plan}: expected at most {shape.num_layers} stages for as many layers")
        if self.seq_length % plan.cp:
            raise PlanError(f"plan {plan}: expected cp to divide the sequence of {self.seq_length}, got cp{plan.cp}")
        self.cluster.check_fits(plan.world_size)
        _ = self.micro_batch

    @property
    def padded_vocab(self) -> int:
        """The vocabulary after padding to `stack.vocab_multiple` × tp (Megatron-LM pads to 128 · tp)."""
        multiple = self.stack.vocab_multiple * self.plan.tp
        return ceil(self.shape.vocab_size / multiple) * multiple
