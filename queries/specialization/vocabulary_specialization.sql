-- Question: Does an expert, or a layer, route by token identity?
-- Formula: N_x = occurrences of token id x, N_xe = those for which e was chosen; ids with N_x >= min_count.
--   layer_topk, layer_top1    mean over ids of max over e of N_xe / N_x.
--   expert_topk, expert_top1  the same mean over the ids for which e is the maximum (ties: the lower expert);
--     null where there is none.
--   topk counts e among the k chosen, baseline k/E; top1 e as the highest-weight expert, baseline 1/E. The
--   baseline is what each single expert gets by chance; the largest of E gets more, most so for a small N_x.
-- Source: OLMoE, arXiv 2409.02060, section 5; its released script counts top1.
-- Grain: metric, stack, layer, expert (null in the rows of a layer); every expert. n = token ids, tokens =
--   their occurrences, all labels together. No rows where the run dropped the ids of its tokens.
-- Reads: token_decisions, experts, layers
-- Needs: weights for metric layer_top1, expert_top1
-- Example: --layer 4
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   min_count integer >= 1 = 10: ids that occur less often are left out
with favourites as (
    select
        stack,
        layer,
        tokens,
        list_max(picks) / tokens as topk_share,
        list_max(top1) / tokens as top1_share,
        experts[list_position(picks, list_max(picks))] as topk_expert,
        experts[list_position(top1, list_max(top1))] as top1_expert
    from token_counts('token_decisions', $stack, $layer, $labels, $include_special)
    where tokens >= $min_count
),

ranked as (
    select
        'topk' as metric,
        stack,
        layer,
        topk_expert as expert,
        topk_share as share,
        tokens
    from favourites
    union all
    select
        'top1' as metric,
        stack,
        layer,
        top1_expert as expert,
        top1_share as share,
        tokens
    from favourites
),

summed as (
    select
        if(grouping(expert) = 1, 'layer_', 'expert_') || metric as metric,
        stack,
        layer,
        expert,
        avg(share) as value,
        count(*) as n,
        sum(tokens)::bigint as tokens
    from ranked
    group by grouping sets ((metric, stack, layer), (metric, stack, layer, expert))
),

measured_layers as (
    select distinct
        stack,
        layer
    from favourites
),

-- every expert of a layer that has ids to count, and the layer itself
places as (
    select
        names.metric,
        experts.stack,
        experts.layer,
        experts.expert,
        if(names.metric = 'expert_top1', 1, experts.top_k) / experts.n_experts as baseline
    from experts
    inner join measured_layers using (stack, layer)
    cross join (values ('expert_topk'), ('expert_top1')) as names (metric)
    union all
    select
        names.metric,
        layers.stack,
        layers.layer,
        null as expert,
        if(names.metric = 'layer_top1', 1, layers.top_k) / layers.n_experts as baseline
    from layers
    inner join measured_layers using (stack, layer)
    cross join (values ('layer_topk'), ('layer_top1')) as names (metric)
)

select
    places.metric,
    places.stack,
    places.layer,
    places.expert,
    summed.value,
    places.baseline,
    coalesce(summed.n, 0) as n,
    coalesce(summed.tokens, 0) as tokens
from places
left join summed
    on
        places.metric = summed.metric
        and places.stack = summed.stack
        and places.layer = summed.layer
        and places.expert is not distinct from summed.expert
order by places.metric, places.stack, places.layer, places.expert
