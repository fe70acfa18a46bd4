"""Where traces are written: what is there is not lost, and what is not whole does not look so."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshloom.chakra.file import read_all
from meshloom.cli.synth import write_traces
from meshloom.errors import FolderError
from meshloom.synth import roles as room
from meshloom.synth.folder import write_file
from meshloom.synth.roles import Roles, find_roles
from tests.synth.steps import step


@pytest.fixture(scope="module")
def found() -> Roles:
    return find_roles(step("gpt2", "dp2", 1, layers=1))


def test_a_folder_that_holds_anything_is_refused_without_force(tmp_path: Path) -> None:
    (tmp_path / "rank0.et").write_bytes(b"an older one")
    options = {"model": "gpt2-tiny", "plan": "dp2", "seq_length": 8, "micro_batch": 1, "out": tmp_path}
    with pytest.raises(FolderError, match=r"expected a new or empty folder.*--force"):
        write_traces(**options)  # type: ignore[arg-type]
    assert (tmp_path / "rank0.et").read_bytes() == b"an older one"
    write_traces(**options, force=True)  # type: ignore[arg-type]
    assert sorted(read_all(tmp_path)) == [0, 1]


def test_force_replaces_traces_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "rank0.et").write_bytes(b"")
    (tmp_path / "thesis.tex").write_bytes(b"dear")
    with pytest.raises(FolderError, match=r"thesis\.tex"):
        write_traces(model="gpt2-tiny", plan="dp2", seq_length=8, out=tmp_path, force=True)
    assert (tmp_path / "thesis.tex").read_bytes() == b"dear"


@pytest.mark.parametrize("ended_by", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("there", [False, True])
def test_an_interruption_leaves_what_was_there_and_nothing_half_written(
    found: Roles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended_by: type[BaseException], there: bool
) -> None:
    folder = tmp_path / "out"
    if there:
        found.write(folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*")}

    def write(where: Path, rank: int, *rest: object) -> int:
        if rank == 1:
            raise ended_by(28, "No space left on device")
        return write_file(where, rank, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(room, "write_file", write)
    with pytest.raises(FolderError if ended_by is OSError else KeyboardInterrupt):
        found.write(folder)
    assert folder.exists() == there
    assert {path.name: path.read_bytes() for path in folder.glob("*")} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"] * there
