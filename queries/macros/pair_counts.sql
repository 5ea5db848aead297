-- Question: Which experts are chosen together, and how often?
-- Formula: relation is 'decisions'; the next four arguments are those of `filtered`. picks = N_i, tokens for
--   which the expert was among the k chosen; together = those for which the other one was, too. adjacent: only
--   neighbours in the order of weights, highest first (ties: the model's own order), are together.
-- Grain: one row per (stack, layer, expert, other_expert), both orders of each pair that was together at all.
create or replace macro pair_counts(
    relation, of_stack, of_layer, of_labels, with_special, adjacent
) as table
    with ordered as (
        select
            *,
            -- grading the weights alone would leave the order of equal ones open; missing ones go last
            list_grade_up(
                list_zip(
                    list_transform(weights, lambda w: coalesce(-w, 'infinity'::float)), range(len(weights))
                )
            ) as weight_order
        from filtered(relation, of_stack, of_layer, of_labels, with_special)
    ),

    chosen as (
        select
            stack,
            layer,
            if(adjacent, list_select(experts, weight_order), experts) as experts
        from ordered
    ),

    longest as (
        select max(len(experts)) as top_k
        from chosen
    ),

    ranks as (
        select unnest(range(1, top_k + 1)) as rank
        from longest
    ),

    ranked_pairs as (
        select
            a.rank as first_rank,
            b.rank as second_rank
        from ranks as a
        inner join ranks as b on a.rank < b.rank
        where not adjacent or b.rank = a.rank + 1
    ),

    pairs as (
        select
            chosen.stack,
            chosen.layer,
            chosen.experts[ranked_pairs.first_rank] as a,
            chosen.experts[ranked_pairs.second_rank] as b
        from chosen
        cross join ranked_pairs
    ),

    counted as (
        select
            stack,
            layer,
            a,
            b,
            count(*) as together
        from pairs
        where b is not null
        group by stack, layer, a, b
    ),

    mirrored as (
        select
            stack,
            layer,
            unnest([a, b]) as expert,
            unnest([b, a]) as other_expert,
            together
        from counted
    ),

    summed as (
        select
            stack,
            layer,
            expert,
            other_expert,
            sum(together)::bigint as together
        from mirrored
        group by stack, layer, expert, other_expert
    ),

    picked as (
        select
            stack,
            layer,
            unnest(experts) as expert
        from chosen
    ),

    totals as (
        select
            stack,
            layer,
            expert,
            count(*) as picks
        from picked
        group by stack, layer, expert
    )

    select
        summed.stack,
        summed.layer,
        summed.expert::integer as expert,
        summed.other_expert::integer as other_expert,
        totals.picks,
        summed.together
    from summed
    inner join totals using (stack, layer, expert)
