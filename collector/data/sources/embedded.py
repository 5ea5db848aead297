"""Reads the embedded corpus as a source: `demo`, `demo:train`, `demo:all`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, cast

from collector.config import DEMO
from collector.data.corpus import SOURCE, SPLITS, Sentence, Split, read_sentences
from collector.data.formats import Format, Span, even_spans

if TYPE_CHECKING:
    from collections.abc import Iterator


def split_of(spec: str) -> Split:
    """Returns the split that a specification names; `demo` alone is the held-out split.

    Raises:
        ValueError: there is no such split.
    """
    split = spec.removeprefix(DEMO).removeprefix(":") or SPLITS[0]
    if split not in SPLITS:
        raise ValueError(f"--data {spec}: the embedded corpus has the splits {', '.join(SPLITS)}")
    return cast("Split", split)


@functools.lru_cache(maxsize=1)
def _sentences(split: Split) -> tuple[Sentence, ...]:
    """Reads a split once, because some plans request thousands of small spans."""
    return tuple(read_sentences(split))


class Embedded(Format):
    """The sentences of one split, in the order of the corpus, with fixed columns."""

    def locate(self, every: int) -> Iterator[Span]:
        """See `Format.locate`."""
        return even_spans(len(_sentences(split_of(self.where))), every)

    def records(self, span: Span) -> Iterator[Sentence]:
        """See `Format.records`."""
        yield from _sentences(split_of(self.where))[span.first_row : span.first_row + span.rows]

    def fields(self, record: Sentence) -> dict[str, Any]:
        """See `Format.fields`."""
        doc_id = f"{SOURCE}/{record.iso}#{record.index}"
        return {"text": record.text, "label": record.label, "id": doc_id, "source": SOURCE}
