"""The graph of a step: ops, the tensors they make and the communication between them, or modules with counts. No torch.

`step_graph` only computes; `place.py` lays out, `draw.py` draws. Host scopes are left out: what encloses an op is told
by its module. Chakra names no tensors, so a tensor stands for what one node gives to those that depend on its data;
parameters and inputs, which nothing in the trace has written, are not seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import msgspec
import networkx as nx

from meshloom.chakra.check import Finding
from meshloom.chakra.summary import comm_kind
from meshloom.chakra.trace import Node, NodeType, Trace
from meshloom.errors import UsageError

Collapse = Literal["auto", "op", "module"]

READABLE_OPS = 400  # more are gathered by module unless ops are asked for
MAX_OPS = 4000  # more are gathered by module even then
MAX_ROWS = 60  # modules; more are gathered to fewer parts of their path
ITEMSIZE = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2, "int8": 1,
            "uint8": 1, "bool": 1, "complex64": 8, "complex128": 16}  # fmt: skip
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")  # what XML cannot hold


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which part of a step: a phase, the numbered layers from `layers[0]` to `layers[1]`, only communication and what
    touches it."""

    phase: str | None = None
    layers: tuple[int, int] | None = None
    comm: bool = False


def step_graph(
    trace: Trace,
    *,
    choice: Choice | None = None,
    collapse: Collapse = "auto",
    depth: int = 3,
    findings: Iterable[Finding] = (),
) -> nx.DiGraph:
    """The chosen part of a trace as a graph; nodes by op, or by module and phase where that is too many to read.

    Nodes carry kind (op, communication, tensor), label, name, module, phase, num_ops, flops, bytes and fault (what
    `check` found there); edges carry kind (data, communication, order). The graph's `level` is op or module, its
    `notes` tell what was left out or gathered. Raises UsageError where nothing is left.
    """
    choice = choice or Choice()
    work = {node.id: node for node in trace.nodes if is_work(node)}
    notes: list[str] = []
    kept = _chosen(work, choice)
    if work and not kept:
        raise UsageError(f"expected a part of the step that holds something, got none for {_spelled(choice, work)}")
    needs, ordered = _needs(work)
    if ordered:
        notes.append("no data dependencies in this trace: the lines are its order")
    needs = _without_detours(contracted(needs, kept), needs)
    level = "op" if collapse == "op" or (collapse == "auto" and len(kept) <= READABLE_OPS) else "module"
    if level == "op" and len(kept) > MAX_OPS:
        level = "module"
    chosen = [work[number] for number in kept]
    named = any(node.get("module") for node in chosen)
    if level == "module" and collapse != "module":
        by = "by module" if named else "by name"
        notes.append(f"{len(kept):,} ops are too many to read: gathered {by}, with counts")
    if level == "module" and chosen and not named:
        notes.append("the trace names no modules")
    faults = _faults(findings, notes, work)
    if level == "op":
        graph = _op_graph(chosen, needs, faults, "order" if ordered else "data")
    else:
        graph = _module_graph(chosen, needs, faults, depth, named)
    if not work:
        notes.append("this trace holds no work")
    graph.graph.update(level=level, title=clean(title(trace)), notes=clean(" · ".join(notes)), writer="meshloom")
    return graph


def title(trace: Trace) -> str:
    """The trace in words: model and plan where it tells them, rank."""
    plan = trace.get("plan")
    return f"{trace.get('model') or 'one step'}, {f'plan {plan}, ' if plan else ''}rank {trace.rank}"


def clean(text: str) -> str:
    """The text without characters that XML and terminals cannot hold."""
    return _CONTROL.sub("\ufffd", str(text))


def is_work(node: Node) -> bool:
    """Whether a node moves or computes something: no host scope, no metadata."""
    return node.is_comm or (
        node.type in (NodeType.COMP, NodeType.MEM_LOAD, NodeType.MEM_STORE) and node.get("op_class") != "host"
    )


def known_cost(node: Node, name: str) -> int:
    """A node's FLOPs or bytes; 0 for 1, which traces hold where nobody knows it, because simulators divide by it."""
    value = int(node.get(name, 0))
    return value if value > 1 else 0


def layer_of(module: str) -> int | None:
    """The number of the layer that a module's path names first, None if it names none."""
    return next((int(part) for part in module.split(".") if part.isdecimal()), None)


def _chosen(work: Mapping[int, Node], choice: Choice) -> dict[int, None]:
    kept: dict[int, None] = {}
    for number, node in work.items():
        if choice.phase is not None and (node.get("phase") or "other") != choice.phase:
            continue
        if choice.layers is not None:
            layer = layer_of(str(node.get("module", "")))
            if layer is None or not choice.layers[0] <= layer <= choice.layers[1]:
                continue
        kept[number] = None
    if not choice.comm:
        return kept
    needed = {need for number in kept if work[number].is_comm for need in work[number].data_deps}
    return {
        number: None
        for number in kept
        if work[number].is_comm
        or number in needed
        or any(need in kept and work[need].is_comm for need in work[number].data_deps)
    }


