"""Fits the curves of the shipped devices to measured kernels, and says how well they fit.

    python benchmarks/calibrate.py DIR [--write] [--device NAME] [--judge]

DIR holds `gemm_bf16_*.csv.gz`, `attention_context_*.csv.gz` and `nccl_*.csv.gz` (NVIDIA's aiconfigurator, Apache-2.0)
and, beside it, sweeps `nccl_allreduce_<gpu>_<n>gpu.csv`. Products are fitted on a tenth of the shapes, attention on a
tenth, collectives on every other size; the errors printed are those of the rest. `--write` puts the curves into
src/meshloom/hardware/specs. `--judge` fits nothing: it holds the shipped curves against the rows that were not fitted,
and all devices together.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import random
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import tomllib

from meshloom.hardware.curves import AttentionCurve, CollectiveCurve, GemmCurve
from meshloom.hardware.device import Device, load_device
from meshloom.simulate.calibrate import (
    Attended,
    Collected,
    errors,
    fit_attention,
    fit_collective,
    fit_gemm,
    predict_collectives,
)  # fmt: skip
from meshloom.simulate.compute import attention_seconds, gemm_seconds
from results import section, write_section

SPECS = Path(__file__).resolve().parents[1] / "src" / "meshloom" / "hardware" / "specs"
FILES = {"a100-80gb-sxm": "a100_sxm", "h100-sxm": "h100_sxm", "h200": "h200_sxm", "b200": "b200_sxm", "l40s": "l40s"}
SAME = {  # devices of the same chip take the curves of the one that was measured
    "a100-80gb-sxm": ["a100-40gb-sxm", "a100-80gb-pcie", "a100-40gb-pcie"], "h100-sxm": ["h100-pcie"],
    "b200": ["gb200", "gb300"], "l40s": ["rtx4090"],
}  # fmt: skip
OPS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
}
SEED = 20260101


def rows(path: Path) -> list[dict[str, str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as file:
        return list(csv.DictReader(file))


def products(path: Path) -> tuple[list[tuple[int, int, int, int]], list[float]]:
    table = rows(path)
    return [(1, int(r["m"]), int(r["n"]), int(r["k"])) for r in table], [float(r["latency_ms"]) * 1e-3 for r in table]


def attended(path: Path) -> list[Attended]:
    return [
        Attended(
            int(r["batch_size"]), int(r["num_heads"]), int(r["num_key_value_heads"]), int(r["isl"]),
            int(r["head_dim"]), float(r["latency_ms"]) * 1e-3,
        )
        for r in rows(path)
        if r["window_size"] == "0" and r["step"] == "0"
    ]  # fmt: skip


def collected(path: Path) -> list[Collected]:
    return [
        Collected(OPS[r["op_name"]], int(r["num_gpus"]), float(r["message_bytes"]), float(r["latency_ms"]) * 1e-3)
        for r in rows(path)
    ]


def sweeps(folder: Path, gpu: str) -> list[Collected]:
    found = []
    for path in sorted(folder.glob(f"nccl_allreduce_{gpu}_*gpu.csv")):
        size = int(re.search(r"_(\d+)gpu", path.name).group(1))
        found += [Collected("all_reduce", size, float(r["size(B)"]), float(r["time(ns)"]) * 1e-9) for r in rows(path)]
    return found


def quality(found: np.ndarray) -> str:
    return f"median {np.median(found):.1%}, p90 {np.percentile(found, 90):.1%}, {len(found)} rows"


def gemm(device: Device, path: Path) -> tuple[GemmCurve, str]:
    shapes, seconds = products(path)
    part = set(random.Random(SEED).sample(range(len(shapes)), max(1000, len(shapes) // 10)))
    curve = fit_gemm(device, [shapes[i] for i in part], [seconds[i] for i in part])
    rest = [i for i in range(len(shapes)) if i not in part]
    return curve, judge_gemm(device, curve, [shapes[i] for i in rest], [seconds[i] for i in rest])


def judge_gemm(device: Device, curve: GemmCurve, shapes: list[Any], seconds: list[float]) -> str:
    from dataclasses import replace

    found = errors(gemm_seconds(tuple(shapes), replace(device, gemm=curve)), seconds)
    large = np.array(seconds) > 20e-6
    return f"{quality(found)}; of 20 µs and more {quality(found[large])}"


def attention(device: Device, path: Path) -> tuple[AttentionCurve, str]:
    from dataclasses import replace

    kernels = attended(path)
    part = set(random.Random(SEED).sample(range(len(kernels)), len(kernels) // 10))
    curve = fit_attention(device, [kernels[i] for i in part])
    rest = [kernel for i, kernel in enumerate(kernels) if i not in part]
    trial = replace(device, attention=curve)
    found = errors([attention_seconds(*kernel[:5], trial) for kernel in rest], [kernel.seconds for kernel in rest])
    return curve, quality(found)


def collectives(device: Device, samples: list[Collected]) -> tuple[dict[str, CollectiveCurve], str]:
    curves, found = {}, []
    for op in sorted({sample.op for sample in samples}):
        mine = sorted((s for s in samples if s.op == op), key=lambda s: (s.num_devices, s.num_bytes))
        by_size = "L40S" in device.name or "V100" in device.name
        curves[op] = fit_collective(device, mine[::2], by_size=by_size)
        rest = mine[1::2]
        found.append(errors(predict_collectives(device, rest, curves[op]), [s.seconds for s in rest]))
    return curves, quality(np.concatenate(found))


def judge(folder: Path) -> list[str]:
    """Lines of a table: how the shipped curves do on rows that were not fitted, by device and all together."""
    lines, found = [], {"products": [], "products of 20 µs and more": [], "fused attention": [], "collectives": []}
    for name, file in FILES.items():
        device, mine = load_device(name), {}
        shapes, seconds = products(folder / f"gemm_bf16_{file}.csv.gz")
        part = set(random.Random(SEED).sample(range(len(shapes)), max(1000, len(shapes) // 10)))
        rest = [i for i in range(len(shapes)) if i not in part]
        measured = np.array([seconds[i] for i in rest])
        mine["products"] = errors(gemm_seconds(tuple(shapes[i] for i in rest), device), measured)
        mine["products of 20 µs and more"] = mine["products"][measured > 20e-6]
        kernels = attended(folder / f"attention_context_{file}.csv.gz")
        part = set(random.Random(SEED).sample(range(len(kernels)), len(kernels) // 10))
        others = [kernel for i, kernel in enumerate(kernels) if i not in part]
        mine["fused attention"] = errors(
            [attention_seconds(*k[:5], device) for k in others], [k.seconds for k in others]
        )
        samples, each = collected(folder / f"nccl_{file}.csv.gz"), []
        for op in sorted({sample.op for sample in samples}):
            ours = sorted((s for s in samples if s.op == op), key=lambda s: (s.num_devices, s.num_bytes))[1::2]
            each.append(errors(predict_collectives(device, ours, device.collectives[op]), [s.seconds for s in ours]))
        mine["collectives"] = np.concatenate(each)
        for kind, values in mine.items():
            found[kind].append(values)
            lines.append(f"| {name} | {kind} | {quality(values)} |")
    lines += [f"| **all five** | {kind} | {quality(np.concatenate(each))} |" for kind, each in found.items()]
    for gpu, name in (("v100", "v100-sxm"), ("a100", "a100-80gb-sxm")):
        samples, device = sweeps(folder.parent, gpu), load_device(name)
        if samples:
            values = errors(
                predict_collectives(device, samples, device.collectives["all_reduce"]), [s.seconds for s in samples]
            )
            lines.append(f"| {name} | all-reduce of 2 to 8 devices, 1 MiB to 1 GiB (vTrain) | {quality(values)} |")
    return lines


def write(name: str, **parts: Any) -> None:
    path = SPECS / f"{name}.toml"
    table = tomllib.loads(path.read_text())
    for key, part in parts.items():
        if isinstance(part, dict):
            table[key] = {op: {k: v for k, v in asdict(curve).items() if v} for op, curve in part.items()}
        elif part is not None:
            table[key] = {k: v for k, v in asdict(part).items() if v}
    path.write_text(tomli_w.dumps(table))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--judge", action="store_true", help="fit nothing, judge what is shipped")
    options = parser.parse_args()
    if options.judge:
        lines = ["| device | kernels | error on rows not fitted |", "|---|---|---|", *judge(options.folder)]
        print("\n".join(lines))
        if options.write:
            write_section(section("Kernels", "python benchmarks/calibrate.py DIR --judge --write", "\n".join(lines)))
        return
    lines = ["| device | kernels | error on rows not fitted |", "|---|---|---|"]
    for name, file in FILES.items():
        if options.device not in ("", name):
            continue
        device = load_device(name)
        products_, told = gemm(device, options.folder / f"gemm_bf16_{file}.csv.gz")
        lines.append(f"| {name} | products | {told} |")
        fused, told = attention(device, options.folder / f"attention_context_{file}.csv.gz")
        lines.append(f"| {name} | fused attention | {told} |")
        curves, told = collectives(device, collected(options.folder / f"nccl_{file}.csv.gz"))
        lines.append(f"| {name} | collectives | {told} |")
        print("\n".join(lines[-3:]), flush=True)
        if options.write:
            for same in [name, *SAME.get(name, [])]:
                inside = None if "pcie" in same or same in ("gb300", "rtx4090") else curves
                write(same, gemm=products_, attention=fused, **({"collectives": inside} if inside else {}))
    for name, gpu in (("v100-sxm", "v100"),):
        samples = sweeps(options.folder.parent, gpu)
        if samples and options.device in ("", name):
            curves, told = collectives(load_device(name), samples[::8])
            lines.append(f"| {name} | all-reduce of 2 to 8 devices, 1 MiB to 1 GiB | {told} |")
            print(lines[-1], flush=True)
            if options.write:
                # the other collectives pass half the bytes over the same links
                write(name, collectives=dict.fromkeys(OPS.values(), curves["all_reduce"]))


if __name__ == "__main__":
    main()
