-- Question: How much of each label's text did each expert get, as counted once?
-- Grain: one row per (stack, layer, label, is_special, expert), with zeros for experts never chosen.
-- Reads: label_rollup
select
    stack,
    layer,
    label,
    is_special,
    expert,
    picks,
    top1,
    weight_sum
from label_rollup
