"""`make bench`: one script that fails or hangs is told, ends with all that it started, and the rest goes on."""

from __future__ import annotations

import ast
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench_all", FOLDER / "all.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ends_are_told(bench: Any) -> None:
    assert bench.run([sys.executable, "-c", ""], 60) == "done"
    assert bench.run([sys.executable, "-c", "raise SystemExit(3)"], 60) == "failed with exit code 3"


def test_what_a_script_started_ends_with_it(bench: Any, tmp_path: Path) -> None:
    child = "import threading; print('here', flush=True); threading.Event().wait()"
    parent = f"""
import subprocess, sys
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE)
child.stdout.readline()
part = Path({str(tmp_path / "part")!r})
part.write_text(str(child.pid))
part.rename({str(tmp_path / "pid")!r})
child.wait()
"""
    for limit_s in (1, 10, 60):  # a slow machine may need more until the child is there
        said = bench.run([sys.executable, "-c", parent], limit_s)
        assert said == f"took longer than its limit of {limit_s} s"
        if (tmp_path / "pid").exists():
            break
    deadline = time.monotonic() + 60  # a killed process takes its time to go
    while _lives(int((tmp_path / "pid").read_text())):
        assert time.monotonic() < deadline


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_each_script_is_there_takes_its_arguments_and_all_fit_into_the_time(bench: Any) -> None:
    for name, (arguments, limit_s) in bench.SCRIPTS.items():
        text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
        options = {
            node.args[0].value
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument" and node.args
            if isinstance(node.args[0], ast.Constant)
        }
        assert {word for word in arguments if word.startswith("--")} | {"--write"} <= options, name
        assert 0 < limit_s <= bench.TOTAL_S / 4
    assert sum(limit_s for _, limit_s in bench.SCRIPTS.values()) <= 1.1 * bench.TOTAL_S
