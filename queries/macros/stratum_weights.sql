-- Question: What does a token of each label weigh in each stratum, if labels are matched?
-- Formula: tokens = N_gD, those of label D in stratum g; least = the minimum of N_gD over the labels that
--   are compared; is_shared = each of these has tokens in g; weight = least / N_gD where it is, else 0:
--   each label then has `least` tokens in g, as many as the one with the fewest, and as many as any other in
--   all. The arguments are those of `stratified`, for a view with the column tokens.
-- Source: coarsened exact matching, Iacus, King and Porro 2012, with the expectation over all ways to draw as
--   many tokens of each label from a stratum in place of one draw.
-- Grain: one row per (stack, layer, label, stratum) with tokens.
create or replace macro stratum_weights(relation, of_stack, of_layer, of_labels, with_special) as table
    with cells as (
        select
            stack,
            layer,
            label,
            stratum,
            sum(tokens)::bigint as tokens
        from stratified(relation, of_stack, of_layer, of_labels, with_special)
        group by stack, layer, label, stratum
    ),

    compared as (
        select
            *,
            min(tokens) over (partition by stack, layer, stratum) as least,
            count(*) over (partition by stack, layer, stratum)
            = count(distinct label) over (partition by stack, layer) as is_shared
        from cells
    )

    select
        *,
        if(is_shared, least / tokens, 0) as weight
    from compared
