-- Question: How alike are the outputs of two experts over a block of sampled tokens?
-- Formula: sums over the n tokens of the pair: cosine = cos(f_i, f_j), angular = 1 - arccos(cos) / pi; hsic,
--   hsic_first and hsic_second = HSIC₁ of i and j, of i and of j. over = which tokens of the block count:
--   all (sampled), those routed to either or both of the pair, or the usual ones, without massive
--   activations.
-- Grain: one row per (shard, stack, layer, block, over, expert, other_expert), expert < other_expert; over =
--   usual only for blocks that have a massive activation.
-- Reads: similarity
-- Needs: similarity
with numbered as (
    select
        shard,
        stack,
        layer,
        block,
        over,
        experts,
        unnest(range(len(n))) as pair,
        unnest(n) as n,
        unnest(cosine) as cosine,
        unnest(angular) as angular,
        unnest(hsic) as hsic,
        unnest(hsic_first) as hsic_first,
        unnest(hsic_second) as hsic_second
    from similarity
),

sizes as (
    select distinct experts
    from similarity
),

firsts as (
    select
        experts,
        unnest(range(experts)) as expert
    from sizes
),

combined as (
    select
        experts,
        expert,
        unnest(range(expert + 1, experts)) as other_expert
    from firsts
),

pairs as (
    select
        *,
        row_number() over (partition by experts order by expert, other_expert) - 1 as pair
    from combined
)

select
    numbered.shard,
    numbered.stack,
    numbered.layer,
    numbered.block,
    numbered.over,
    pairs.expert::integer as expert,
    pairs.other_expert::integer as other_expert,
    numbered.n,
    numbered.cosine,
    numbered.angular,
    numbered.hsic,
    numbered.hsic_first,
    numbered.hsic_second
from numbered
inner join pairs using (experts, pair)
