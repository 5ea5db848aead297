"""Checks the documents, tokens and rejects of one shard against each other and against the commit record.

Tokens are checked against documents, and routing rows against tokens; every key must occur exactly once. The commit
record serves only as a reference to compare with. The files are local copies, already verified byte for byte.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from collector.store.run_directory import REJECTS
from collector.upkeep.verify.reading import (
    STACKS,
    Card,
    Documents,
    Tokens,
    codes,
    columns,
    each_once,
    groups,
    numbers,
    told,
)
from collector.upkeep.verify.routing import check_routing

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from collector.store.run_directory import Commit
    from collector.upkeep.verify.reading import Problems

_NONE = 255
_CHECKS = {"routing": check_routing}
"""Recorded table -> what it must hold; of all tables the columns are checked."""


def problems(paths: Mapping[str, Path], commit: Commit, card: Card) -> Problems:
    """Yields the problems of a shard's tables, one line each; a table is read only if those before it are sound.

    Args:
        paths: local files by table.
        commit: the shard's record.
        card: the facts of run.json.

    Raises:
        pyarrow.ArrowException, OSError: a file is not Parquet or is damaged inside.
    """
    for table, path in paths.items():
        found, expected = columns(pq.read_schema(path)), columns(card.schemas[table])
        if found != expected:
            different = sorted(set(found) ^ set(expected)) or found
            yield f"{table} has other columns than the run's settings give: {', '.join(map(' '.join, different))}"
            return
    if REJECTS in paths:
        yield from _check_rejects(paths[REJECTS], commit, card)
    documents, wrong = _finished(_check_documents(paths["documents"], commit, card))
    if wrong:
        yield from wrong
        return
    tokens, wrong = _finished(_check_tokens(paths["tokens"], commit, card, documents))
    if wrong:
        yield from wrong
        return
    for table, check in _CHECKS.items():
        if table in paths:
            yield from check(paths[table], commit, card, documents, tokens)


def _finished(checking: Generator[str, None, Any]) -> tuple[Any, list[str]]:
    """Runs a check to its end; returns the data that it read and the problems that it found."""
    wrong = []
    while True:
        try:
            wrong.append(next(checking))
        except StopIteration as end:
            return end.value, wrong


# ---- rows that became no document ----


def _check_rejects(path: Path, commit: Commit, card: Card) -> Problems:
    wrong: Counter[str] = Counter()
    rows: Counter[tuple[str, int]] = Counter()
    reasons: Counter[str] = Counter()
    for group in groups(path, REJECTS, commit, card.schemas[REJECTS], wrong):
        rows.update(zip(group["source"].to_pylist(), group["row"].to_pylist(), strict=True))
        reasons.update(group["reason"].to_pylist())
    wrong["rejects: a row occurs twice"] = len(rows) - list(rows.values()).count(1)
    yield from told(wrong)
    if reasons != Counter({reason: skipped.count for reason, skipped in commit.skipped.items()}):
        yield "rejects holds other reasons, or other numbers of rows, than the commit record says"


# ---- documents ----


def _check_documents(path: Path, commit: Commit, card: Card) -> Generator[str, None, Documents]:
    count = commit.documents
    wrong: Counter[str] = Counter()
    labels: dict[str, int] = {}
    seen, tokens, targets, label = (np.zeros(count, np.int64) for _ in range(4))
    decoded = characters = truncated = 0
    for group in groups(path, "documents", commit, card.schemas["documents"], wrong):
        doc = numbers(group["doc"])
        wrong["documents.doc is beyond the shard's documents"] += int((doc >= count).sum())
        if wrong.total():
            break
        seen += np.bincount(doc, minlength=count)
        tokens[doc] = numbers(group["tokens"])
        targets[doc] = group["target_tokens"].fill_null(0).to_numpy()
        decoded += len(group) - group["target_tokens"].null_count
        for chunk in group["label"].chunks:
            for name in chunk.dictionary.to_pylist():
                labels.setdefault(name, len(labels))
        label[doc] = codes(group["label"], labels)
        characters += pc.sum(group["characters"]).as_py() or 0
        truncated += pc.sum(group["truncated"]).as_py() or 0
    yield from told(wrong)
    if not wrong.total():
        yield from each_once(seen, "documents: doc")
        if decoded not in (0, count):
            yield f"documents.target_tokens is null in {count - decoded:,} of {count:,} rows"
        if (characters, truncated) != (commit.characters, commit.truncated):
            yield (f"documents hold {characters:,} characters, {truncated:,} truncated; the commit record says "
                   f"{commit.characters:,}, {commit.truncated:,}")  # fmt: skip
    return Documents(tokens=tokens, target_tokens=targets if decoded else None, label=label, labels=labels)


# ---- tokens ----


def _check_tokens(
    path: Path, commit: Commit, card: Card, documents: Documents
) -> Generator[str, None, Tokens]:  # fmt: skip
    count = commit.tokens
    wrong: Counter[str] = Counter()
    seen, doc, position = (np.zeros(count, np.int64) for _ in range(3))
    stack, special = np.full(count, _NONE, np.uint8), np.zeros(count, bool)
    for group in groups(path, "tokens", commit, card.schemas["tokens"], wrong):
        tok, of = numbers(group["tok"]), numbers(group["doc"])
        nulls = group["token_id"].null_count
        wrong["tokens.token_id is null"] += 0 if card.drops_token_ids else nulls
        wrong["tokens.token_id is set, but the run drops it"] += len(group) - nulls if card.drops_token_ids else 0
        stacks = codes(group["stack"], {name: code for code, name in enumerate(STACKS)})
        wrong["tokens.stack is neither encoder nor decoder"] += int((stacks < 0).sum())
        wrong["tokens.tok is beyond the shard's tokens"] += int((tok >= count).sum())
        wrong["tokens.doc is no document"] += int((of >= commit.documents).sum())
        if wrong.total():
            break
        seen += np.bincount(tok, minlength=count)
        stack[tok], doc[tok], position[tok] = stacks, of, numbers(group["position"])
        special[tok] = numbers(group["is_special"])
    yield from told(wrong)
    if not wrong.total():
        yield from each_once(seen, "tokens: tok")
        if (seen == 1).all():
            yield from _check_lengths(stack, doc, position, documents, may_have_gaps=card.is_imported)
    return Tokens(stack=stack, doc=doc, is_special=special)


def _check_lengths(
    stack: NDArray[np.uint8], doc: NDArray[np.int64], position: NDArray[np.int64], documents: Documents, *,
    may_have_gaps: bool,
) -> Problems:  # fmt: skip
    """Checks that each document has as many tokens as its row says, in each stack.

    Their positions are 0, 1, 2 …, but for gaps, if there may be any; tokens come in the order of positions.
    """
    expected = {STACKS[code]: documents.tokens for code in np.unique(stack)}
    if documents.target_tokens is not None:
        expected = {"encoder": documents.tokens, "decoder": documents.target_tokens}
    if len(expected) == 2 and documents.target_tokens is None:
        yield "tokens of an encoder and of a decoder, but documents without target_tokens"
        return
    for name, lengths in expected.items():
        inside = stack == STACKS.index(name)
        found = np.bincount(doc[inside], minlength=len(lengths))
        if (different := np.flatnonzero(found != lengths)).size:
            one = different[0]
            yield f"document {one} has {found[one]:,} tokens of the {name} instead of {lengths[one]:,}"
        elif may_have_gaps:
            same = doc[inside][1:] == doc[inside][:-1]
            if (same & (position[inside][1:] <= position[inside][:-1])).any():
                yield f"tokens.position does not rise in a document of the {name}"
        elif (position[inside] >= lengths[doc[inside]]).any():
            yield f"tokens.position is beyond its document in the {name}"
        else:
            starts = np.cumsum(lengths) - lengths
            places = np.bincount(starts[doc[inside]] + position[inside], minlength=int(lengths.sum()))
            yield from each_once(places, f"tokens of the {name}: the place")
