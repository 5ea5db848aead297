-- Question: How much of each label's text did each expert get, special tokens counted or not?
-- Formula: relation is 'assignments'; the other arguments are those of `filtered`. tokens = N_D;
--   picks = N_eD; top1 = tokens whose highest-weight expert is e; weight_sum = sum of w_e;
--   frequency = N_eD / N_D; n_experts = E, top_k = k.
-- Grain: one row per (stack, layer, label, expert), with zeros for experts never chosen.
create or replace macro label_load(relation, of_stack, of_layer, of_labels, with_special) as table
    select
        stack,
        layer,
        label,
        expert,
        n_experts,
        top_k,
        sum(tokens)::bigint as tokens,
        sum(picks)::double as picks,
        sum(top1)::double as top1,
        sum(weight_sum) as weight_sum,
        sum(picks) / sum(tokens) as frequency
    from by_label(relation, of_stack, of_layer, of_labels, with_special, false)
    group by stack, layer, label, expert, n_experts, top_k
