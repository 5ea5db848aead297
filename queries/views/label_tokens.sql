-- Question: How many tokens of each label did each router see?
-- Grain: one row per (stack, layer, label, is_special) that has any.
-- Reads: routing
select
    stack,
    layer,
    label,
    is_special,
    count(*) as tokens
from routing
group by stack, layer, label, is_special
