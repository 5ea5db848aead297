-- Question: Where do the tokens of an expert go in the next layer?
-- Formula: top-1 expert e at one recorded layer, e' at the next of the same stack: value = N_ee' / N_e, the
--   share of e's tokens that e' gets; sums to 1 over e'. Baseline N_e' / N, the share of all tokens that e'
--   gets: what independent layers give.
-- Source: transition matrix of the highest-weight experts.
-- Grain: metric, stack, layer, expert, next_layer, next_expert, for pairs with any token. n = N_e; tokens of
--   all labels together.
-- Reads: decisions
-- Needs: weights
-- Example: --layer 4
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
with chosen as (
    select
        shard,
        stack,
        layer,
        tok,
        expert
    from filtered('decisions', $stack, null, $labels, $include_special)
),

-- all layers are needed here, whichever is asked for
followed as (
    select
        stack,
        layer,
        expert,
        lead(layer) over token as next_layer,
        lead(expert) over token as next_expert
    from chosen
    window token as (partition by shard, stack, tok order by layer)
),

counted as (
    select
        stack,
        layer,
        expert,
        next_layer,
        next_expert,
        count(*) as together
    from followed
    where
        next_layer is not null
        and ($layer is null or layer = $layer)
    group by stack, layer, expert, next_layer, next_expert
)

select
    'layer_transition' as metric,
    stack,
    layer,
    expert,
    next_layer,
    next_expert,
    together / sum(together) over (partition by stack, layer, expert) as value,
    sum(together) over (partition by stack, layer, next_expert)
    / sum(together) over (partition by stack, layer) as baseline,
    (sum(together) over (partition by stack, layer, expert))::bigint as n,
    together as count
from counted
order by stack, layer, expert, next_layer, next_expert
