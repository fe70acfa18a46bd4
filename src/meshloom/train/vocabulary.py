"""Train a tokenizer on the sources that training reads, and leave it as a folder that HF's AutoTokenizer opens.

Text is put into NFC, so that Hangul typed on any system is the same; digits stand alone; any text comes back whole,
because what the vocabulary lacks is spelt in bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from meshloom.chakra.file import whole_file
from meshloom.errors import DataError, FolderError, UsageError
from meshloom.model.config import SPECIAL  # one set, so that a vocabulary serves causal and masked models
from meshloom.train.readers import read
from meshloom.train.sources import Reading, Source, Tally

Kind = Literal["bpe", "unigram"]

_SPACE = "▁"  # what unigram vocabularies write for a space; in text it comes back as one
_BYTES = [f"<0x{value:02X}>" for value in range(256)]
MIN_VOCAB = len(SPECIAL) + len(_BYTES)


def train_tokenizer(
    sources: Sequence[Source],
    out: Path,
    *,
    vocab_size: int,
    kind: Kind,
    reading: Reading,
    show: bool = False,
) -> tuple[int, int]:
    """Train and write `out`; returns the size of the vocabulary and how many bad lines were skipped.

    The vocabulary is smaller than asked where text is short. `show` lets the trainer draw its own bars.

    Raises UsageError if `vocab_size` has no room for bytes and special tokens, DataError, FolderError.
    """
    if vocab_size < MIN_VOCAB:
        raise UsageError(
            f"--vocab-size {vocab_size}: expected at least {MIN_VOCAB}, the bytes and the {len(SPECIAL)} special tokens"
        )
    if out.exists() and any(out.iterdir()):
        raise FolderError(f"{out}: expected a new or empty folder, it holds files already; choose another --out")
    tally = Tally()
    texts = _texts(sources, reading, tally)
    try:
        tokenizer = _bpe(texts, vocab_size, show) if kind == "bpe" else _unigram(texts, vocab_size, show)
    except (DataError, FolderError):
        raise
    except Exception as error:  # the trainers raise plain Exceptions, with what was wrong in them
        if "not large enough to contain all chars" in str(error):
            raise DataError(
                f"tokenizer: expected a larger --vocab-size than {vocab_size}: unigram keeps every character of the "
                "text; give more, or use --kind bpe"
            ) from error
        raise DataError(f"tokenizer: expected text to train {kind} on, the trainer says: {error}") from error
    _save(tokenizer, out)
    return int(tokenizer.get_vocab_size(with_added_tokens=True)), tally.num_bad


def _texts(sources: Sequence[Source], reading: Reading, tally: Tally) -> Iterator[str]:
    last = ""
    for file in chain.from_iterable(source.files for source in sources):
        for document in read(file, reading, tally, lambda share: None):
            if isinstance(document, str):
                yield document
                continue
            yield document.question
            if document.context != last:  # one paragraph has many questions, and is read once
                last = document.context
                yield last


def _bpe(texts: Iterator[str], vocab_size: int, show: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_special_tokens(),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _unigram(texts: Iterator[str], vocab_size: int, show: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\r\n]+"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never"),
        ]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - len(_BYTES),
        special_tokens=_special_tokens(),
        unk_token=SPECIAL["unk_token"],
        show_progress=show,
    )
    tokenizer.train_from_iterator(texts, trainer)
    table = json.loads(tokenizer.to_str())
    vocab = table["model"]["vocab"]
    # The trainer knows no bytes: they go last, as unlikely as can be, so that they spell only what nothing else does.
    lowest = min(score for _, score in vocab) - 10.0
    table["model"] |= {"vocab": vocab + [[piece, lowest] for piece in _BYTES], "byte_fallback": True}
    tokenizer = Tokenizer.from_str(json.dumps(table))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Replace(_SPACE, " ")])
    return tokenizer


def _special_tokens() -> list[AddedToken]:
    return [AddedToken(token, special=True, normalized=False) for token in SPECIAL.values()]


def _save(tokenizer: Tokenizer, out: Path) -> None:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **SPECIAL,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
    }
    with whole_file(out / "tokenizer.json") as file:
        file.write(tokenizer.to_str(pretty=True).encode())
    with whole_file(out / "tokenizer_config.json") as file:
        file.write(json.dumps(config, ensure_ascii=False, indent=1).encode())
