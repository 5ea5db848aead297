-- Question: Do two experts receive the same tokens?
-- Formula: T_e = the token ids for which e was among the k chosen at least min_count times.
--   value = |T_i and T_j| / |T_i or T_j|, 0 … 1. Baseline: two sets of these sizes drawn at random from the
--   V ids that reached any expert so often, m / (|T_i| + |T_j| - m) with the expected intersection
--   m = |T_i| |T_j| / V; close to the expectation for many ids.
-- Source: Jaccard index of the token sets of experts.
-- Grain: metric, stack, layer, expert < other_expert, for experts with any id. n = |T_i or T_j|; size and
--   other_size are |T_i| and |T_j|. All labels together. No rows where the run dropped the ids of its tokens.
-- Reads: token_decisions
-- Example: --layer 4
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   min_count integer >= 1 = 1: times that an expert must have received an id
with counted as not materialized (
    select *
    from token_counts('token_decisions', $stack, $layer, $labels, $include_special)
    where list_max(picks) >= $min_count
),

ids as (
    select distinct token_id
    from counted
),

-- ids without gaps, so that sets are strings of bits, 4096 ids in each: pairs then cost words, not ids
numbered as (
    select
        token_id,
        row_number() over (order by token_id) - 1 as number
    from ids
),

picked as (
    select
        counted.stack,
        counted.layer,
        numbered.number,
        unnest(counted.experts) as expert,
        unnest(counted.picks) as picks
    from counted
    inner join numbered using (token_id)
),

received as (
    select *
    from picked
    where picks >= $min_count
),

vocabularies as (
    select
        stack,
        layer,
        count(*) as ids
    from counted
    group by stack, layer
),

blocks as (
    select
        stack,
        layer,
        expert,
        number // 4096 as block,
        count(*) as size,
        bitstring_agg(number % 4096, 0, 4095) as bits
    from received
    group by stack, layer, expert, number // 4096
),

sizes as (
    select
        stack,
        layer,
        expert,
        sum(size)::bigint as size
    from blocks
    group by stack, layer, expert
),

shared_blocks as (
    select
        a.stack,
        a.layer,
        a.expert,
        b.expert as other_expert,
        sum(bit_count(a.bits & b.bits))::bigint as shared
    from blocks as a
    inner join blocks as b
        on
            a.stack = b.stack
            and a.layer = b.layer
            and a.block = b.block
            and a.expert < b.expert
    group by a.stack, a.layer, a.expert, b.expert
),

paired as (
    select
        a.stack,
        a.layer,
        a.expert,
        b.expert as other_expert,
        a.size,
        b.size as other_size,
        coalesce(shared_blocks.shared, 0) as shared,
        a.size * b.size / vocabularies.ids as expected
    from sizes as a
    inner join sizes as b
        on
            a.stack = b.stack
            and a.layer = b.layer
            and a.expert < b.expert
    inner join vocabularies
        on a.stack = vocabularies.stack and a.layer = vocabularies.layer
    left join shared_blocks
        on
            a.stack = shared_blocks.stack
            and a.layer = shared_blocks.layer
            and a.expert = shared_blocks.expert
            and b.expert = shared_blocks.other_expert
)

select
    'expert_token_overlap' as metric,
    stack,
    layer,
    expert::integer as expert,
    other_expert::integer as other_expert,
    shared / (size + other_size - shared) as value,
    expected / (size + other_size - expected) as baseline,
    size + other_size - shared as n,
    size,
    other_size
from paired
order by stack, layer, expert, other_expert
