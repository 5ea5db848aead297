"""Tokens as people can read them, wherever they are shown.

A run's vocabulary has decoded byte-level pieces already, and spells bytes that are no whole character as `<E3><81>`.
`read_on` makes a text of such pieces again. `visible` is how a piece behaves on a screen: nothing is invisible, nothing
acts on the terminal or turns the line around, and a mark that combines with the letter before it has something of its
own to combine with.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_SIGNS = {"\n": "⏎", "\r": "␍", "\t": "⇥"}
_JOINERS = "\u200c\u200d"
"""Zero width (non-)joiner: they shape the letters beside them, so inside a piece they stay."""
_CIRCLE = "◌"
"""What Unicode shows a combining mark on that stands alone."""
_RUNS = re.compile(r"((?:<[0-9A-F]{2}>)+)")
"""Bytes, as the vocabulary spells them."""
_GOES_ON = "‥"
"""A character of which only some bytes are there."""


def read_on(tokens: Iterable[str | None]) -> Iterator[str | None]:
    """Each token as what it adds to the text: the characters that its bytes complete.

    Args:
        tokens: neighbours, as the vocabulary spells them; None where there is no spelling.

    Yields:
        `<EC><97>` as `‥`, because its character goes on, and `<AC>` behind it as `여`; most pieces as they are.
    """
    return _decoded(None if token is None else _bytes(token) for token in tokens)


def in_context(before: str, token: str, after: str) -> tuple[str, ...]:
    """The same of a token and of what stands around it, many spellings in a row; what is cut off at an end as `‥`."""
    rows = (_RUNS.split(text) for text in (before, token, after))
    found = _decoded(b"".join(_bytes(part) for part in parts) for parts in rows)
    return tuple(re.sub("\ufffd+", _GOES_ON, text or "") for text in found)


def _bytes(token: str) -> bytes:
    if _RUNS.fullmatch(token):
        return bytes.fromhex(token.replace("<", "").replace(">", ""))
    return token.encode()


def _decoded(parts: Iterable[bytes | None]) -> Iterator[str | None]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for part in parts:
        if part is None:
            decoder.reset()
            yield None
        else:
            added = decoder.decode(part)
            yield added + _GOES_ON if decoder.getstate()[0] else added


def visible(token: str | None, token_id: int | None = None) -> str:
    """A token as it can be shown; its spaces stay.

    Args:
        token: its spelling; None where the run has none.
        token_id: shown instead, as `#17`.

    Returns:
        At least one character.
    """
    if not token:
        return "∅" if token_id is None else f"#{token_id}"
    last = len(token) - 1
    shown = "".join(sign if sign in _JOINERS and 0 < place < last else _shown(sign) for place, sign in enumerate(token))
    return _CIRCLE + shown if unicodedata.category(token[0]).startswith("M") else shown


def spelled(piece: str) -> str:
    """A visible piece for a column of a table, where a space at either end would be lost."""
    body = piece.strip(" ")
    before = len(piece) - len(piece.lstrip(" "))
    return "␣" * before + body + "␣" * (len(piece) - before - len(body))


def is_right_to_left(text: str) -> bool:
    """Whether more of its letters are written from right to left than from left to right."""
    directions = Counter(map(unicodedata.bidirectional, text))
    return directions["R"] + directions["AL"] > directions["L"]


def _shown(sign: str) -> str:
    """One character: itself, a sign for it, or its number (controls, directions, other spaces, unassigned)."""
    category = unicodedata.category(sign)
    hidden = category[0] == "C" or (category[0] == "Z" and sign != " ")
    return _SIGNS.get(sign, f"<U+{ord(sign):04X}>") if hidden else sign
