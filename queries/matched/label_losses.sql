-- Question: How well does the model predict each label's text, if labels are matched?
-- Formula: the columns of the view `label_losses`, weighted by `stratum_weights` of the tokens with a loss.
-- Grain: one row per label with a loss.
-- Reads: label_losses
with weights as (
    select *
    from stratum_weights('label_losses', $stack, $layer, $labels, $include_special)
    where is_shared
),

losses as (
    select *
    from stratified('label_losses', $stack, $layer, $labels, $include_special)
)

select
    losses.stack,
    losses.layer,
    losses.label,
    false as is_special,
    round(sum(weights.weight * losses.tokens))::bigint as tokens,
    sum(weights.weight * losses.nats) as nats,
    sum(weights.weight * losses.whole_nats) as whole_nats,
    sum(weights.weight * losses.characters) as characters
from losses
inner join weights using (stack, label, stratum)
group by losses.stack, losses.layer, losses.label
