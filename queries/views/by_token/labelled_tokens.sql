-- Question: Which token stands where in which document, labelled by its group?
-- Formula: as without groups; characters is null, because which of them a token stands for is not recorded.
-- Grain: one row per token, (shard, tok).
-- Reads: tokens, documents, vocab, token_groups
select
    tokens.shard,
    tokens.stack,
    tokens.tok,
    tokens.doc,
    tokens.position,
    tokens.token_id,
    vocab.token,
    tokens.is_special,
    documents.doc_id,
    token_groups.label,
    documents.parallel_id,
    null::uinteger as characters,
    documents.truncated
from tokens
inner join documents using (shard, doc)
inner join token_groups using (shard, tok)
left join vocab on tokens.token_id = vocab.token_id
