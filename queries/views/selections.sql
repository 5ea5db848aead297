-- Question: Which experts did each token get, and with which weight?
-- Grain: one row per pick, (shard, stack, layer, tok, rank). `rank` is the place in the model's own order:
--   0 for e0, 1 for e1 …; a layer that chooses fewer experts than others has fewer ranks. `dropped`:
--   chosen, but kept from its expert by a capacity limit; false where there is none.
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

ranks as (
    select unnest(range(max(top_k)))::integer as rank
    from layers
)

-- indexing by rank costs nothing where a query does not read it; generate_subscripts would
select
    routed.shard,
    routed.stack,
    routed.layer,
    routed.tok,
    routed.label,
    routed.is_special,
    ranks.rank,
    routed.experts[ranks.rank + 1]::integer as expert,
    routed.weights[ranks.rank + 1] as weight,
    coalesce(routed.drops[ranks.rank + 1], false) as dropped
from routed
cross join ranks
where routed.experts[ranks.rank + 1] is not null
