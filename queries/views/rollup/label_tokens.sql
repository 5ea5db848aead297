-- Question: How many tokens of each label did each router see?
-- Formula: a token has k picks.
-- Grain: one row per (stack, layer, label, is_special) that has any.
-- Reads: label_counts, layers
select
    label_counts.stack,
    label_counts.layer,
    label_counts.label,
    label_counts.is_special,
    (sum(label_counts.picks) // any_value(layers.top_k))::bigint as tokens
from label_counts
inner join layers using (stack, layer)
group by label_counts.stack, label_counts.layer, label_counts.label, label_counts.is_special
