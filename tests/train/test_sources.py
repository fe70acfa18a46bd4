"""What `--data` may name, and what is said of files that cannot be read."""

from __future__ import annotations

import gzip
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from meshloom.errors import DataError, MeshloomError, OfflineError, UsageError
from meshloom.train.readers import read
from meshloom.train.sources import Document, File, Pair, Reading, Tally, find_sources

LINES = [b'{"text": "\xea\xb0\x80\xeb\x82\x98"}\n', b'{"text": "second"}\n']


def _read(name: Path | str, tally: Tally | None = None, **reading: Any) -> list[Document]:
    (source,) = find_sources([str(name)])
    shares: list[float] = []
    found = [
        document
        for file in source.files
        for document in read(file, Reading(**reading), tally or Tally(), shares.append)
    ]
    assert all(0 <= share <= 1 for share in shares)
    return found


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["한글 파일.jsonl", "a.jsonl.gz", "B.JSONL", "a.ndjson"])
def test_jsonl(tmp_path: Path, name: str) -> None:
    assert _read(_write(tmp_path / name, b"".join(LINES))) == ["가나", "second"]


def test_jsonl_of_windows_with_blank_lines_and_no_last_end(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + LINES[0].replace(b"\n", b"\r\n") + b"\r\n" + LINES[1].strip()
    assert _read(_write(tmp_path / "a.jsonl", content)) == ["가나", "second"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "글 모음.TXT"])
def test_an_empty_line_ends_a_document(tmp_path: Path, name: str) -> None:
    content = "첫째 줄\n둘째 줄\n\n\n \t\n다음 문서\r\n계속\r\n\r\n끝".encode()
    assert _read(_write(tmp_path / name, content)) == ["첫째 줄\n둘째 줄", "다음 문서\r\n계속", "끝"]


def test_a_text_without_empty_lines_is_cut_at_a_line_end(tmp_path: Path) -> None:
    lines = [f"{number} {'가' * 300}" for number in range(3000)]
    documents = _read(_write(tmp_path / "a.txt", "\n".join(lines).encode()))
    assert len(documents) == 3
    assert "\n".join(str(document) for document in documents).split("\n") == lines
    assert all((1 << 20) < len(str(document).encode()) < (1 << 20) + 1000 for document in documents[:-1])


def test_squad_and_the_sample(tmp_path: Path) -> None:
    table = {"data": [{"paragraphs": [{"context": "본문", "qas": [{"question": "누가?"}, {"question": "언제?"}]}]}]}
    path = _write(tmp_path / "squad.json.gz", json.dumps(table, ensure_ascii=False).encode())
    assert _read(path) == [Pair("누가?", "본문"), Pair("언제?", "본문")]
    assert len(_read("sample")) == 47


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "한글.parquet"
    texts = [f"{number}번 문서" for number in range(3000)]
    parquet.write_table(pyarrow.table({"본문": [*texts, None], "id": range(3001)}), path)
    with pytest.raises(DataError, match=r"한글.parquet: expected a field 'text', found 본문, id; name the right one"):
        _read(path)
    with pytest.raises(DataError, match="row 3001: expected text in '본문', got null"):
        _read(path, text_field="본문")
    tally = Tally()
    assert _read(path, tally, text_field="본문", skip_bad_lines=True) == texts
    assert (tally.num_documents, tally.num_bad) == (3000, 1)
    with pytest.raises(DataError, match="expected a Parquet file"):
        _read(_write(tmp_path / "b.parquet", b"no parquet" * 100))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="expected the package pyarrow"):
        _read(_write(tmp_path / "a.parquet", b""))


def test_a_folder_in_the_order_of_names_and_what_is_no_data(tmp_path: Path) -> None:
    _write(tmp_path / "데이터" / "b" / "x.jsonl.gz", b"".join(LINES))
    _write(tmp_path / "데이터" / "a.txt", b"one")
    _write(tmp_path / "데이터" / "README.md", b"no data")
    _write(tmp_path / "데이터" / ".cache" / "y.txt", b"hidden")
    (source,) = find_sources([str(tmp_path / "데이터")])
    assert [file.kind for file in source.files] == ["text", "jsonl"]
    assert source.left_out == ("README.md",)
    assert _read(tmp_path / "데이터") == ["one", "가나", "second"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="it is empty"):
        find_sources([str(tmp_path / "empty")])
    (tmp_path / "데이터" / "b" / "x.jsonl.gz").unlink()
    (tmp_path / "데이터" / "a.txt").unlink()
    with pytest.raises(DataError, match=r"it holds README\.md"):
        find_sources([str(tmp_path / "데이터")])


