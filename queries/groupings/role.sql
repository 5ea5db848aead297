-- Question: Whose turn of the conversation is it?
-- Formula: the role: user, assistant …; thoughts are the assistant's; (none): the chat template's own words.
-- Groups: tokens
-- Reads: tokens
-- Needs: tokens.span
select
    shard,
    tok,
    case span when 'think' then 'assistant' else coalesce(span, '(none)') end as label
from tokens
