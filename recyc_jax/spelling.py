"""Text of tokens that come one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Spelling:
    """The text of a row's tokens as they come. A character that takes several tokens appears with its last one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._ids = tokenizer, []
        self._begin, self._read = 0, 0  # the text of _ids[_begin:_read] has been handed out

    def add(self, ids: Sequence[int], is_last: bool = False) -> str:
        """What `ids` add to the text. The last call hands out half a character too, as U+FFFD."""
        self._ids += ids
        # decoded with some tokens before, since a tokenizer may write a token otherwise at a text's beginning
        before, now = self._text(self._ids[self._begin : self._read]), self._text(self._ids[self._begin :])
        if len(now) <= len(before) or (now.endswith("\ufffd") and not is_last):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
