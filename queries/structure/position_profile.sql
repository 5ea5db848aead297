-- Question: Does the choice of experts depend on the place in the document?
-- Formula: value = N_eDb / N_Db, the share of the tokens of label D in bucket b for which e was among the k
--   chosen; sums to k. Buckets are the positions 0, 1, 2-3, 4-7, 8-15 …, counted from 0, special tokens
--   included. Baseline N_eD / N_D, the same over all positions: what a place that says nothing gives.
-- Source: context-independent and position-dependent experts in OpenMoE, arXiv 2402.01739.
-- Grain: metric, stack, layer, label, first_position (of the bucket), expert; every expert of the layer,
--   every bucket with tokens. n = N_Db; last_position = end of the bucket.
-- Reads: token_decisions, experts
-- Example: --layer 4 --labels kor_Hang
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
with chosen as (
    select
        stack,
        layer,
        label,
        if(position = 0, 0, 2 ** floor(log2(position)))::bigint as first_position,
        experts
    from by_label('token_decisions', $stack, $layer, $labels, $include_special, false)
),

buckets as (
    select
        stack,
        layer,
        label,
        first_position,
        count(*) as tokens,
        sum(count(*)) over (partition by stack, layer, label) as label_tokens
    from chosen
    group by stack, layer, label, first_position
),

picked as (
    select
        stack,
        layer,
        label,
        first_position,
        unnest(experts) as expert
    from chosen
),

counted as (
    select
        stack,
        layer,
        label,
        first_position,
        expert,
        count(*) as picks
    from picked
    where expert is not null
    group by stack, layer, label, first_position, expert
),

filled as (
    select
        buckets.*,
        experts.expert,
        coalesce(counted.picks, 0) as picks
    from buckets
    inner join experts using (stack, layer)
    left join counted
        on
            buckets.stack = counted.stack
            and buckets.layer = counted.layer
            and buckets.label = counted.label
            and buckets.first_position = counted.first_position
            and experts.expert = counted.expert
)

select
    'position_profile' as metric,
    stack,
    layer,
    label,
    first_position,
    expert,
    picks / tokens as value,
    sum(picks) over (partition by stack, layer, label, expert) / label_tokens as baseline,
    tokens as n,
    greatest(2 * first_position - 1, first_position) as last_position
from filled
order by stack, layer, label, first_position, expert
