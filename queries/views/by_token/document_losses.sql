-- Question: How well does the model predict each group of a document's tokens?
-- Formula: as without groups; characters is 0, because which of them a token stands for is not recorded.
-- Grain: one row per (shard, doc, label, is_special) with a loss.
-- Reads: tokens, token_groups
-- Needs: tokens.loss
select
    tokens.shard,
    tokens.doc,
    tokens.stack,
    null::utinyint as layer,
    token_groups.label,
    tokens.is_special,
    count(*) as tokens,
    sum(tokens.loss::double) as nats,
    0::double as whole_nats,
    0::bigint as characters
from tokens
left join token_groups using (shard, tok)
where tokens.loss is not null
group by tokens.shard, tokens.doc, tokens.stack, token_groups.label, tokens.is_special