def _spelled(choice: Choice, work: Mapping[int, Node]) -> str:
    parts = []
    if choice.phase is not None:
        phases = sorted({str(node.get("phase") or "other") for node in work.values()})
        parts.append(f"--phase {choice.phase} (the trace has {', '.join(phases)})")
    if choice.layers is not None:
        numbers = {layer_of(str(node.get("module", ""))) for node in work.values()} - {None}
        held = f"layers {min(numbers)} to {max(numbers)}" if numbers else "no numbered modules"  # type: ignore[type-var]
        parts.append(f"--layers {choice.layers[0]}-{choice.layers[1]} (the trace has {held})")
    if choice.comm:
        parts.append("--comm (what is left has no communication)")
    return ", ".join(parts)


def _needs(work: Mapping[int, Node]) -> tuple[dict[int, list[int]], bool]:
    """What each node needs, and whether that is only its order, because the trace has no data dependencies."""
    data = {number: [need for need in node.data_deps if need in work] for number, node in work.items()}
    if any(data.values()):
        return data, False
    order = {number: [need for need in node.ctrl_deps if need in work] for number, node in work.items()}
    return order, any(order.values())


def contracted(needs: Mapping[int, Sequence[int]], kept: Mapping[int, None]) -> dict[int, list[int]]:
    """What each kept node needs, where a way that leads over nodes left out counts as one step.

    Nodes come after what they need, or the way through them is not followed.
    """
    nearest: dict[int, dict[int, None]] = {}
    found: dict[int, list[int]] = {}
    for number, needed in needs.items():
        reached: dict[int, None] = {}
        for need in needed:
            if need in kept:
                reached[need] = None
            else:
                reached.update(nearest.get(need, {}))
        reached.pop(number, None)
        if number in kept:
            found[number] = list(reached)
        else:
            nearest[number] = reached
    return found


def _without_detours(found: dict[int, list[int]], direct: Mapping[int, list[int]]) -> dict[int, list[int]]:
    """What leads over nodes left out, less what a longer way implies; direct needs all stay."""
    graph = nx.DiGraph([(need, number) for number, needed in found.items() for need in needed])
    if all(found[number] == direct[number] for number in found) or not nx.is_directed_acyclic_graph(graph):
        return found
    if len(graph) > MAX_OPS:
        return found
    needed_edges = nx.transitive_reduction(graph).edges
    return {
        number: [need for need in needed if need in direct[number] or (need, number) in needed_edges]
        for number, needed in found.items()
    }


def _faults(findings: Iterable[Finding], notes: list[str], work: Mapping[int, Node]) -> dict[int, str]:
    found: dict[int, str] = {}
    elsewhere = 0
    for finding in findings:
        if finding.node is not None and finding.node in work:
            known = found.get(finding.node)
            found[finding.node] = f"{known}; {finding.code}" if known else f"{finding.code}: {finding.message}"
        else:
            elsewhere += 1
    if found:
        notes.append(f"check finds faults at {len(found):,} nodes: they are marked")
    if elsewhere:
        notes.append(f"check finds {elsewhere:,} faults that no node here stands for")
    return found


def _op_graph(nodes: list[Node], needs: Mapping[int, list[int]], faults: Mapping[int, str], kind: str) -> nx.DiGraph:
    graph = nx.DiGraph()
    used = {need for needed in needs.values() for need in needed}
    for node in nodes:
        key = str(node.id)
        module = str(node.get("module", ""))
        graph.add_node(
            key,
            kind="communication" if node.is_comm else "op",
            label=clean(_comm_label(node) if node.is_comm else node.name.removeprefix("aten::")),
            name=clean(node.name),
            module=clean(module),
            phase=clean(str(node.get("phase") or "other")),
            num_ops=1,
            flops=0 if node.is_comm else known_cost(node, "num_ops"),
            bytes=int(node.get("comm_size", 0)) if node.is_comm else known_cost(node, "tensor_size"),
            fault=clean(faults.get(node.id, "")),
        )
        shapes = _shapes(node)
        gives = node.is_comm and node.type != NodeType.COMM_SEND
        if kind == "data" and (shapes or gives or node.id in used):
            graph.add_node(f"t{key}", **_tensor_facts(node, shapes))
            graph.add_edge(key, f"t{key}", kind="communication" if node.is_comm else "data")
    for node in nodes:
        for need in needs.get(node.id, ()):
            source = f"t{need}" if f"t{need}" in graph else str(need)
            red = node.is_comm or graph.nodes[str(need)]["kind"] == "communication"
            graph.add_edge(source, str(node.id), kind="communication" if red else kind)
    return graph


def _comm_label(node: Node) -> str:
    if node.type == NodeType.COMM_COLL:
        return comm_kind(node) + (f" ({node.get('comm_axis')})" if node.get("comm_axis") else "")
    other = ("to", "comm_dst") if node.type == NodeType.COMM_SEND else ("from", "comm_src")
    return f"{comm_kind(node)} {other[0]} rank {node.get(other[1], '?')}"


