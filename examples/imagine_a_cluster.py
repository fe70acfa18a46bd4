"""Synthesise a small Llama on eight ranks that are not there, check the traces, and predict the step on 8 H100s."""

from __future__ import annotations

from transformers import LlamaConfig

from meshloom import Cluster, Plan, check, synthesise
from meshloom.hardware.cluster import load_cluster
from meshloom.simulate.engine import simulate


def main() -> None:
    """A laptop needs a few seconds for this."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=1000,
    )  # fmt: skip
    traces = synthesise(config, "causal", plan=Plan.parse("tp2.dp4"), micro_batch=2, seq_length=64)
    assert check(traces) == []
    cluster: Cluster = load_cluster("h100x8")
    timeline = simulate(traces, cluster)
    for share in timeline.shares():
        exposed = share.exposed_communication_ns / timeline.makespan_ns
        print(f"rank {share.rank}: step {timeline.makespan_ns / 1e6:.3f} ms, exposed communication {exposed:.1%}")


if __name__ == "__main__":
    main()
