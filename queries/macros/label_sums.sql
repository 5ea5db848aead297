-- Question: What do the statistics of each label's tokens add up to, special tokens counted or not?
-- Formula: n = N_D; every other column is the sum of the statistic of that name over the tokens.
-- Grain: one row per (stack, layer, label). n_experts = E, top_k = k.
-- Reads: label_statistics, layers
create or replace macro label_sums(of_stack, of_layer, of_labels, with_special) as table
    with summed as (
        select
            stack,
            layer,
            label,
            sum(tokens)::bigint as n,
            sum(router_entropy) as router_entropy,
            sum(weight_entropy) as weight_entropy,
            sum(topk_mass) as topk_mass,
            sum(margin) as margin,
            sum(dropped_tokens)::bigint as dropped_tokens,
            sum(dropped_picks)::bigint as dropped_picks
        from label_statistics
        where
            (of_stack is null or stack = of_stack)
            and (of_layer is null or layer = of_layer)
            and (of_labels is null or list_contains(of_labels, label))
            and (with_special or not is_special)
        group by stack, layer, label
    )

    select
        summed.*,
        layers.n_experts,
        layers.top_k
    from summed
    inner join layers using (stack, layer)
