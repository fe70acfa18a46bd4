"""`data prepare`: what is written, what is dropped and why, and that it is the same again."""

from __future__ import annotations

import gzip
import itertools
import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshloom.errors import DataError, FolderError
from meshloom.train.recipe import _shingles, load_recipe, mix
from tests.conftest import Meshloom

KOREAN = [
    f"{number}번째 문장입니다. 한글은 {number * 7919 % 1000}년에 만들었고 값은 {number**3}원이다."
    for number in range(200)
]
ENGLISH = [
    f"Sentence {number}: the letters of {number * 104729 % 997} were cast, at {number**3} each."
    for number in range(200)
]


def _lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")


def _rows(path: Path) -> list[dict[str, str]]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in content.decode().splitlines()]


def _mix(
    folder: Path, head: str, ko: list[str], en: list[str], out: str = "섞은 것.jsonl.gz", **more: Any
) -> dict[str, Any]:
    _lines(folder / "ko.jsonl", ko)
    _lines(folder / "en.jsonl", en)
    recipe = folder / "레시피.toml"
    recipe.write_text(
        head
        + '\n[[source]]\nname = "한국어"\ndata = "ko.jsonl"\nratio = 3\n[[source]]\ndata = "en.jsonl"\nratio = 1\n',
        encoding="utf-8",
    )
    return mix(load_recipe(recipe), folder / out, **more)


def test_ratios_split_and_counts(tmp_path: Path) -> None:
    report = _mix(tmp_path, "validation = 0.1", KOREAN, ENGLISH)
    train, held_back = (_rows(tmp_path / f"섞은 것{part}.jsonl.gz") for part in ("", ".validation"))
    rows = train + held_back
    num_bytes = {
        name: sum(len(row["text"].encode()) for row in rows if row["source"] == name) for name in ("한국어", "en.jsonl")
    }
    assert num_bytes["한국어"] / sum(num_bytes.values()) == pytest.approx(0.75, abs=0.01)
    assert num_bytes["한국어"] == report["sources"][0]["bytes"]
    assert 0.04 < len(held_back) / len(rows) < 0.18
    assert not {row["text"] for row in train} & {row["text"] for row in held_back}
    assert {row["text"] for row in rows} <= {*KOREAN, *ENGLISH}
    for row in report["sources"]:
        assert row["read"] == 200 == row["documents"] + sum(row["dropped"].values())
    assert json.loads((tmp_path / "섞은 것.report.json").read_text()) == report
    korean = [row["source"] == "한국어" for row in train]
    assert sum(first != second for first, second in itertools.pairwise(korean)) > 20, "sources are mixed, not appended"


def test_it_is_the_same_again_and_more_keeps_what_it_held_back(tmp_path: Path) -> None:
    names = ["a.jsonl.gz", "a.validation.jsonl.gz", "a.report.json"]
    kept = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        _mix(folder, "validation = 0.1\nnear = 0.8\nmegabytes = 0.012", KOREAN, ENGLISH, "a.jsonl.gz")
        kept.append([(folder / name).read_bytes() for name in names[:2]])
    assert kept[0] == kept[1]
    before = {row["text"] for row in _rows(tmp_path / "one" / names[1])}
    _mix(tmp_path / "one", "validation = 0.1\nnear = 0.8\nmegabytes = 0.016", KOREAN, ENGLISH, "a.jsonl.gz", force=True)
    assert before < {row["text"] for row in _rows(tmp_path / "one" / names[1])}
    _mix(tmp_path / "two", "validation = 0.1\nnear = 0.8\nmegabytes = 0.012\nseed = 1", KOREAN, ENGLISH, "b.jsonl.gz")
    assert gzip.decompress((tmp_path / "two" / "b.jsonl.gz").read_bytes()) != gzip.decompress(kept[0][0])


