"""Compares two runs field by field: whether they cover the same tokens and routers, and what could not be compared.

Texts agree if the vocabularies are the same, both runs have the same documents under the same labels, and each document
has the same tokens: as many, special at the same positions, and with the same ids. If a run stores no ids, or a
permutation of them that the other does not share, vocabulary and ids are reported as unchecked, not as different.
An imported run lacks tokens that the engine did not tell of: the tokens that both runs have must be the same ones.
Documents are compared by a digest of their tokens, so memory grows with the number of documents, not of tokens.

Routers agree if both runs recorded the same ones; with `geometry`, they also need the same numbers of experts and of
chosen experts. This module only reads views and reports differences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from collector.query.warehouse import Run

_VOCABULARY = """
select token_id, ours.token, theirs.token, count(*) over ()
from vocab as ours full join other.vocab as theirs using (token_id)
where ours.token is distinct from theirs.token or ours.is_special is distinct from theirs.is_special
order by token_id limit 1
"""
_DOCUMENTS = """
select doc_id, label, shard is null, count(*) over (partition by shard is null)
from aligned_documents
where (shard is null or other_shard is null) and ($labels is null or list_contains($labels, label))
qualify row_number() over (partition by shard is null order by doc_id, label, copy) = 1
order by 3
"""
_LABELS = """
with alone as (select * from aligned_documents where shard is null or other_shard is null)
select doc_id, ours.label, theirs.label, count(*) over ()
from alone as ours inner join alone as theirs using (doc_id, copy)
where ours.other_shard is null and theirs.shard is null
    and ($labels is null or list_contains($labels, ours.label) or list_contains($labels, theirs.label))
order by doc_id, copy limit 1
"""
_DIGESTS = """
select shard, doc, count(*) as tokens,
    bit_xor(hash(stack, position, is_special, if($ids, token_id, null))) as digest
from {tokens} where list_contains($stacks, stack) group by shard, doc
"""
_TOKENS = f"""
with ours as ({_DIGESTS.format(tokens="tokens")}), theirs as ({_DIGESTS.format(tokens="other.tokens")})
select doc_id, label, ours.tokens, theirs.tokens, shard, doc, other_shard, other_doc, count(*) over ()
from aligned_documents
inner join ours using (shard, doc)
inner join theirs on other_shard = theirs.shard and other_doc = theirs.doc
where (ours.tokens, ours.digest) is distinct from (theirs.tokens, theirs.digest)
    and ($labels is null or list_contains($labels, label))
order by shard, doc limit 1
"""
_FIRST_TOKEN = """
select stack, position, ours.token_id, theirs.token_id, ours.is_special
from tokens as ours inner join other.tokens as theirs using (stack, position)
where ours.shard = $shard and ours.doc = $doc and theirs.shard = $other_shard and theirs.doc = $other_doc
    and list_contains($stacks, stack)
    and (ours.is_special != theirs.is_special or ($ids and ours.token_id is distinct from theirs.token_id))
order by stack, position limit 1
"""


_COMMON_TOKENS = """
select aligned_tokens.doc_id, label, aligned_tokens.stack, aligned_tokens.position, ours.token_id, theirs.token_id,
    count(*) over ()
from aligned_tokens
inner join tokens as ours using (shard, tok)
inner join documents using (shard, doc)
inner join other.tokens as theirs on other_shard = theirs.shard and other_tok = theirs.tok
where ours.token_id is distinct from theirs.token_id
    and list_contains($stacks, aligned_tokens.stack)
    and ($labels is null or list_contains($labels, label))
