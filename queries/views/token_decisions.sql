-- Question: Which token was it that each router decided about?
-- Formula: decisions, and of labelled_tokens the token's document (doc, parallel_id), place in it
--   (position) and spelling (token_id, token).
-- Grain: one row per (router, token): (shard, stack, layer, tok).
-- Reads: decisions, labelled_tokens
select
    decisions.*,
    labelled_tokens.doc,
    labelled_tokens.parallel_id,
    labelled_tokens.position,
    labelled_tokens.token_id,
    labelled_tokens.token
from decisions
inner join labelled_tokens using (shard, tok)
