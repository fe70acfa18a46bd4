"""Where a rank's time went, as text: for each phase, module, op and kernel how often and how long, longest first."""

from __future__ import annotations

from collections.abc import Iterator

from meshloom.chakra.trace import Node, Trace

_FACTS = ("rank", "world_size", "step", "num_steps", "plan", "model")
_HEADER = f"{'device_us':>12} {'host_us':>12} {'count':>8}  phase > module > op > kernel"


def stacks(trace: Trace) -> str:
    """The table as text; times are each node's own, in microseconds, scopes without what they enclose.

    A kernel stands behind the op that launched it, which the record-function id tells.
    """
    nodes = list(trace.nodes)
    ops = {rf_id: node.name for node in nodes if node.get("is_cpu_op") and (rf_id := node.get("rf_id"))}
    rows: dict[str, tuple[int, int, int]] = {}  # stack -> device ns, host ns, count
    for node in nodes:
        key = " > ".join(_parts(node, ops))
        device, host, count = rows.get(key, (0, 0, 0))
        on_device = node.get("stream") is not None
        rows[key] = device + node.duration_ns * on_device, host + node.duration_ns * (not on_device), count + 1
    facts = " ".join(f"{name}={trace.get(name)}" for name in _FACTS if trace.get(name) is not None)
    lines = [f"# {facts}: {len(nodes):,} nodes", _HEADER]
    for key, (device, host, count) in sorted(rows.items(), key=lambda row: (row[1][0], row[1][1]), reverse=True):
        lines.append(f"{device / 1000:>12.1f} {host / 1000:>12.1f} {count:>8}  {key}")
    return "\n".join(lines) + "\n"


def most_expensive(trace: Trace, count: int = 25) -> str:
    """The `count` names that took the most time of their own, longest first, with their share of it, as text.

    On a device its kernels and communication are counted, without one the host's ops; scopes are no work.
    """
    work = [node for node in trace.nodes if node.get("op_class") != "host" or node.is_comm]
    placed = [node for node in work if node.get("stream") is not None] or work
    rows: dict[str, tuple[int, int]] = {}  # name -> ns, count
    for node in placed:
        length, times = rows.get(node.name, (0, 0))
        rows[node.name] = length + node.duration_ns, times + 1
    total = sum(length for length, _ in rows.values())
    facts = " ".join(f"{name}={trace.get(name)}" for name in _FACTS if trace.get(name) is not None)
    lines = [f"# {facts}: {total / 1000:,.1f} us in {len(placed):,} ops of {len(rows)} names"]
    lines.append(f"{'us':>12} {'share':>7} {'count':>7} {'us each':>10}  op")
    longest = sorted(rows.items(), key=lambda row: (-row[1][0], row[0]))
    for name, (length, times) in longest[:count]:
        share = length / max(1, total)
        lines.append(f"{length / 1000:>12.1f} {share:>7.1%} {times:>7} {length / 1000 / times:>10.1f}  {name}")
    rest = sum(length for _, (length, _) in longest[count:])
    if rest:
        lines.append(f"{rest / 1000:>12.1f} {rest / max(1, total):>7.1%} {'':>7} {'':>10}  everything else")
    return "\n".join(lines) + "\n"


def _parts(node: Node, ops: dict[int, str]) -> Iterator[str]:
    yield node.get("phase") or "-"
    yield node.get("module") or "-"
    launcher = ops.get(node.get("rf_id", 0))
    if node.get("stream") is not None and launcher is not None:
        yield launcher
    yield node.name
