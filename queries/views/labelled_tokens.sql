-- Question: Which token stands where in which document?
-- Formula: token = the vocabulary's own spelling of the id, null where it has none; position from 0, special
--   tokens counted.
-- Grain: one row per token, (shard, tok).
-- Reads: tokens, documents, vocab
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
    documents.label,
    documents.parallel_id,
    documents.characters,
    documents.truncated
from tokens
inner join documents using (shard, doc)
left join vocab on tokens.token_id = vocab.token_id