def test_shares(tmp_path: Path) -> None:
    a, b = _write(tmp_path / "a.jsonl", LINES[0]), _write(tmp_path / "b.txt:1", b"")
    odd = _write(tmp_path / "c:0.5", b"").rename(tmp_path / "c.txt:0.5.txt")
    assert [source.weight for source in find_sources([f"{a}:0.7", f"{tmp_path / 'a.jsonl'}:3e-1"])] == [0.7, 0.3]
    assert find_sources([str(odd)])[0].weight is None
    assert find_sources(["sample:2"])[0].weight == 2
    assert find_sources(["owner/name@ko:0.5"])[0].files == (File(name="owner/name@ko", kind="hub"),)
    with pytest.raises(UsageError, match="a share with every --data or with none"):
        find_sources([f"{a}:0.7", "sample"])
    with pytest.raises(UsageError, match="a share above 0"):
        find_sources([f"{a}:0"])
    assert b.exists()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", LINES[0] + b'{"text": \n', r"a\.jsonl, line 2: expected a JSON object, got .*--skip-bad-lines"),
        ("a.jsonl", LINES[0] + b"[1]\n", r"line 2: expected a JSON object, got 'Expected `object`, got `array`"),
        ("a.jsonl", LINES[0] + b'{"text": "\\ud800 lone"}\n', "line 2: expected a JSON object"),
        ("a.jsonl", LINES[0] + b'{"text": 3}\n', r"line 2: expected text in 'text', got int; mend it"),
        ("a.jsonl", LINES[0] + b'{"text": null}\n', r"line 2: expected text in 'text', got null"),
        ("a.jsonl", '{"본문": "가", "id": 1}\n'.encode(), r"line 1: expected a field 'text', found 본문, id; name the"),
        ("a.jsonl", '{"text": "가나다"}\n'.encode("cp949"), r"line 1: .*look like cp949: convert .* iconv -f cp949"),
        ("a.txt", LINES[1] + "가나다\n".encode("cp949"), r"a\.txt, line 2: expected UTF-8, .*iconv -f cp949 -t utf-8"),
        ("a.txt", "가나다\n".encode("utf-16"), r"line 1: .*look like utf-16"),
        ("a.txt", b"", r"a\.txt: expected at least one document, the file holds none"),
        ("a.txt", b"\n \n", "at least one document"),
        ("a.jsonl", b"", "at least one document"),
        ("a.jsonl", b'{"text": ""}\n{"text": " \\n"}', "at least one document"),
        ("a.json", b"{", r"a\.json: expected JSON in SQuAD format"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}\n', r"name the file \.jsonl"),
        ("a.json", b'{"data": [{}]}', "got no 'paragraphs'"),
        ("a.json", b"[]", "got another layout"),
        ("a.json", b'{"data": []}', "at least one question"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    with pytest.raises(DataError, match=told) as caught:
        _read(_write(tmp_path / name, content))
    assert "\n" not in str(caught.value)


def test_a_broken_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(LINES) * 1000)[:-20])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: expected a file that can be read"):
        _read(path)


def test_bad_lines_are_counted(tmp_path: Path) -> None:
    content = LINES[0] + b"{broken\n" + b'{"other": 1}\n' + b'{"text": ""}\n' + LINES[1]
    tally = Tally()
    assert _read(_write(tmp_path / "a.jsonl", content), tally, skip_bad_lines=True) == ["가나", "second"]
    assert (tally.num_documents, tally.num_bad, tally.num_empty) == (2, 2, 1)
    assert "line 2" in tally.first_bad
    with pytest.raises(DataError, match=r"at least one line that can be read; the first says: .*line 1"):
        _read(_write(tmp_path / "b.jsonl", b"{broken\n{broken\n"), skip_bad_lines=True)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("missing.jsonl", "there is no such file"),
        ("./missing", "there is no such file"),
        ("no such name", "there is no such file"),
        ("file", "rename it or convert it"),
        ("file.csv", "rename it or convert it"),
    ],
)
def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, told: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a")
    (tmp_path / "file.csv").write_text("a")
    with pytest.raises(DataError, match=told):
        find_sources([name])


class _Rows(list[dict[str, Any]]):
    """As much of a `datasets.Dataset` as is read."""

    cache_files: tuple[dict[str, str], ...] = ()

    @property
    def column_names(self) -> list[str]:
        return list(self[0])


def _datasets(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[tuple[Any, ...]]:
    """Put a stand-in for the package datasets in its place; gives the calls that it gets."""
    calls: list[tuple[Any, ...]] = []
    module = types.ModuleType("datasets")

    def load_dataset(*names: Any, split: str) -> Any:
        calls.append((*names, split))
        assert module.config.HF_HUB_OFFLINE, "without a hub, only the cache is asked"
        if isinstance(answer, Exception):
            raise answer
        return answer

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    module.exceptions = types.SimpleNamespace(DatasetNotFoundError=FileNotFoundError)  # type: ignore[attr-defined]
    module.config = types.SimpleNamespace(HF_HUB_OFFLINE=False)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # no hub, and at once
    return calls


def test_hub_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _datasets(monkeypatch, _Rows([{"text": "가"}, {"text": "나"}]))
    assert _read("owner/name@ko") == ["가", "나"]
    assert calls[-1] == ("owner/name", "ko", "train")
    with pytest.raises(DataError, match="data 'owner/name': expected a field 'body', found text"):
        _read("owner/name", text_field="body")
    _datasets(monkeypatch, _Rows([{"question": "누가?", "context": "본문", "answers": {}}]))
    assert _read("squad") == [Pair("누가?", "본문")]


@pytest.mark.parametrize(
    ("answer", "kind", "told"),
    [
        (ConnectionError("no route"), OfflineError, "which cannot be reached .no route.; give a file"),
        (FileNotFoundError("Dataset 'a/b' doesn't exist"), DataError, "expected a dataset of the hub; datasets says"),
        (ValueError("Config name is missing. Pick one"), DataError, "Config name is missing"),
    ],
)
def test_what_the_hub_refuses(
    monkeypatch: pytest.MonkeyPatch, answer: Exception, kind: type[MeshloomError], told: str
) -> None:
    _datasets(monkeypatch, answer)
    with pytest.raises(kind, match=told):
        _read("owner/name")


def test_the_hub_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"data 'squad': expected the package datasets.*install meshloom\[data\]"):
        _read("squad")
