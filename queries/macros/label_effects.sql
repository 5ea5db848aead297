-- Question: What did each expert add to the layer's output for each label's tokens, special tokens counted or
--   not?
-- Formula: relation is 'label_outputs' and beside 'assignments'; the other arguments are those of `by_label`.
--   tokens = N_D; picks = N_eD, those that the expert computed; every other column is the sum of that name.
-- Grain: one row per (stack, layer, label, expert), with zeros for experts never chosen.
create or replace macro label_effects(
    relation, beside, of_stack, of_layer, of_labels, with_special, pooled
) as table
    with load as (
        select
            stack,
            layer,
            label,
            expert,
            n_experts,
            top_k,
            sum(tokens)::bigint as tokens
        from by_label(beside, of_stack, of_layer, of_labels, with_special, pooled)
        group by stack, layer, label, expert, n_experts, top_k
    ),

    effects as (
        select
            stack,
            layer,
            label,
            expert,
            sum(picks)::double as picks,
            sum(norm) as norm,
            sum(squared_norm) as squared_norm,
            sum(weighted_norm) as weighted_norm,
            sum(contribution) as contribution
        from by_label(relation, of_stack, of_layer, of_labels, with_special, pooled)
        group by stack, layer, label, expert
    )

    select
        load.*,
        coalesce(effects.picks, 0) as picks,
        coalesce(effects.norm, 0) as norm,
        coalesce(effects.squared_norm, 0) as squared_norm,
        coalesce(effects.weighted_norm, 0) as weighted_norm,
        coalesce(effects.contribution, 0) as contribution
    from load
    left join effects
        on
            load.stack = effects.stack
            and load.layer = effects.layer
            and load.label is not distinct from effects.label
            and load.expert = effects.expert
