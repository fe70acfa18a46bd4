"""Text from tokens as they come: what is certain is handed out at once, half a character waits for its rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class TextStream:
    """Turns one sequence's tokens into pieces of text that join to the text of all of them."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._begin, self._end = 0, 0  # tokens [begin, end) are told; those before begin change nothing any more

    def add(self, ids: Iterable[int]) -> str:
        """The text that these tokens add, as far as it is certain."""
        self._ids += ids
        return self._tell(certain=False)

    def finish(self) -> str:
        """What is left, whole characters or not."""
        return self._tell(certain=True)

    def _tell(self, *, certain: bool) -> str:
        told, now = self._text(self._ids[self._begin : self._end]), self._text(self._ids[self._begin :])
        if not certain and (now.endswith("�") or len(now) <= len(told)):
            return ""
        # a tokenizer may write the first token of a text otherwise than later ones, so the last ones are kept before it
        self._begin, self._end = self._end, len(self._ids)
        return now[len(told) :]

    def _text(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text