order by shard, tok limit 1
"""
_UNMATCHED = """
select (select count(*) from tokens) - count(*), (select count(*) from other.tokens) - count(*)
from aligned_tokens
"""


def compare_texts(run: Run, other: Run, names: tuple[str, str], labels: Sequence[str] | None = None) -> list[str]:
    """Compares vocabulary, documents, labels and tokens.

    Args:
        run: the first run, in whose DuckDB the views of the second are in the schema `other`.
        other: the second run.
        names: names of the two runs in messages.
        labels: labels of the documents to compare (default: all).

    Returns:
        The fields that differ, each with its first example; an empty list if the texts are the same.
    """
    ids = not uncomparable(run, other, names)
    return [
        *_vocabulary(run, other, names, ids=ids),
        *_documents(run, names, labels),
        *_tokens(run, other, names, labels, ids=ids),
    ]


def compare_routers(
    run: Run, other: Run, names: tuple[str, str], *, stack: str | None, layer: int | None, geometry: bool
) -> list[str]:
    """Compares which routers were recorded, and with `geometry` E and k of each.

    Args:
        run: the first run.
        other: the second run.
        names: names of the two runs in messages.
        stack: compare only routers of this stack (default: all).
        layer: compare only routers of this layer (default: all).
        geometry: whether E and k must be the same.
    """
    ours, theirs = (_routers(each, stack, layer) for each in (run, other))
    found = [
        f"routers: {_router_names(has.keys() - lacks.keys())} only in {name} (--stack and --layer choose among others)"
        for has, lacks, name in ((ours, theirs, names[0]), (theirs, ours, names[1]))
        if has.keys() - lacks.keys()
    ]
    for field, key, what in (("E", "n_experts", "experts"), ("k", "top_k", "chosen per token")) if geometry else ():
        differing = sorted(router for router in ours.keys() & theirs.keys() if ours[router][key] != theirs[router][key])
        if differing:
            values = [
                f"{each[differing[0]][key]} {what} in {name}" for each, name in zip((ours, theirs), names, strict=True)
            ]
            found.append(f"{field}: {_router_names(differing[:1])} has {' and '.join(values)}")
    return found


def _routers(run: Run, stack: str | None, layer: int | None) -> dict[tuple[str, int], dict[str, Any]]:
    return {
        (one["stack"], one["layer"]): one
        for one in run.info["layers"]
        if stack in (None, one["stack"]) and layer in (None, one["layer"])
    }


def _router_names(routers: Sequence[tuple[str, int]] | set[tuple[str, int]]) -> str:
    return ", ".join(f"{stack} layer {layer}" for stack, layer in sorted(routers))


def uncomparable(run: Run, other: Run, names: tuple[str, str]) -> tuple[str, ...]:
    """Describes what cannot be compared of two runs' texts, and why.

    Args:
        run: the first run.
        other: the second run.
        names: names of the two runs in messages.
    """
    configs = [each.info["config"] for each in (run, other)]
    kinds = [config.get("token_ids", "keep") for config in configs]
    what = "vocabulary and token ids"
    if "drop" in kinds:
        return (
            f"{what}, for {' and '.join(n for n, kind in zip(names, kinds, strict=True) if kind == 'drop')} has none",
        )
    if kinds[0] != kinds[1]:
        return (f"{what}, for those of {names[kinds.index('hash')]} are hashed",)
    if configs[0].get("token_key_fingerprint") != configs[1].get("token_key_fingerprint"):
        return (f"{what}, for they are hashed with different keys",)
    return ()


def unmatched(run: Run, other: Run, names: tuple[str, str]) -> tuple[str, ...]:
    """Describes what an imported run leaves uncompared: the tokens of one run alone, and its vocabulary.

    Args:
        run: the first run.
        other: the second run.
        names: names of the two runs in messages.
    """
    if not _is_imported(run, other):
        return ()
    counts = _first(run, _UNMATCHED)
    assert counts is not None, "counts have a row"
    told = [f"{count:,} tokens that only {name} has" for count, name in zip(counts, names, strict=True) if count]
    unspelled = [name for each, name in zip((run, other), names, strict=True) if "tokenizer" not in each.info]
    return (*told, *(f"the vocabulary, for {name} was imported without --tokenizer" for name in unspelled))


def _is_imported(*runs: Run) -> bool:
    """Whether one of the runs may lack tokens of its texts, or their spelling."""
    return any("imported" in run.info for run in runs)


def _vocabulary(run: Run, other: Run, names: tuple[str, str], *, ids: bool) -> Iterator[str]:
    entries = [each.info.get("tokenizer", {}).get("entries") for each in (run, other)]
    if None not in entries and entries[0] != entries[1]:
        yield f"tokenizer: {entries[0]:,} entries in {names[0]} and {entries[1]:,} in {names[1]}"
    elif ids and (not _is_imported(run, other) or None not in entries) and (row := _first(run, _VOCABULARY)):
        token_id, ours, theirs, count = row
        yield f"vocabulary: {count:,} entries, first id {token_id}, {ours!r} in {names[0]} and {theirs!r} in {names[1]}"


def _documents(run: Run, names: tuple[str, str], labels: Sequence[str] | None) -> Iterator[str]:
    if row := _first(run, _LABELS, labels=labels):
        doc_id, ours, theirs, count = row
        yield f"labels: {count:,} documents, first {doc_id!r}, {ours!r} in {names[0]} and {theirs!r} in {names[1]}"
        return
    for doc_id, label, is_theirs, count in run.cursor().sql(_DOCUMENTS, params={"labels": labels}).fetchall():
        yield f"documents: {count:,} only in {names[is_theirs]}, first {doc_id!r} ({label})"


def _tokens(run: Run, other: Run, names: tuple[str, str], labels: Sequence[str] | None, *, ids: bool) -> Iterator[str]:
    recorded = [{one["stack"].partition(".")[0] for one in each.info["layers"]} for each in (run, other)]
    chosen: dict[str, Any] = {"stacks": sorted(recorded[0] & recorded[1])}
    if _is_imported(run, other):
        if ids and (row := _first(run, _COMMON_TOKENS, labels=labels, **chosen)):
            doc_id, label, stack, position, ours, theirs, count = row
            yield (
                f"tokens: {count:,} differ, first in {doc_id!r} ({label}) at {stack} position {position}: id {ours} in "
                f"{names[0]} and {theirs} in {names[1]}"
            )
        return
    chosen["ids"] = ids
    row = _first(run, _TOKENS, labels=labels, **chosen)
    if row is None:
        return
    doc_id, label, ours, theirs, *place, count = row
    where = f"tokens: {count:,} documents differ, first {doc_id!r} ({label})"
    if ours != theirs:
        yield f"{where} with {ours:,} in {names[0]} and {theirs:,} in {names[1]}"
        return
    keys = ("shard", "doc", "other_shard", "other_doc")
    first = _first(run, _FIRST_TOKEN, **dict(zip(keys, place, strict=True)), **chosen)
    assert first is not None, f"the digests of document {doc_id!r} differ, its tokens do not"
    stack, position, our_id, their_id, is_special = first
    if ids and our_id != their_id:
        yield f"{where} at {stack} position {position}: id {our_id} in {names[0]} and {their_id} in {names[1]}"
    else:
        yield f"{where} at {stack} position {position}: special only in {names[0 if is_special else 1]}"


def _first(run: Run, statement: str, **params: Any) -> tuple[Any, ...] | None:
    rows = run.cursor().sql(statement, params=params).fetchall() if params else run.cursor().sql(statement).fetchall()
    return rows[0] if rows else None
