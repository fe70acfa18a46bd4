"""From a file in SQuAD format to batches of token ids. Documents are tokenised when they are needed, in a seeded order.

Every data-parallel rank walks the same stream of sequences and keeps its own, so the global batch does not depend on
how many ranks there are. GPT-2 style models read question and context, packed; BERT style ones a pair, padded.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meshloom.errors import DataError, OfflineError
from meshloom.model.step import Batch

SAMPLE = "sample"  # the name of the dataset that Meshloom ships
_CHUNK = 256  # documents tokenised at a time
_IGNORED = -100  # the label that the loss of every HF model leaves out
_MASKED_SHARE = 0.15  # Devlin et al. 2019, section 3.1: 80 % become [MASK], 10 % a random token, 10 % stay


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A question and the paragraph that answers it."""

    question: str
    context: str


def load_squad(data: str) -> list[Document]:
    """The documents of a SQuAD file (.json or .json.gz), of the shipped `sample`, or of the hub's `squad`.

    Raises DataError naming the file and what was expected, OfflineError if the hub is needed and out of reach.
    """
    if data == "squad" and not Path(data).exists():
        return _from_hub()
    if data == SAMPLE:
        raw, where = (resources.files("meshloom") / "data" / "squad-sample.json").read_bytes(), SAMPLE
    else:
        raw, where = _file_bytes(Path(data)), data
    try:
        table = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{where}: expected JSON in SQuAD format, got '{error}'") from error
    documents = list(_documents(table, where))
    if not documents:
        raise DataError(f"{where}: expected at least one question, the file holds none")
    return documents


def _file_bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: expected a SQuAD file (.json or .json.gz), 'squad' for the hub's, or 'sample' for "
            "the one that Meshloom ships; there is no such file"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: expected a readable SQuAD file, got '{error}'") from error


def _documents(table: Any, where: str) -> Iterator[Document]:
    try:
        for article in table["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield Document(question=str(question["question"]), context=str(paragraph["context"]))
    except (KeyError, TypeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else "another layout"
        raise DataError(
            f"{where}: expected SQuAD format, data[].paragraphs[] with context and qas[].question, got {what}"
        ) from error


def _from_hub() -> list[Document]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "data 'squad': expected the package datasets, which fetches it from the hub; install "
            "meshloom[data], or give a SQuAD file"
        ) from error
    try:
        rows = datasets.load_dataset("squad", split="train")
    except (OSError, ValueError, RuntimeError) as error:  # datasets wraps every network failure in one of these
        raise OfflineError(
            "data 'squad': expected to fetch it from the hub, which cannot be reached; give a SQuAD "
            "file such as train-v1.1.json, or 'sample'"
        ) from error
    return [Document(question=row["question"], context=row["context"]) for row in rows]


def check_tokenizer(tokenizer: Any, config: Any, objective: str) -> None:
    """Raise DataError if the model has no room for the tokenizer's ids, or masking needs a token that is not there."""
    if len(tokenizer) > config.vocab_size:
        raise DataError(
            f"tokenizer: expected at most {config.vocab_size} tokens, which is the model's vocabulary, got "
            f"{len(tokenizer)}; use the model's own tokenizer"
        )
    needed = ("mask_token_id", "cls_token_id", "sep_token_id") if objective == "masked" else ("eos_token_id",)
    missing = [name.removesuffix("_id") for name in needed if getattr(tokenizer, name, None) is None]
    if missing:
        raise DataError(f"tokenizer: expected a {missing[0]}, which a {objective} model needs; use the model's own")


def batches(
    documents: list[Document],
    tokenizer: Any,
    objective: str,
    *,
    seq_length: int,
    batch_size: int,
    rank: int,
    num_ranks: int,
    seed: int,
) -> Iterator[Batch]:
    """Endless batches for data-parallel rank `rank` of `num_ranks`: int64 (batch_size, seq_length) tensors on the CPU.

    Sequence i of the stream goes to rank i mod num_ranks. Raises DataError if the documents hold not one sequence.
    """
    make = _packed if objective == "causal" else _pairs
    epoch = 0
    rows: list[dict[str, Tensor]] = []
    index = 0
    while True:
        before = index
        generator = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(len(documents), generator=generator).tolist()
        for row in make([documents[i] for i in order], tokenizer, seq_length):
            # masks come from the sequence's place in the stream, so they do not depend on the number of ranks
            mine = index % num_ranks == rank
            index += 1
            if not mine:
                continue
            rows.append(row if objective == "causal" else _mask(row, tokenizer, seed + index))
            if len(rows) == batch_size:
                yield {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
                rows = []
        if index == before:
            raise DataError(
                f"data: expected at least one sequence of {seq_length} tokens, the documents hold fewer; "
                "use a smaller --seq-length or more data"
            )
        epoch += 1


def _packed(documents: list[Document], tokenizer: Any, seq_length: int) -> Iterator[dict[str, Tensor]]:
    """Question and context, ended by the end-of-text token, joined and cut into whole sequences."""
    left: list[int] = []
    for chunk in _chunks(documents):
        texts = [f"{document.question} {document.context}" for document in chunk]
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            left += [*ids, tokenizer.eos_token_id]
            while len(left) >= seq_length:
                ids_now = torch.tensor(left[:seq_length])
                left = left[seq_length:]
                yield {"input_ids": ids_now, "labels": ids_now.clone()}


def _pairs(documents: list[Document], tokenizer: Any, seq_length: int) -> Iterator[dict[str, Tensor]]:
    """[CLS] question [SEP] context [SEP], cut or padded to one sequence."""
    for chunk in _chunks(documents):
        encoded = tokenizer(
            [document.question for document in chunk],
            [document.context for document in chunk],
            truncation=True,
            max_length=seq_length,
            padding="max_length",
            verbose=False,
            return_special_tokens_mask=True,
            return_tensors="pt",
        )
        for ids, mask, special in zip(encoded["input_ids"], encoded["attention_mask"], encoded["special_tokens_mask"]):
            yield {"input_ids": ids, "attention_mask": mask, "special": special}


def _mask(row: dict[str, Tensor], tokenizer: Any, seed: int) -> dict[str, Tensor]:
    """BERT's masking of one sequence, drawn from `seed`; at least one token is masked."""
    generator = torch.Generator().manual_seed(seed)
    ids = row["input_ids"]
    draw = torch.rand(ids.shape, generator=generator)
    draw[(row["special"] != 0) | (row["attention_mask"] == 0)] = 2.0
    chosen = draw < _MASKED_SHARE
    chosen[draw.argmin()] = True
    how = torch.rand(ids.shape, generator=generator)
    random_ids = torch.randint(len(tokenizer), ids.shape, generator=generator)
    masked = torch.where(chosen & (how < 0.8), tokenizer.mask_token_id, ids)
    masked = torch.where(chosen & (how >= 0.9), random_ids, masked)
    labels = torch.where(chosen, ids, _IGNORED)
    return {"input_ids": masked, "attention_mask": row["attention_mask"], "labels": labels}


def _chunks(documents: list[Document]) -> Iterator[list[Document]]:
    for begin in range(0, len(documents), _CHUNK):
        yield documents[begin : begin + _CHUNK]
