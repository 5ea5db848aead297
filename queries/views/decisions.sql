-- Question: How did each router decide about each token?
-- Formula: expert = the one with the highest weight (not every model sorts them; ties: the first
--   in the model's own order); weight_entropy = H(w / sum w) over the k weights, in nats.
-- Grain: one row per (token, layer): (shard, layer, tok).
-- Reads: routing
with routed as (
    select
        shard,
        layer,
        tok,
        label,
        is_special,
        [*columns('^e[0-9]+$')] as experts,
        [*columns('^w[0-9]+$')] as weights,
        entropy,
        topk_mass,
        margin
    from routing
),

summed as (
    select
        *,
        list_sum(weights)::double as weight_sum
    from routed
)

select
    shard,
    layer,
    tok,
    label,
    is_special,
    experts[list_position(weights, list_max(weights))]::integer as expert,
    entropy as router_entropy,
    list_sum(
        list_transform(weights, lambda w: if(w > 0, -w / weight_sum * ln(w / weight_sum), 0))
    ) as weight_entropy,
    topk_mass,
    margin
from summed
