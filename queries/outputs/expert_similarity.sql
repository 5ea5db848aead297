-- Question: Which experts put out the same?
-- Formula: over the sampled tokens, which all went through both experts, i and j:
--   cka      sum over blocks of HSIC₁(i, j) / sqrt(sum of HSIC₁(i, i) * sum of HSIC₁(j, j)): debiased linear
--     CKA, blind to rotations. May be negative, and is never clipped. Baseline 0, independent outputs.
--   cosine   mean over tokens of cos(f_i, f_j). Baseline 0, independent directions.
--   angular  mean over tokens of 1 - arccos(cos(f_i, f_j)) / pi. Baseline 1/2.
--   over = sampled takes all sampled tokens, either or both those routed to either or both of the pair, usual
--   all without the few of massive activations, which can make any two experts look alike.
--   standard_error is that of a jackknife over blocks of about 256 tokens, of many documents each.
-- Source: HSIC₁ of Song et al. 2012; CKA from sums over minibatches: arXiv 2010.15327; angular similarity of
--   experts: arXiv 2406.18219. The usual, biased CKA is 0.67 between independent outputs of 2,048 dimensions
--   and 1,024 tokens.
-- Grain: metric, stack, layer, expert (i), other_expert (j), both orders of each pair. n = tokens that value
--   is over; blocks = blocks that have any (of cka: 4 of them at least).
-- Reads: expert_pairs
-- Example: --layer 4 --expert 12
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   expert integer = null: only pairs of this expert, as i (default: all)
--   measure varchar = cka: cka, cosine or angular
--   over varchar = sampled: sampled, either, both or usual
with blocks as (
    select
        stack,
        layer,
        expert,
        other_expert,
        n,
        over = 'usual' as is_usual,
        shard,
        block,
        case $measure
            when 'cka' then hsic
            when 'cosine' then cosine
            when 'angular' then angular
            else error('measure takes cka, cosine or angular')
        end::double as x,
        if($measure = 'cka', hsic_first, n)::double as y,
        if($measure = 'cka', hsic_second, n)::double as z
    from expert_pairs
    where
        ($stack is null or stack = $stack)
        and ($layer is null or layer = $layer)
        and ($expert is null or expert = $expert or other_expert = $expert)
        and case
            when $over in ('sampled', 'either', 'both') then over = $over
            -- a block without massive activations has no row of its own for its usual tokens
            when $over = 'usual' then over in ('sampled', 'usual')
            else error('over takes sampled, either, both or usual')
        end
),

chosen as (
    select *
    from blocks
    qualify
        is_usual
        or not bool_or(is_usual) over (partition by stack, layer, shard, block, expert, other_expert)
),

totals as (
    select
        *,
        sum(x) over pair as all_x,
        sum(y) over pair as all_y,
        sum(z) over pair as all_z
    from chosen
    where n >= if($measure = 'cka', 4, 1)
    window pair as (partition by stack, layer, expert, other_expert)
),

left_out as (
    select
        *,
        (all_x - x) / nullif(sqrt(greatest(all_y - y, 0) * greatest(all_z - z, 0)), 0) as without
    from totals
),

compared as (
    select
        stack,
        layer,
        expert,
        other_expert,
        any_value(all_x / nullif(sqrt(greatest(all_y, 0) * greatest(all_z, 0)), 0)) as value,
        sum(n)::bigint as n,
        count(*) as blocks,
        if(
            count(*) > 1 and count(without) = count(*),
            sqrt((count(*) - 1) * var_pop(without)),
            null
        ) as standard_error
    from left_out
    group by stack, layer, expert, other_expert
),

mirrored as (
    select *
    from compared
    union all by name
    select
        * exclude (expert, other_expert),
        other_expert as expert,
        expert as other_expert
    from compared
)

select
    'expert_similarity' as metric,
    stack,
    layer,
    expert,
    other_expert,
    value,
    if($measure = 'angular', 0.5, 0)::double as baseline,
    n,
    blocks,
    standard_error
from mirrored
where $expert is null or expert = $expert
order by stack, layer, expert, other_expert
