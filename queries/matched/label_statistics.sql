-- Question: How decided was each router about each label's tokens, if labels are matched?
-- Formula: the columns of the view `label_statistics`, weighted by `stratum_weights`.
-- Grain: one row per (stack, layer, label).
-- Reads: label_tokens, label_statistics
with weights as (
    select *
    from stratum_weights('label_tokens', $stack, $layer, $labels, $include_special)
    where is_shared
),

statistics as (
    select *
    from stratified('label_statistics', $stack, $layer, $labels, $include_special)
)

select
    statistics.stack,
    statistics.layer,
    statistics.label,
    false as is_special,
    round(sum(weights.weight * statistics.tokens))::bigint as tokens,
    sum(weights.weight * statistics.router_entropy) as router_entropy,
    sum(weights.weight * statistics.weight_entropy) as weight_entropy,
    sum(weights.weight * statistics.topk_mass) as topk_mass,
    sum(weights.weight * statistics.margin) as margin,
    sum(weights.weight * statistics.dropped_picks) as dropped_picks,
    sum(weights.weight * statistics.dropped_tokens) as dropped_tokens
from statistics
inner join weights using (stack, layer, label, stratum)
group by statistics.stack, statistics.layer, statistics.label
