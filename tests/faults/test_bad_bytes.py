"""Files of strangers: each reader reads them or raises one of our errors, in time and in memory, and nothing else."""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshloom.chakra.file import read, stream
from meshloom.chakra.packed import unpack
from meshloom.errors import FolderError, HardwareError, MeshloomError, ModelError, TraceError
from meshloom.model.pretrained import _stored
from meshloom.train.checkpoint import check_checkpoint
from meshloom.train.storage import read_index
from tests.conftest import Meshloom
from tests.faults.readers import Reader, damaged, readers

READERS = readers()
DEEP = 200_000


@pytest.mark.parametrize("name", READERS)
def test_whole_files_are_read(tmp_path: Path, name: str) -> None:
    reader = READERS[name]
    reader.use(reader.put(tmp_path, reader.whole))


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(seed=st.integers(0, 1 << 32))
def test_damage_is_one_of_our_errors(tmp_path: Path, name: str, seed: int) -> None:
    _try(READERS[name], tmp_path, damaged(READERS[name].whole, random.Random(seed)))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("experiments", b'"tp2"]', b"true]"),
        ("notes", b'"0,1"', b'"0,' + b"9" * 5000 + b'"'),
        ("kineto", b'"dur": 5', b'"dur": 1e308'),
        ("kineto", b'"tid": 3', b'"tid": "' + b"9" * 5000 + b'"'),
        ("weight map", b'"w": "', b'"w": "\\ud800'),
        ("metrics", b'"step": 0', b'"step": Infinity'),
        ("metrics", b"2.5", b"1e999"),
        ("run", b'"state": "finished"', b'"state": NaN'),
    ],
)
def test_damage_that_once_was_no_error_of_ours(tmp_path: Path, name: str, old: bytes, new: bytes) -> None:
    """Found by benchmarks/fuzz.py."""
    whole = READERS[name].whole
    assert old in whole
    _try(READERS[name], tmp_path, whole.replace(old, new))


@pytest.mark.parametrize("name", READERS)
def test_deep_nesting_long_numbers_and_no_text(tmp_path: Path, name: str) -> None:
    for data in (
        b"", b"\0" * 1000, b"\xff" * 1000, b"[" * DEEP, b'{"a":' * DEEP, b"[" * DEEP + b"]" * DEEP,
        b"a = " + b"[" * DEEP, b"a = " + b"9" * 5000, b"9" * 5000, b'"\\ud800"', b"a." * DEEP + b"a = 1", b"<a>" * DEEP,
    ):  # fmt: skip
        _try(READERS[name], tmp_path, data)


def test_names_that_no_disk_takes(tmp_path: Path, meshloom: Meshloom) -> None:
    """Both inside a file and as a word on the command line."""
    reader = READERS["cluster.toml"]
    text = reader.whole.replace(b'"h100', b'"h100' + b"a" * 5000)
    assert text != reader.whole
    with pytest.raises(HardwareError, match="expected a TOML file or one of"):
        reader.use(reader.put(tmp_path, text))
    for command in (
        ["check"],
        ["info"],
        ["train", "--test", "--model"],
        ["synth", "--model", "gpt2-tiny", "--plan", "tp2", "--out"],
    ):
        done = meshloom(*command, "a" * 5000)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "too long" in done.stderr
        assert len(done.stderr) < 400


def _try(reader: Reader, folder: Path, data: bytes) -> None:
    path = reader.put(folder, data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.use(path)
    except MeshloomError:
        return


def _bomb(num_bytes: int) -> bytes:
    return gzip.compress(bytes(1 << 20), 9) * (num_bytes >> 20)


@pytest.mark.parametrize("name", ["stream", "kineto.gz", "jsonl.gz"])
def test_bombs_take_no_memory(tmp_path: Path, name: str) -> None:
    """16 GiB of zeros in 16 MB, read by a process that may take 2 GiB more than it has."""
    (tmp_path / "bomb").write_bytes(_bomb(16 << 30))
    script = (
        "import resource, sys; from pathlib import Path; from tests.faults.readers import readers\n"
        "from meshloom.errors import MeshloomError\n"
        f"reader = readers()[{name!r}]; path = reader.put(Path(sys.argv[1]), b'')\n"
        "Path(sys.argv[1], 'bomb').replace(path)\n"
        "held = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (held + (2 << 30), held + (2 << 30)))\n"
        "try: reader.use(path)\n"
        "except MeshloomError as error: print('refused', error)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=root, env=os.environ | {
        "PYTHONPATH": f"{root / 'src'}"}, capture_output=True, text=True, check=False, timeout=200)  # fmt: skip
    assert done.stdout.startswith("refused"), done.stderr[-500:]
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 << 20  # KiB


def test_packed_files_of_several_members_and_damaged_ones() -> None:
    members = gzip.compress(b"one") + gzip.compress(b"two") + bytes(512)
    assert unpack(members) == b"onetwo"
    assert unpack(gzip.compress(bytes(10 << 20))) == bytes(10 << 20), "small files may be as dense as they like"
    with pytest.raises(EOFError):
        unpack(gzip.compress(b"one" * 100)[:-9])
    with pytest.raises(OSError, match="unpacks to more"):
        unpack(_bomb(1 << 30))


def test_a_stream_in_small_parts_has_the_nodes_of_the_whole(tmp_path: Path) -> None:
    """Also where the first part holds the facts of the file and nothing more."""
    for name in ("trace.et", "trace.et.gz"):
        path = READERS[name].put(tmp_path, READERS[name].whole)
        for chunk in (1, 7, 64, 200, 1 << 20):
            assert [node for part in stream(path, chunk_bytes=chunk) for node in part.nodes] == list(read(path).nodes)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../b", "x\0y"])
def test_names_that_lead_out_of_a_folder(tmp_path: Path, name: str) -> None:
    reader = READERS["index"]
    table = json.loads(reader.whole)
    table["tensors"]["w"]["boxes"][0][2] = name
    with pytest.raises(FolderError, match="outside of the folder"):
        read_index(reader.put(tmp_path, json.dumps(table).encode()).parent.parent)
    reader = READERS["checkpoint"]
    table = json.loads(reader.whole)
    table["files"] = {name: 1}
    with pytest.raises(FolderError, match="outside of the folder"):
        check_checkpoint(reader.put(tmp_path, json.dumps(table).encode()).parent)
    reader = READERS["weight map"]
    with pytest.raises(ModelError, match="outside of the folder"):
        _stored(reader.put(tmp_path, json.dumps({"weight_map": {"w": name}}).encode()).parent)


def test_symbolic_links_in_circles_and_folders(tmp_path: Path) -> None:
    (tmp_path / "circle.et").symlink_to(tmp_path / "circle.et")
    (tmp_path / "folder.et").mkdir()
    for name in ("circle.et", "folder.et", "none.et"):
        with pytest.raises(TraceError, match=name):
            read(tmp_path / name)
