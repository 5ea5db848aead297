-- Question: How much of each label's text did each expert get, if labels are matched?
-- Formula: the columns of the view `assignments`, weighted by `stratum_weights`: tokens are the same for all
--   labels; picks and top1 are no whole numbers.
-- Grain: one row per (stack, layer, label, expert), with zeros for experts never chosen.
-- Reads: label_tokens, label_counts, experts
with weights as (
    select *
    from stratum_weights('label_tokens', $stack, $layer, $labels, $include_special)
    where is_shared
),

counts as (
    select *
    from stratified('label_counts', $stack, $layer, $labels, $include_special)
),

matched as (
    select
        stack,
        layer,
        label,
        sum(least)::bigint as tokens
    from weights
    group by stack, layer, label
),

weighted as (
    select
        counts.stack,
        counts.layer,
        counts.label,
        counts.expert,
        sum(weights.weight * counts.picks) as picks,
        sum(weights.weight * counts.top1) as top1,
        sum(weights.weight * counts.weight_sum) as weight_sum
    from counts
    inner join weights using (stack, layer, label, stratum)
    group by counts.stack, counts.layer, counts.label, counts.expert
)

select
    matched.stack,
    matched.layer,
    matched.label,
    false as is_special,
    experts.expert,
    experts.n_experts,
    experts.top_k,
    matched.tokens,
    coalesce(weighted.picks, 0) as picks,
    if(weighted.picks is null, 0, weighted.top1) as top1,
    if(weighted.picks is null, 0, weighted.weight_sum) as weight_sum
from matched
inner join experts using (stack, layer)
left join weighted
    on
        matched.stack = weighted.stack
        and matched.layer = weighted.layer
        and matched.label = weighted.label
        and experts.expert = weighted.expert
