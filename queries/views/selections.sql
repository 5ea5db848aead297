-- Question: Which experts did each token get, and with which weight?
-- Grain: one row per pick, (shard, stack, layer, tok, rank). `rank` is the place in the model's own order:
--   0 for e0, 1 for e1 …; a layer that chooses fewer experts than others has fewer ranks. `is_top1`: the
--   pick with the token's highest weight (ties: the first). `dropped`: chosen, but kept from its expert by
--   a capacity limit; false where there is none.
-- Reads: routing, layers
with limited as (
    select
        *,
        -- matched below, because a run without a capacity limit has no d0 …
        false as never_dropped
    from routing
),

routed as (
    select
        shard,
        stack,
        layer,
        tok,
        label,
        is_special,
        [*columns('^e[0-9]+$')] as experts,
        [*columns('^w[0-9]+$')] as weights,
        [*columns('^(d[0-9]+|never_dropped)$')] as drops
    from limited
),

-- once per token, not per pick
led as (
    select
        *,
        list_position(weights, list_max(weights)) - 1 as top_rank
    from routed
),

ranks as (
    select unnest(range(max(top_k)))::integer as rank
    from layers
)

-- indexing by rank costs nothing where a query does not read it; generate_subscripts would
select
    led.shard,
    led.stack,
    led.layer,
    led.tok,
    led.label,
    led.is_special,
    ranks.rank,
    led.experts[ranks.rank + 1]::integer as expert,
    led.weights[ranks.rank + 1] as weight,
    ranks.rank = led.top_rank as is_top1,
    coalesce(led.drops[ranks.rank + 1], false) as dropped
from led
cross join ranks
where led.experts[ranks.rank + 1] is not null
