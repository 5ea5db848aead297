-- Question: How did each router decide about each token?
-- Formula: expert = the one with the highest weight (not every model sorts them; ties: the first
--   in the model's own order); experts, weights = the k chosen in the model's own order, null beyond the k
--   of a layer that chooses fewer than others; logits of all E experts where the run stored them, else null;
--   probabilities = p over all E experts, stored or the softmax of the stored logits, else null;
--   has_probabilities = whether it is there, which is known before any file is read;
--   weight_entropy = H(w / sum w) over the k weights, in nats; dropped_picks = how many of the k a capacity
--   limit kept from their expert, 0 without a limit. An imported run may lack weights: expert, weights and
--   weight_entropy are then null; so are router_entropy, topk_mass and margin where it lacks these.
-- Grain: one row per (router, token): (shard, stack, layer, tok).
-- Reads: routing
with limited as (
    select
        *,
        -- matched below, because a run without a capacity limit has no d0 …
        false as never_dropped,
        -- … and one that does not store them has no probabilities or logits
        null::float[] as never_stored
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
        [*columns('^(d[0-9]+|never_dropped)$')] as drops,
        [*columns('^(probabilities|never_stored)$')] as stored,
        [*columns('^(logits|never_stored)$')] as stored_logits,
        entropy,
        topk_mass,
        margin
    from limited
),

summed as (
    select
        *,
        list_sum(weights)::double as weight_sum,
        list_max(weights) as highest_weight,
        list_transform(
            stored_logits[1], lambda z: exp(z::double - list_max(stored_logits[1])::double)
        ) as exponentials
    from routed
)

select
    shard,
    stack,
    layer,
    tok,
    label,
    is_special,
    -- a null has a position, too
    if(highest_weight is null, null, experts[list_position(weights, highest_weight)])::integer as expert,
    experts,
    if(highest_weight is null, null, weights) as weights,
    stored_logits[1] as logits,
    coalesce(
        stored[1],
        list_transform(exponentials, lambda exponential: (exponential / list_sum(exponentials))::float)
    ) as probabilities,
    stored[1] is not null or stored_logits[1] is not null as has_probabilities,
    entropy as router_entropy,
    if(
        highest_weight is null,
        null,
        list_sum(list_transform(weights, lambda w: if(w > 0, -w / weight_sum * ln(w / weight_sum), 0)))
    ) as weight_entropy,
    topk_mass,
    margin,
    len(list_filter(drops, lambda dropped: dropped))::integer as dropped_picks
from summed