def test_what_is_dropped_and_why(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", KOREAN[0])
    assert decomposed != KOREAN[0]
    long = " ".join(KOREAN[20:40])
    ko = [*KOREAN[:10], decomposed, f"  {KOREAN[1]}\n", "짧다", "가" * 5000, "", long, long.replace("문장", "구절", 2)]
    with (tmp_path / "bad.txt").open("w") as file:
        file.write("unused")
    report = _mix(
        tmp_path, "min_characters = 5\nmax_characters = 4000\nnear = 0.8", ko, [*ENGLISH[:30], ENGLISH[0].upper()]
    )
    korean, english = (row["dropped"] for row in report["sources"])
    assert {reason: count for reason, count in korean.items() if count and reason != "over ratio"} == {
        "empty": 1, "too short": 1, "too long": 1, "equal": 2, "similar": 1,
    }  # fmt: skip
    assert english["similar"] == 1, "case and spaces make no document of its own"
    texts = [row["text"] for row in _rows(tmp_path / "섞은 것.jsonl.gz")]
    assert all(unicodedata.is_normalized("NFC", text) for text in texts)
    assert len(set(texts)) == len(texts)


def test_similar_is_what_the_shingles_say(tmp_path: Path) -> None:
    """Against the closed definition: exact Jaccard of all pairs, in order."""
    base = [" ".join(KOREAN[place : place + 6]) for place in range(0, 180, 6)]
    changed = [
        text.replace("한글", "문자", number % 7).replace("값", "수", number % 4) for number, text in enumerate(base)
    ]
    documents = [text for pair in zip(base, changed) for text in pair]

    def grams(text: str) -> set[str]:
        plain = " ".join(text.lower().split())
        return {plain[place : place + 8] for place in range(len(plain) - 7)}

    kept: list[str] = []
    for text in dict.fromkeys(documents):
        likeness = [len(grams(text) & grams(other)) / len(grams(text) | grams(other)) for other in kept]
        if max(likeness, default=0) < 0.7:
            kept.append(text)
    assert len(base) < len(kept) < len(set(documents)), "some pairs lie above, some below"
    report = _mix(tmp_path, "near = 0.7", documents, ENGLISH)
    dropped = report["sources"][0]["dropped"]
    want = len(set(documents)) - len(kept)
    assert 0.9 * want <= dropped["similar"] <= want, "a few near the threshold may be missed, none dropped for nothing"


def test_shingles_are_hashes_of_runs_of_characters() -> None:
    text = "한글은  세종대왕이 만든 글자이다."
    assert len(_shingles(text)) == len("한글은 세종대왕이 만든 글자이다.") - 7
    assert len(np.intersect1d(_shingles("가나다라마바사아자"), _shingles("나다라마바사아자차"))) == 1
    assert len(_shingles("가")) == 2
    assert len(_shingles("")) == 1


def test_squad_gives_each_paragraph_once(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[[source]]\ndata = "sample"\nratio = 1\n')
    report = mix(load_recipe(recipe), tmp_path / "a.jsonl")
    texts = [row["text"] for row in _rows(tmp_path / "a.jsonl")]
    assert 30 <= len(texts) < 47
    assert len(set(texts)) == len(texts)
    assert report["sources"][0]["dropped"]["equal"] == 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", r"with \[\[source\]\] tables of data and ratio, got 'Object missing required field `source`'"),
        ("source = []", r"at least one \[\[source\]\]"),
        ("a = [", "expected a recipe"),
        ('[[source]]\ndata = "a.jsonl"\nratio = 0', "a ratio above 0"),
        ('[[source]]\ndata = "a.jsonl"\nratio = 1\nfield = "x"', "unknown field `field`"),
        ('near = 2\n[[source]]\ndata = "a.jsonl"\nratio = 1', "near between 0 and 1"),
        ('validation = 1\n[[source]]\ndata = "a.jsonl"\nratio = 1', "validation from 0 to below 1"),
        ('[[source]]\ndata = "a.jsonl"\nratio = 1', r"a\.jsonl: .*there is no such file"),
        (
            'megabytes = 1\n[[source]]\ndata = "sample"\nratio = 1',
            r"sample: expected 1\.0 MB for its ratio, got 0\.0 MB",
        ),
        (
            'min_characters = 9999\n[[source]]\ndata = "sample"\nratio = 1',
            "a document that passes the recipe's filters",
        ),
    ],
)
def test_a_recipe_that_cannot_be(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(DataError, match=told):
        mix(load_recipe(path), tmp_path / "out.jsonl")
    assert [item.name for item in tmp_path.iterdir()] == ["r.toml"], "nothing is left behind"


def test_files_that_are_there_stay(tmp_path: Path) -> None:
    _mix(tmp_path, "", KOREAN, ENGLISH, "a.jsonl")
    with pytest.raises(FolderError, match=r"a\.jsonl: expected a file that is not there yet"):
        _mix(tmp_path, "", KOREAN, ENGLISH, "a.jsonl")
    with pytest.raises(DataError, match=r"ends in \.jsonl or \.jsonl\.gz"):
        _mix(tmp_path, "", KOREAN, ENGLISH, "a.txt")


def test_without_datasketch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(DataError, match=r"expected the package datasketch.*install meshloom\[data\]"):
        _mix(tmp_path, "near = 0.8", KOREAN, ENGLISH)


def test_the_command(tmp_path: Path, meshloom: Meshloom) -> None:
    _lines(tmp_path / "ko.jsonl", [*KOREAN, KOREAN[0]])
    (tmp_path / "r.toml").write_text('[[source]]\ndata = "ko.jsonl"\nratio = 1\nname = "한국어"\n', encoding="utf-8")
    result = meshloom("data", "prepare", str(tmp_path / "r.toml"), "--out", str(tmp_path / "말뭉치.jsonl.gz"))
    assert result.returncode == 0, result.stderr
    assert "equal" in result.stdout
    assert "말뭉치.jsonl.gz: 200 documents" in result.stdout
    again = meshloom("data", "prepare", str(tmp_path / "r.toml"), "--out", str(tmp_path / "b.jsonl"), "--json")
    assert json.loads(again.stdout)["sources"][0]["dropped"]["equal"] == 1
