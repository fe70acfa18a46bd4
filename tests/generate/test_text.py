"""Text that streams is the text of all tokens, whatever comes between."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshloom.generate.text import TextStream
from meshloom.model.config import load_tokenizer

BYTES = load_tokenizer("bytes")


@given(text=st.text(max_size=30))
def test_pieces_join_to_the_text(text: str) -> None:
    ids = BYTES(text)["input_ids"]
    stream = TextStream(BYTES)
    pieces = [stream.add([token]) for token in ids]
    assert "".join(pieces) + stream.finish() == BYTES.decode(ids, skip_special_tokens=True)


def test_half_a_character_waits() -> None:
    stream = TextStream(BYTES)
    first, second = BYTES("é")["input_ids"]
    assert stream.add([first]) == ""
    assert stream.add([second]) == "é"
    assert stream.finish() == ""


def test_what_is_never_whole_is_told_in_the_end() -> None:
    stream = TextStream(BYTES)
    assert stream.add(BYTES("é")["input_ids"][:1]) == ""
    assert stream.finish() == "�"
