-- Question: In which part of its text does the token lie?
-- Formula: the label of the shortest span around the token: of a conversation the role whose turn it is, or
--   think; (none): in no span, such as the chat template's own words.
-- Groups: tokens
-- Reads: tokens
-- Needs: tokens.span
select
    shard,
    tok,
    coalesce(span, '(none)') as label
from tokens
