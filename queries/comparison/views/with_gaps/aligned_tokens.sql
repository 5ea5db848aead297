-- Question: Which token of the one run is which of the other, if a run was imported?
-- Formula: that of the same document and stack at the same position. Tokens whose routing an engine lost,
--   and the last of each text, are in one run alone.
-- Grain: one row per token that both runs have, (shard, tok); in the other run (other_shard, other_tok).
-- Reads: aligned_documents, tokens, other.tokens
select
    tokens.shard,
    tokens.tok,
    theirs.shard as other_shard,
    theirs.tok as other_tok,
    tokens.stack,
    aligned_documents.doc_id,
    tokens.position
from tokens
inner join aligned_documents using (shard, doc)
inner join other.tokens as theirs
    on
        aligned_documents.other_shard = theirs.shard
        and aligned_documents.other_doc = theirs.doc
        and tokens.stack = theirs.stack
        and tokens.position = theirs.position
