-- Question: Where in its document is the token?
-- Formula: positions from 0, special tokens counted, in the buckets of position_profile, 0, 1, 2-3, 4-7 …,
--   with leading zeros.
-- Groups: tokens
-- Reads: tokens
with buckets as (
    select
        shard,
        tok,
        if(position = 0, 0, 2 ** floor(log2(position)))::bigint as first_position
    from tokens
)

select
    shard,
    tok,
    if(
        first_position < 2,
        format('{:06d}', first_position),
        format('{:06d}-{:06d}', first_position, 2 * first_position - 1)
    ) as label
from buckets
