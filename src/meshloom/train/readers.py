"""One reader a format: each gives documents, counts what it skips in the tally, and says where a line is bad."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import IO, Any

import msgspec

from meshloom.chakra.packed import GZIP, Unpacked
from meshloom.errors import DataError, OfflineError
from meshloom.model.hub import hub_answers
from meshloom.train.sources import SAMPLE, Document, File, Pair, Reading, Tally

At = Callable[[float], None]

_BOM = b"\xef\xbb\xbf"  # Windows editors put it before UTF-8
_LONGEST_LINE = 256 << 20  # bytes
_LONGEST = 1 << 20  # bytes of text after which a document of a text file ends with its line


def read(file: File, reading: Reading, tally: Tally, at: At) -> Iterator[Document]:
    """The documents of `file`; `tally` counts, `at` is told the share of the file that is read, 0 to 1.

    Documents without a visible character are counted and left out. Raises DataError naming file and line; if bad lines
    are skipped, still when there is no good one.
    """
    made = {"squad": _squad, "jsonl": _jsonl, "text": _text, "parquet": _parquet, "hub": _hub}[file.kind]
    before = tally.num_documents
    bad_before = tally.num_bad
    for document in made(file.name, reading, tally, at):
        if not (document if isinstance(document, str) else document.context).strip():
            tally.num_empty += 1
            continue
        tally.num_documents += 1
        yield document
    if tally.num_documents == before:
        if tally.num_bad > bad_before:
            raise DataError(f"{file.name}: expected at least one line that can be read; the first says: "
                            f"{tally.first_bad}")  # fmt: skip
        raise DataError(f"{file.name}: expected at least one document, the file holds none; remove it from the data")


def _squad(name: str, reading: Reading, tally: Tally, at: At) -> Iterator[Document]:
    """The questions of a SQuAD file, each with its paragraph."""
    if name == SAMPLE:
        raw = (resources.files("meshloom") / "data" / "squad-sample.json").read_bytes()
    else:
        with _readable(name), _opened(Path(name)) as (file, _):
            raw = file.read()
    try:
        table = msgspec.json.decode(raw.removeprefix(_BOM))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        hint = "; if each line is an object of its own, name the file .jsonl" if b"}\n{" in raw[: 1 << 20] else ""
        raise DataError(f"{name}: expected JSON in SQuAD format, got '{error}'{hint}") from error
    try:
        num_articles = len(table["data"])
        num_questions = 0
        for number, article in enumerate(table["data"]):
            at(number / num_articles)
            for paragraph in article["paragraphs"]:
                context = str(paragraph["context"])
                for question in paragraph["qas"]:
                    num_questions += 1
                    yield Pair(str(question["question"]), context)
    except (KeyError, TypeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else "another layout"
        raise DataError(
            f"{name}: expected SQuAD format, data[].paragraphs[] with context and qas[].question, got {what}"
        ) from error
    if not num_questions:
        raise DataError(f"{name}: expected at least one question, the file holds none")


def _jsonl(name: str, reading: Reading, tally: Tally, at: At) -> Iterator[Document]:
    """The text of each line's object."""
    decode = msgspec.json.Decoder(dict[str, Any]).decode
    with _readable(name), _opened(Path(name)) as (file, share):
        for number, line in enumerate(_lines(file), start=1):
            if number % 256 == 0:
                at(share())
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.isspace():
                continue
            try:
                row = decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                _bad(f"{name}, line {number}: expected a JSON object, got '{_told(error, line)}'", reading, tally)
                continue
            text = _field(row, f"{name}, line {number}", reading, tally)
            if text is not None:
                yield text


