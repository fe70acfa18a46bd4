"""What tests of all rooms share: the real inputs, the command line as a user calls it, and one recorded run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Ranks are forked, and threads of OpenMP do not come along: a child that waits for them waits for ever.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A busy machine is no fault of what is tested, and the same tree gives the same answer: what is drawn anew each time is
# drawn by benchmarks/fuzz.py.
settings.register_profile("meshloom", deadline=None, derandomize=True)
settings.load_profile("meshloom")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

Meshloom = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tokenised data goes in tests, also in the processes that they start: never the user's own cache."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["MESHLOOM_CACHE_DIR"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """The real inputs; skips where they are absent, as on a user's machine."""
    if not SHARED.is_dir():
        pytest.skip("needs the real inputs of ../shared/data, which are not here")
    return SHARED


@pytest.fixture(scope="session")
def meshloom() -> Meshloom:
    """Run the command line in a process of its own, as a user does; gives what it printed and its exit code."""

    def run(*arguments: str, cwd: Path | None = None, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        command = [sys.executable, "-m", "meshloom.cli", *arguments]
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    return run


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory, meshloom: Meshloom) -> Path:
    """The run folder of one `meshloom demo`; what it printed lies in `stdout.txt` beside it."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    result = meshloom("demo", "--out", str(folder))
    assert result.returncode == 0, result.stderr
    (folder.parent / "stdout.txt").write_text(result.stdout, encoding="utf-8")
    return folder
