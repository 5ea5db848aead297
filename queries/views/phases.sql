-- Question: Which tokens did the model read, and which did it write?
-- Formula: phase = prompt up to the document's prompt_tokens, generated after them.
-- Grain: one row per token, (shard, tok).
-- Reads: tokens, documents
-- Needs: documents.prompt_tokens
select
    tokens.shard,
    tokens.tok,
    tokens.doc,
    if(tokens.position < documents.prompt_tokens, 'prompt', 'generated') as phase
from tokens
inner join documents using (shard, doc)
