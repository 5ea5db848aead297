-- Question: Which groups of tokens are there, and how many tokens in each?
-- Formula: tokens = those of the text, which the encoder reads of an encoder-decoder model. characters is
--   null: which of a text's characters a token stands for is not recorded.
-- Grain: one row per group.
-- Reads: tokens, token_groups
with stacks as (
    select max(stack) as stack
    from tokens
),

parts as (
    select
        tokens.shard,
        tokens.doc,
        token_groups.label,
        count_if(tokens.stack = (select stacks.stack from stacks)) as tokens
    from tokens
    inner join token_groups using (shard, tok)
    group by tokens.shard, tokens.doc, token_groups.label
)

select
    label,
    count(*) as documents,
    sum(tokens)::bigint as tokens,
    null::bigint as characters
from parts
group by label
