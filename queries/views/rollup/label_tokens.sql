-- Question: How many tokens of each label did each router see?
-- Formula: a token has one highest-weight expert.
-- Grain: one row per (stack, layer, label, is_special) that has any.
-- Reads: label_counts
select
    stack,
    layer,
    label,
    is_special,
    sum(top1)::bigint as tokens
from label_counts
group by stack, layer, label, is_special