def _text(name: str, reading: Reading, tally: Tally, at: At) -> Iterator[Document]:
    """The documents of a text file: an empty line ends one, and so does the line that passes a MiB."""
    lines: list[str] = []
    length = 0
    with _readable(name), _opened(Path(name)) as (file, share):
        for number, line in enumerate(_lines(file), start=1):
            if number == 1:
                line = line.removeprefix(_BOM)
            if not line.isspace():
                try:
                    lines.append(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    where = f"{name}, line {number}: expected UTF-8, got '{_told(error, line)}'"
                    _bad(where, reading, tally)
                    continue
                length += len(line)
            if lines and (line.isspace() or length > _LONGEST):
                at(share())
                yield "".join(lines).rstrip("\r\n")
                lines, length = [], 0
    if lines:
        yield "".join(lines).rstrip("\r\n")


def _parquet(name: str, reading: Reading, tally: Tally, at: At) -> Iterator[Document]:
    """The text column of a Parquet file."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"{name}: expected the package pyarrow, which reads Parquet; install meshloom[data]") from error
    with _readable(name):
        try:
            file = ParquetFile(name)
            columns = file.schema_arrow.names
            if reading.text_field not in columns:
                raise _no_field(name, reading.text_field, columns)
            done = 0
            for batch in file.iter_batches(batch_size=1024, columns=[reading.text_field]):
                at(done / max(1, file.metadata.num_rows))
                for number, value in enumerate(batch.column(0).to_pylist(), start=done + 1):
                    if isinstance(value, str):
                        yield value
                    else:
                        where = f"{name}, row {number}: expected text in '{reading.text_field}'"
                        _bad(f"{where}, got {_kind_of(value)}", reading, tally)
                done += batch.num_rows
        except (ArrowException, UnicodeDecodeError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{name}: expected a Parquet file, got '{said}'") from error


def _hub(name: str, reading: Reading, tally: Tally, at: At) -> Iterator[Document]:
    """The training split of a hub dataset: of `squad` its questions, of others their text."""
    rows = hub_rows(name)
    is_squad = holds_pairs(rows, reading)
    if not is_squad and reading.text_field not in rows.column_names:
        raise _no_field(f"data '{name}'", reading.text_field, rows.column_names)
    for number, row in enumerate(rows, start=1):
        if number % 256 == 0:
            at(number / len(rows))
        if is_squad:
            yield Pair(str(row["question"]), str(row["context"]))
            continue
        text = _field(row, f"data '{name}', row {number}", reading, tally)
        if text is not None:
            yield text


def holds_pairs(rows: Any, reading: Reading) -> bool:
    """Whether the rows of a hub dataset are questions with their paragraphs, as SQuAD's are, and not text."""
    return {"question", "context"} <= set(rows.column_names) and reading.text_field not in rows.column_names


def hub_rows(name: str) -> Any:
    """The training split of hub dataset `name` or `name@configuration`, fetched or from datasets' own cache.

    Raises DataError without the package datasets or if there is no such dataset, OfflineError without the hub.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data '{name}': expected the package datasets, which fetches it from the hub; install "
            "meshloom[data], or give a file"
        ) from error
    dataset, _, configuration = name.partition("@")
    try:
        with _hub_or_cache():
            return datasets.load_dataset(dataset, configuration or None, split="train")
    except (OSError, ValueError, RuntimeError) as error:  # datasets wraps every failure of the network in one of these
        said = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, datasets.exceptions.DatasetNotFoundError) or "onfig name" in said:
            raise DataError(f"data '{name}': expected a dataset of the hub; datasets says: {said}") from error
        raise OfflineError(
            f"data '{name}': no such file; expected to fetch it from the hub, which cannot be reached ({said[:100]}); "
            "give a file such as train-v1.1.json or corpus.jsonl, or 'sample'"
        ) from error


@contextmanager
def _hub_or_cache() -> Iterator[None]:
    """Within this, datasets asks the hub if it answers; else only its cache, without trying again for half a minute."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not hub_answers():
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _field(row: dict[str, Any], where: str, reading: Reading, tally: Tally) -> str | None:
    value = row.get(reading.text_field)
    if isinstance(value, str):
        return value
    if reading.text_field in row:
        _bad(f"{where}: expected text in '{reading.text_field}', got {_kind_of(value)}", reading, tally)
    else:
        _bad(str(_no_field(where, reading.text_field, list(row))), reading, tally)
    return None


def _no_field(where: str, field: str, there: list[str]) -> DataError:
    names = ", ".join(there[:12]) or "none"
    hint = "name the right one with --text-field (text_field in a recipe)"
    return DataError(f"{where}: expected a field '{field}', found {names}; {hint}")


def _bad(what: str, reading: Reading, tally: Tally) -> None:
    """Count a bad line, or raise if they may not be skipped."""
    if not reading.skip_bad_lines:
        hint = "" if "--text-field" in what else "; mend it, or leave such lines out with --skip-bad-lines"
        raise DataError(what + hint)
    tally.num_bad += 1
    tally.first_bad = tally.first_bad or what


def _told(error: Exception, line: bytes) -> str:
    if not isinstance(error, UnicodeDecodeError):
        return str(error)
    found = "utf-16" if line.startswith((b"\xff\xfe", b"\xfe\xff")) else "cp949"  # what Korean text on Windows comes in
    try:
        line.decode(found, "ignore" if found == "utf-16" else "strict")
    except UnicodeDecodeError:
        return str(error)
    return f"bytes that look like {found}: convert the file with iconv -f {found} -t utf-8"


def _kind_of(value: Any) -> str:
    return {type(None): "null", dict: "an object", list: "a list"}.get(type(value), type(value).__name__)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], Callable[[], float]]]:
    """The bytes of a file, unpacked if they are gzip, and a function that tells what share of it has been read."""
    num_bytes = max(1, path.stat().st_size)
    with path.open("rb") as raw:
        packed = raw.read(2) == GZIP
        raw.seek(0)
        file: IO[bytes] = io.BufferedReader(Unpacked(raw), 1 << 20) if packed else raw
        yield file, lambda: raw.tell() / num_bytes


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of the file; raises OSError for one that would fill the memory."""
    while line := file.readline(_LONGEST_LINE + 1):
        if len(line) > _LONGEST_LINE:
            raise OSError(f"a line of more than {_LONGEST_LINE >> 20} MiB")
        yield line


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"{name}: expected a file that can be read, got '{what}'") from error
