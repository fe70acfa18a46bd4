"""`meshloom train` on the data of users: mixed, with bad lines, from the cache, on one rank or two, or without any."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Meshloom

MODEL = ("train", "--model", "gpt2-tiny", "--seq-length", "32", "--max-steps", "4")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("말뭉치")
    lines = [
        json.dumps({"본문": f"{number}번째 문서이다. 한글은 소리글자이다."}, ensure_ascii=False) for number in range(80)
    ]
    (folder / "한국어.jsonl").write_text("\n".join([*lines[:40], "{broken", *lines[40:]]), encoding="utf-8")
    (folder / "english.txt").write_text("\n\n".join(f"Paragraph {number} of a book." for number in range(80)))
    return folder


def _losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_mixture_is_told_kept_and_the_same_on_two_ranks(corpus: Path, tmp_path: Path, meshloom: Meshloom) -> None:
    korean, english = corpus / "한국어.jsonl", corpus / "english.txt"
    data = ["--data", f"{korean}:0.7", "--data", f"{english}:0.3", "--tokenizer", "bytes", "--text-field", "본문",
            "--skip-bad-lines", "--cache-dir", str(tmp_path / "cache")]  # fmt: skip
    one = meshloom(*MODEL, *data, "--batch-size", "4", "--out", str(tmp_path / "one"))
    assert one.returncode == 0, one.stderr
    assert "한국어.jsonl: 1 bad lines were skipped; the first: " in one.stderr
    assert "line 41" in one.stderr
    assert "한국어.jsonl (70%)" in one.stdout
    assert "160 documents" in one.stdout
    assert "tokenised in" in one.stdout
    two = meshloom(*MODEL, *data, "--batch-size", "2", "--plan", "dp2", "--out", str(tmp_path / "two"))
    assert two.returncode == 0, two.stderr
    assert "tokenised before" in two.stdout
    assert "1 bad lines were skipped" in two.stderr, "the cache remembers"
    assert "fork" not in one.stderr + two.stderr, "tokenizers warns when a process forks after it used threads"
    assert _losses(tmp_path / "two") == pytest.approx(_losses(tmp_path / "one"), rel=2e-5)
    assert len(list((tmp_path / "cache" / "tokens").glob("*/index.json"))) == 2


def test_a_bad_line_ends_the_run_before_it_begins(corpus: Path, tmp_path: Path, meshloom: Meshloom) -> None:
    arguments = ["--data", str(corpus / "한국어.jsonl"), "--tokenizer", "bytes", "--out", str(tmp_path / "run")]
    result = meshloom(*MODEL, *arguments, "--text-field", "본문", "--plan", "dp2")
    assert result.returncode == 2
    assert "한국어.jsonl, line 41: expected a JSON object" in result.stderr
    assert result.stderr.count("\n") == 1
    wrong = meshloom(*MODEL, *arguments)
    assert "line 1: expected a field 'text', found 본문; name the right one with --text-field" in wrong.stderr
    assert not (tmp_path / "run").exists()


def test_no_data_is_a_dummy_set_that_is_said_loudly(tmp_path: Path, meshloom: Meshloom) -> None:
    result = meshloom(*MODEL, "--out", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert "DUMMY DATA" in result.stderr
    command = json.loads((tmp_path / "run" / "run.json").read_text())["command"]
    assert (command["data"], command["dummy"]) == (["sample"], True)


def test_ranks_that_others_started_tokenise_once(corpus: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "meshloom.cli", *MODEL,
               "--tokenizer", "bytes", "--data", str(corpus / "english.txt"), "--plan", "dp2",
               "--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "run")]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("documents") == 1, "rank 0 alone tells"
    assert len(list((tmp_path / "cache" / "tokens").glob("*/index.json"))) == 1
    assert len(_losses(tmp_path / "run")) == 4
