-- Question: How much of each label's text did each expert get?
-- Formula: picks = N_eD, dropped or not; top1 = tokens whose highest-weight expert is e;
--   weight_sum = sum of w_e; tokens = N_D, the same in all rows of a group.
-- Grain: one row per (stack, layer, label, is_special, expert), with zeros for experts never chosen.
-- Reads: label_counts, layers
select
    label_counts.stack,
    label_counts.layer,
    label_counts.label,
    label_counts.is_special,
    label_counts.expert,
    layers.n_experts,
    layers.top_k,
    -- a token has one highest-weight expert
    (sum(label_counts.top1) over (
        partition by label_counts.stack, label_counts.layer, label_counts.label, label_counts.is_special
    ))::bigint as tokens,
    label_counts.picks,
    label_counts.top1,
    label_counts.weight_sum
from label_counts
inner join layers using (stack, layer)
