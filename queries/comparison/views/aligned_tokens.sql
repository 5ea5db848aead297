-- Question: Which token of the one run is which of the other?
-- Formula: that of the same document and stack at the same position. The tokens of a document follow one
--   another without a gap, so where its first one is tells where all are.
-- Grain: one row per token, (shard, tok); in the other run (other_shard, other_tok).
-- Reads: aligned_documents, tokens, other.tokens
with begun as (
    select
        aligned_documents.shard,
        aligned_documents.doc,
        aligned_documents.doc_id,
        theirs.shard as other_shard,
        theirs.stack,
        theirs.tok as first_tok
    from aligned_documents
    inner join other.tokens as theirs
        on aligned_documents.other_shard = theirs.shard and aligned_documents.other_doc = theirs.doc
    where
        aligned_documents.shard is not null
        and theirs.position = 0
)

select
    tokens.shard,
    tokens.tok,
    begun.other_shard,
    begun.first_tok + tokens.position as other_tok,
    tokens.stack,
    begun.doc_id,
    tokens.position
from tokens
inner join begun using (shard, doc, stack)
