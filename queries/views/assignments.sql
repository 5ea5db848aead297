-- Question: How much of each label's text did each expert get?
-- Formula: picks = N_eD, dropped or not; top1 = tokens whose highest-weight expert is e;
--   weight_sum = sum of w_e; tokens = N_D, the same in all rows of a group. Where an imported run lacks
--   weights, top1 and weight_sum are null for experts that were chosen.
-- Grain: one row per (stack, layer, label, is_special, expert), with zeros for experts never chosen.
-- Reads: label_tokens, label_counts, experts
select
    label_tokens.stack,
    label_tokens.layer,
    label_tokens.label,
    label_tokens.is_special,
    experts.expert,
    experts.n_experts,
    experts.top_k,
    label_tokens.tokens,
    coalesce(label_counts.picks, 0) as picks,
    if(label_counts.picks is null, 0, label_counts.top1) as top1,
    if(label_counts.picks is null, 0, label_counts.weight_sum) as weight_sum
from label_tokens
inner join experts using (stack, layer)
left join label_counts
    on
        label_tokens.stack = label_counts.stack
        and label_tokens.layer = label_counts.layer
        and label_tokens.label = label_counts.label
        and label_tokens.is_special = label_counts.is_special
        and experts.expert = label_counts.expert
