-- Question: How did each router treat each token id?
-- Formula: relation is 'token_decisions'; the other arguments are those of `filtered`. tokens = N_x, occurrences
--   of the id, all labels together. Over these: experts = those chosen at all, by number; picks, top1, in their
--   order: times each was chosen, dropped or not; times it had the highest weight (0 without weights).
-- Grain: one row per (stack, layer, token_id); none for tokens whose id was dropped.
create or replace macro token_counts(relation, of_stack, of_layer, of_labels, with_special) as table
    with chosen as (
        select
            stack,
            layer,
            token_id,
            expert as top_expert,
            experts
        from filtered(relation, of_stack, of_layer, of_labels, with_special)
        where
            token_id is not null
    ),

    picked as (
        select
            stack,
            layer,
            token_id,
            top_expert,
            unnest(experts) as expert
        from chosen
    ),

    counted as (
        select
            stack,
            layer,
            token_id,
            expert,
            count(*) as picks,
            count_if(expert = top_expert) as top1
        from picked
        where expert is not null
        group by stack, layer, token_id, expert
    ),

    occurring as (
        select
            stack,
            layer,
            token_id,
            count(*) as tokens
        from chosen
        group by stack, layer, token_id
    )

    select
        counted.stack,
        counted.layer,
        counted.token_id,
        any_value(occurring.tokens) as tokens,
        list(counted.expert::usmallint order by counted.expert) as experts,
        list(counted.picks::uinteger order by counted.expert) as picks,
        list(counted.top1::uinteger order by counted.expert) as top1
    from counted
    inner join occurring using (stack, layer, token_id)
    group by counted.stack, counted.layer, counted.token_id