def _shapes(node: Node) -> list[list[int]]:
    try:
        return msgspec.json.decode(str(node.get("output_shapes", "[]")), type=list[list[int]])
    except msgspec.MsgspecError:  # another writer's, in a form of its own
        return []


def result_bytes(node: Node) -> int:
    """Bytes of what a node gives to others: of its outputs as far as their type is known."""
    if node.is_comm:
        return int(node.get("comm_output_size", node.get("comm_size", 0)))
    return sum(prod(shape) for shape in _shapes(node)) * ITEMSIZE.get(str(node.get("dtype", "")), 0)


def _tensor_facts(node: Node, shapes: list[list[int]]) -> dict[str, Any]:
    dtype, size = str(node.get("dtype", "")), result_bytes(node)
    if len(shapes) > 1:
        label = f"{len(shapes)} tensors"
    elif shapes:
        label = "×".join(map(str, shapes[0])) or "scalar"
    else:
        label = si(size, "B") if size else "result"
    return {
        "kind": "tensor",
        "label": clean(f"{label} {dtype}".strip()),
        "name": clean(f"result of {node.name}: {shapes}" if shapes else f"result of {node.name}"),
        "module": clean(str(node.get("module", ""))),
        "phase": clean(str(node.get("phase") or "other")),
        "num_ops": 0,
        "flops": 0,
        "bytes": size,
        "fault": "",
    }


def _module_graph(
    nodes: list[Node], needs: Mapping[int, list[int]], faults: Mapping[int, str], depth: int, named: bool
) -> nx.DiGraph:
    while depth > 1 and len({_part(node, depth, named) for node in nodes}) > MAX_ROWS:
        depth -= 1
    graph = nx.DiGraph()
    home: dict[int, str] = {}
    for node in nodes:
        phase, module = clean(str(node.get("phase") or "other")), _part(node, depth, named)
        kind = "communication" if node.is_comm else "op"
        label = clean(_comm_label(node)) if node.is_comm else module or "outside all modules"
        home[node.id] = key = f"{phase} {kind} {module}" + (f" {label}" if node.is_comm else "")
        if key not in graph:
            graph.add_node(key, kind=kind, label=label, name=module or label, module=module, phase=phase, num_ops=0,
                           flops=0, bytes=0, fault="")  # fmt: skip
        facts = graph.nodes[key]
        facts["num_ops"] += 1
        facts["flops"] += 0 if node.is_comm else known_cost(node, "num_ops")
        facts["bytes"] += int(node.get("comm_size", 0)) if node.is_comm else known_cost(node, "tensor_size")
        if node.id in faults and not facts["fault"]:
            facts["fault"] = clean(faults[node.id])
    for number, needed in needs.items():
        for need in needed:
            source, target = home[need], home[number]
            if source != target:
                red = "communication" in (graph.nodes[source]["kind"], graph.nodes[target]["kind"])
                graph.add_edge(source, target, kind="communication" if red else "data")
    return graph


def _part(node: Node, depth: int, named: bool) -> str:
    if not named:
        return clean("" if node.is_comm else short_name(node.name))
    return clean(".".join(str(node.get("module", "")).split(".")[:depth]))


def short_name(name: str) -> str:
    """A kernel's name without return type, template arguments and parameters: `vectorized_elementwise_kernel`."""
    inside = re.fullmatch(r"cutlass::Kernel2?<(\w+)>.*", name.removeprefix("void "))
    if inside:
        return inside[1]
    bare = re.split(r"[<(]", name.removeprefix("void ").replace("(anonymous namespace)::", ""), maxsplit=1)[0].strip()
    return bare.rpartition("::")[2] or name if "kernel" in bare.lower() or "<" in name else bare or name


def si(value: float, unit: str) -> str:
    """A number with a unit's prefix: 1.5 GB."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.1f} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def part_of(trace: Trace, choice: Choice) -> Trace:
    """The chosen part of a trace as a trace of its own: what leads over nodes left out becomes one dependency."""
    if choice == Choice():
        return trace
    nodes = {node.id: node for node in trace.nodes if is_work(node)}
    kept = _chosen(nodes, choice)
    if nodes and not kept:
        raise UsageError(f"expected a part of the step that holds something, got none for {_spelled(choice, nodes)}")
    every = list(trace.nodes)
    data = contracted({node.id: node.data_deps for node in every}, kept)
    control = contracted({node.id: [*node.data_deps, *node.ctrl_deps] for node in every}, kept)
    parts = [
        msgspec.structs.replace(
            nodes[number],
            data_deps=data[number],
            ctrl_deps=[need for need in control[number] if need not in set(data[number])],
        )
        for number in kept
    ]
    return Trace(nodes=parts, attrs=trace.attrs, version=trace.version)
