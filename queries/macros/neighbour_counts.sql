-- Question: How alike are the experts of neighbouring tokens?
-- Formula: relation is 'token_decisions'; the other arguments are those of `filtered`. A pair is a token and the
--   next one of the same document, if both count; A and B are the experts chosen for them. pairs = their
--   number; same_top1 = those whose highest-weight experts are the same (0 without weights); any_shared = those
--   with |A and B| > 0; shared = sum of |A and B|.
-- Grain: one row per (stack, layer, label), the label of the first token of a pair. A document with several
--   labels is under all of them together.
create or replace macro neighbour_counts(relation, of_stack, of_layer, of_labels, with_special) as table
    with chosen as (
        select
            shard,
            stack,
            layer,
            label,
            doc,
            position,
            expert,
            experts
        from filtered(relation, of_stack, of_layer, of_labels, with_special)
    ),

    followed as (
        select
            stack,
            layer,
            label,
            position,
            expert,
            experts,
            lead(position) over text as next_position,
            lead(expert) over text as next_expert,
            lead(experts) over text as next_experts
        from chosen
        window text as (partition by shard, stack, layer, doc order by position)
    ),

    compared as (
        select
            stack,
            layer,
            label,
            expert = next_expert as is_same,
            list_sum(list_transform(experts, lambda e: list_contains(next_experts, e)::integer)) as shared
        from followed
        where next_position = position + 1
    )

    select
        stack,
        layer,
        label,
        count(*) as pairs,
        count_if(is_same)::bigint as same_top1,
        count_if(shared > 0)::bigint as any_shared,
        sum(shared)::bigint as shared
    from compared
    group by stack, layer, label
