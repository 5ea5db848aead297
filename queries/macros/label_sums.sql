-- Question: What do the statistics of each label's tokens add up to, special tokens counted or not?
-- Formula: relation is 'label_statistics'; the other arguments are those of `filtered`. n = N_D; every other
--   column is the sum of the statistic of that name over the tokens.
-- Grain: one row per (stack, layer, label).
create or replace macro label_sums(relation, of_stack, of_layer, of_labels, with_special) as table
    select
        stack,
        layer,
        label,
        sum(tokens)::bigint as n,
        sum(router_entropy) as router_entropy,
        sum(weight_entropy) as weight_entropy,
        sum(topk_mass) as topk_mass,
        sum(margin) as margin,
        sum(dropped_tokens)::double as dropped_tokens,
        sum(dropped_picks)::double as dropped_picks
    from by_label(relation, of_stack, of_layer, of_labels, with_special, false)
    group by stack, layer, label
