-- Question: What do the outputs of each expert add up to over each label's tokens, if labels are matched?
-- Formula: the columns of the view `label_outputs`, weighted by `stratum_weights`.
-- Grain: one row per (stack, layer, label, expert), for experts that computed anything.
-- Reads: label_tokens, label_outputs
with weights as (
    select *
    from stratum_weights('label_tokens', $stack, $layer, $labels, $include_special)
    where is_shared
),

outputs as (
    select *
    from stratified('label_outputs', $stack, $layer, $labels, $include_special)
)

select
    outputs.stack,
    outputs.layer,
    outputs.label,
    false as is_special,
    outputs.expert,
    sum(weights.weight * outputs.picks) as picks,
    sum(weights.weight * outputs.weight_sum) as weight_sum,
    sum(weights.weight * outputs.norm) as norm,
    sum(weights.weight * outputs.squared_norm) as squared_norm,
    sum(weights.weight * outputs.weighted_norm) as weighted_norm,
    sum(weights.weight * outputs.squared_weighted_norm) as squared_weighted_norm,
    sum(weights.weight * outputs.contribution) as contribution
from outputs
inner join weights using (stack, layer, label, stratum)
group by outputs.stack, outputs.layer, outputs.label, outputs.expert
