"""The nouns of the closed-form model: a transformer's dims (`Shape`) and what is asked of it (`Job`). No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from meshloom.errors import PlanError
from meshloom.hardware.cluster import Cluster
from meshloom.plan import Plan
from meshloom.simulate.stack import Stack


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A mixture in the place of the MLP: each token goes through `per_token` of `count` gated experts of `width`, and
    through shared ones of `shared_width` together. `num_dense_layers` have a plain MLP, wherever they stand. Routing is
    taken as even."""

    count: int
    per_token: int
    width: int
    shared_width: int = 0
    num_dense_layers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Dims of a decoder (or encoder) of equal layers, under the names of Hugging Face's configs.

    `gated`: the MLP has a gate beside its up projection (Llama). `tied`: input and output embeddings are one.
    `head_width`: of a head, where it is not hidden / heads. `experts`: a mixture of experts (Mixtral, Qwen-MoE).
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
    head_width: int = 0
    experts: Experts | None = None

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.head_width or self.hidden_size // self.num_heads

    @property
    def attention_linears(self) -> tuple[tuple[int, int], ...]:
        """(output, input) widths of the products around attention: q·k·v, output."""
        heads = self.num_heads * self.head_dim
        return (heads + 2 * self.num_kv_heads * self.head_dim, self.hidden_size), (self.hidden_size, heads)

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(output, input) widths of the products of a layer with a plain MLP: q·k·v, output, up (and gate), down."""
        up = self.intermediate_size * (2 if self.gated else 1)
        return (*self.attention_linears, (up, self.hidden_size), (self.hidden_size, self.intermediate_size))

    @property
    def dense_share(self) -> float:
        """The part of the layers that have a plain MLP."""
        return 1.0 if self.experts is None else self.experts.num_dense_layers / self.num_layers

    @property
    def cut_widths(self) -> tuple[int, ...]:
        """The widths that tensor parallelism cuts in the MLP."""
        if self.experts is None:
            return (self.intermediate_size,)
        dense = (self.intermediate_size,) if self.experts.num_dense_layers else ()
        return (*dense, self.experts.width, *((self.experts.shared_width,) if self.experts.shared_width else ()))

    def alike(self, *, dense: bool) -> Shape:
        """The shape as if all its layers had a plain MLP, or none had."""
        if self.experts is None:
            return self
        return replace(self, experts=None if dense else replace(self.experts, num_dense_layers=0))

    @property
    def active_width(self) -> float:
        """The MLP's width that a token meets, on the average of the layers."""
        if self.experts is None:
            return self.intermediate_size
        sparse = self.experts.per_token * self.experts.width + self.experts.shared_width
        return self.dense_share * self.intermediate_size + (1 - self.dense_share) * sparse

    @property
    def active_weights(self) -> float:
        """Weights of a layer's products that a token meets, on the average of the layers."""
        attention = sum(out * inner for out, inner in self.attention_linears)
        router = 0.0 if self.experts is None else (1 - self.dense_share) * self.experts.count * self.hidden_size
        return attention + (3 if self.gated else 2) * self.active_width * self.hidden_size + router

    def _parameters_of_layer(self) -> int:
        """Of a layer with a plain MLP: its products, two norms, and biases where there is no gate (GPT)."""
        weights = sum(out * inner for out, inner in self.linears)
        biases = 0 if self.gated else sum(out for out, _ in self.linears)
        return weights + biases + (2 if self.gated else 4) * self.hidden_size

    @property
    def layer_parameters(self) -> float:
        """Parameters of one layer, on the average of the layers; all experts count."""
        dense = self._parameters_of_layer()
        if self.experts is None:
            return dense
        experts, hidden, num_products = self.experts, self.hidden_size, 3 if self.gated else 2
        mixture = num_products * hidden * (experts.count * experts.width + experts.shared_width)
        mixture += experts.count * hidden + (hidden if experts.shared_width else 0)  # router, gate of the shared
        sparse = dense - num_products * hidden * self.intermediate_size + mixture
        return self.dense_share * dense + (1 - self.dense_share) * sparse

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model."""
        embeddings = (1 if self.tied else 2) * self.vocab_size * self.hidden_size
        layers = round(self.num_layers * self.layer_parameters)
        return layers + embeddings + self.learned_positions * self.hidden_size

    @property
    def num_active_parameters(self) -> int:
        """Parameters that a token meets: of the experts those that it is sent to."""
        if self.experts is None:
            return self.num_parameters
        asleep = (3 if self.gated else 2) * self.hidden_size * self.experts.width
        asleep *= (self.experts.count - self.experts.per_token) * (self.num_layers - self.experts.num_dense_layers)
        return self.num_parameters - asleep

    def model_flops(self, seq_length: int) -> float:
        """FLOPs of one sequence, forward and backward, no recomputation: Narayanan et al. 2021, equation 3 without
        the recomputed third, for any MLP and number of key-value heads; of a mixture the experts that a token meets."""
        weights = self.active_weights * self.num_layers
        scores = 2 * self.num_layers * seq_length * self.num_heads * self.head_dim
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
