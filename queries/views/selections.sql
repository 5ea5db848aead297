-- Question: Which experts did each token get, and with which weight?
-- Grain: one row per pick, (shard, layer, tok, rank). `rank` is the place in the model's own order:
--   0 for e0, 1 for e1 …; a layer that chooses fewer experts than others has fewer ranks.
-- Reads: routing, layers
with routed as (
    select
        shard,
        layer,
        tok,
        label,
        is_special,
        [*columns('^e[0-9]+$')] as experts,
        [*columns('^w[0-9]+$')] as weights
    from routing
),

ranks as (
    select unnest(range(max(top_k)))::integer as rank
    from layers
)

-- indexing by rank costs nothing where a query does not read it; generate_subscripts would
select
    routed.shard,
    routed.layer,
    routed.tok,
    routed.label,
    routed.is_special,
    ranks.rank,
    routed.experts[ranks.rank + 1]::integer as expert,
    routed.weights[ranks.rank + 1] as weight
from routed
cross join ranks
where routed.experts[ranks.rank + 1] is not null
