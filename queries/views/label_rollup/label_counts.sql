-- Question: Which experts did each label's tokens choose, as counted once?
-- Grain: one row per (stack, layer, label, is_special, expert), for experts that were chosen.
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
