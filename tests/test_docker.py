"""The container files: they parse, name what is there, and the scripts ask docker for what they should."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


def _has_compose() -> bool:
    return (
        shutil.which("docker") is not None
        and not subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode
    )


@pytest.mark.skipif(not _has_compose(), reason="docker with its compose plugin is not here")
def test_docker_takes_the_compose_file() -> None:
    subprocess.run(["docker", "compose", "config", "--quiet"], cwd=ROOT, check=True)


def test_the_compose_file_builds_both_kinds_from_the_dockerfile() -> None:
    table = yaml.safe_load((ROOT / "compose.yaml").read_text())
    assert set(table["services"]) == {"gpu", "cpu"}
    known = set(re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.M))
    for name, service in table["services"].items():
        assert service["image"] == f"meshloom:{name}"
        assert set(service["build"].get("args", {})) <= known
        assert len(service["volumes"]) == 2
    assert table["services"]["gpu"]["deploy"]["resources"]["reservations"]["devices"][0]["driver"] == "nvidia"
    assert "deploy" not in table["services"]["cpu"]


def test_what_the_dockerfile_copies_is_there_and_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    for line in re.findall(r"^COPY (.*)", (ROOT / "Dockerfile").read_text(), re.M):
        for name in line.split()[:-1]:
            assert (ROOT / name).exists()
            assert f"!{name}" in ignored


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        ("build.sh", ["cpu"], ["compose", "build", "cpu"]),
        ("build.sh", [], ["compose", "build", "gpu"]),
        ("run.sh", ["cpu", "train", "--model", "a b"], ["run", "--rm", "cpu", "train", "--model", "a b"]),
        ("run.sh", ["doctor"], ["run", "--rm", "gpu", "doctor"]),
    ],
)
def test_the_scripts(tmp_path: Path, script: str, words: list[str], expected: list[str]) -> None:
    for name, body in {"docker": 'printf "%s\\n" "$@" "work=$MESHLOOM_WORK"', "nvidia-smi": "true"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "MESHLOOM_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([ROOT / "docker" / script, *words], cwd=tmp_path, env=environment, capture_output=True,
                          text=True, check=True)  # fmt: skip
    *given, work = done.stdout.splitlines()
    assert given[-len(expected) :] == expected
    if script == "run.sh":
        assert work == f"work={tmp_path}"
        assert str(ROOT / "compose.yaml") in given


def test_a_kind_that_is_none_is_refused() -> None:
    done = subprocess.run([ROOT / "docker" / "build.sh", "tpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "expected gpu or cpu, got 'tpu'" in done.stderr
