"""Makes tokens readable for display.

A run's vocabulary contains decoded byte-level pieces, with incomplete characters spelled in bytes such as `<E3><81>`.
`read_on` turns such pieces back into text. `visible` makes a piece safe to display: nothing is invisible, nothing
controls the terminal or reverses the line, and a combining mark gets its own base character.
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
"""Zero width (non-)joiners shape adjacent letters, so they are kept inside a piece."""
_CIRCLE = "◌"
"""Unicode's base character for a combining mark on its own."""
_RUNS = re.compile(r"((?:<[0-9A-F]{2}>)+)")
"""Bytes in the vocabulary's spelling."""
_GOES_ON = "‥"
"""Placeholder for an incomplete character."""


def read_on(tokens: Iterable[str | None]) -> Iterator[str | None]:
    """Yields what each token adds to the text: the characters that its bytes complete.

    Args:
        tokens: consecutive tokens in the vocabulary's spelling; None where there is no spelling.

    Yields:
        `‥` for `<EC><97>`, because its character is incomplete, `여` for the following `<AC>`; most pieces unchanged.
    """
    return _decoded(None if token is None else _bytes(token) for token in tokens)


def in_context(before: str, token: str, after: str) -> tuple[str, ...]:
    """Does the same for a token and its context, each a sequence of spellings; cut-off characters become `‥`."""
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
    """Makes a token displayable; its spaces are kept.

    Args:
        token: its spelling; None if the run has none.
        token_id: shown instead of a missing spelling, as `#17`.

    Returns:
        At least one character.
    """
    if not token:
        return "∅" if token_id is None else f"#{token_id}"
    last = len(token) - 1
    shown = "".join(sign if sign in _JOINERS and 0 < place < last else _shown(sign) for place, sign in enumerate(token))
    return _CIRCLE + shown if unicodedata.category(token[0]).startswith("M") else shown


def spelled(piece: str) -> str:
    """Marks the leading and trailing spaces of a visible piece, which would be lost in a table."""
    body = piece.strip(" ")
    before = len(piece) - len(piece.lstrip(" "))
    return "␣" * before + body + "␣" * (len(piece) - before - len(body))


def is_right_to_left(text: str) -> bool:
    """Whether more letters of the text are written from right to left than from left to right."""
    directions = Counter(map(unicodedata.bidirectional, text))
    return directions["R"] + directions["AL"] > directions["L"]


def _shown(sign: str) -> str:
    """Returns a character, a visible sign for it, or its code (controls, directions, other spaces, unassigned)."""
    category = unicodedata.category(sign)
    hidden = category[0] == "C" or (category[0] == "Z" and sign != " ")
    return _SIGNS.get(sign, f"<U+{ord(sign):04X}>") if hidden else sign
