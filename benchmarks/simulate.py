"""How fast the simulator is: a plan in closed form, a step event by event, a search. CPU seconds, one process.

python benchmarks/simulate.py [--write]
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from time import process_time

from meshloom.chakra.file import paused_collection
from meshloom.hardware.cluster import load_cluster
from meshloom.plan import Plan
from meshloom.simulate.advise import advise
from meshloom.simulate.engine import play
from meshloom.simulate.imagined import imagine, simulate_job
from meshloom.simulate.shape import Job, Shape
from meshloom.simulate.stack import STACKS
from meshloom.simulate.step import predict_step
from results import section, write_section

GPT3 = Shape(num_layers=96, hidden_size=12288, intermediate_size=49152, num_heads=96, num_kv_heads=96, vocab_size=51200)


def job(dp: int) -> Job:
    """GPT-3 175B on 64·dp A100s, 96 micro-batches, full recomputation."""
    cluster = replace(load_cluster("a100x1024"), num_hosts=2048)
    plan = Plan(tp=8, pp=8, dp=dp, num_micro_batches=96, recompute="full")
    return Job(
        shape=GPT3, plan=plan, cluster=cluster, stack=STACKS["megatron-2021"], seq_length=2048, global_batch=96 * dp
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    lines = ["| what | CPU seconds |", "|---|---|"]
    begin = process_time()
    closed = predict_step(job(16)).step_s
    lines.append(f"| GPT-3 175B on 1,024 ranks, closed form ({closed:.2f} s a step) | {process_time() - begin:.4f} |")
    for dp in (16, 256):
        begin = process_time()
        timeline = simulate_job(job(dp))
        seconds = process_time() - begin
        lines.append(
            f"| GPT-3 175B on {64 * dp:,} ranks, event by event with its timeline "
            f"({timeline.makespan_ns / 1e9:.2f} s a step, {len(timeline.spans):,} events) | {seconds:.2f} |"
        )
    with paused_collection():
        program = imagine(job(16))
        begin = process_time()
        play(program)
        seconds = process_time() - begin
    lines.append(f"| the engine alone: {len(program.owner) / seconds:,.0f} events/s, one a kernel | {seconds:.2f} |")
    begin = process_time()
    found = advise(GPT3, load_cluster("h100x1024"), global_batch=1536, seq_length=2048)
    seconds = process_time() - begin
    lines.append(
        f"| advise, GPT-3 175B on 1,024 H100: {found.num_priced:,} plans, "
        f"{1e3 * seconds / found.num_priced:.2f} ms each | {seconds:.2f} |"
    )
    print("\n".join(lines))
    if options.write:
        write_section(section("Speed of the simulator", "python benchmarks/simulate.py --write", "\n".join(lines)))


if __name__ == "__main__":
    main()
