"""The documents of a shard, read and tokenized."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from collector.store.run_directory import Skipped

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from collector.capture.batches import TokenTable
    from collector.data.sources import BadRow, Document

_EXAMPLES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardText:
    """The documents of a shard, tokenized, and the rows that became no document."""

    documents: list[Document]
    tokens: dict[str, TokenTable]
    """Stack -> the tokens that it is given, in the order of the tokens table."""
    bad: list[BadRow]
    answers: list[str] | None = None
    """[D] what the model wrote, in words; None if it wrote nothing."""

    @property
    def characters(self) -> list[int]:
        """[D] characters of the text, with those of the answer."""
        answers = self.answers or [""] * len(self.documents)
        return [len(document.text) + len(answer) for document, answer in zip(self.documents, answers, strict=True)]

    @property
    def count(self) -> int:
        """Number of tokens, those of encoder and decoder together."""
        return sum(len(table.ids) for table in self.tokens.values())

    def first_tok(self, stack: str) -> int:
        """The index of a stack's first token in the tokens table."""
        before = list(self.tokens)[: list(self.tokens).index(stack)]
        return sum(len(self.tokens[each].ids) for each in before)

    @property
    def truncated(self) -> NDArray[np.bool_]:
        """[D] whether the document's text or target was cut."""
        return np.logical_or.reduce([table.truncated for table in self.tokens.values()])

    @property
    def skipped(self) -> dict[str, Skipped]:
        """Reason -> the number of rows that became no document, with the places of the first few."""
        where: dict[str, list[str]] = defaultdict(list)
        for row in self.bad:
            where[row.reason].append(row.where)
        return {r: Skipped(count=len(w), examples=tuple(w[:_EXAMPLES])) for r, w in sorted(where.items())}
