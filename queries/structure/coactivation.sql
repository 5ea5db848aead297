-- Question: Which experts are chosen together?
-- Formula: N_i = tokens for which i was among the k chosen.
--   paper     P(j given i) = N_ij / N_i, N_ij = tokens for which i and j both were. Sums to k - 1 over j.
--     Baseline (k - 1) / (E - 1): k experts drawn at random.
--   released  N_ij counts only neighbours in the order of weights, highest first (ties: the model's own
--     order), as OLMoE's released script does. Baseline 2 (k - 1) / (k (E - 1)).
-- Source: expert co-activation of OLMoE, arXiv 2409.02060, section 5.
-- Grain: metric, stack, layer, expert (i), other_expert (j), both orders of each pair that was chosen
--   together at all. n = N_i, tokens of all labels together.
-- Reads: decisions, layers
-- Needs: weights for mode released
-- Example: --layer 4
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   mode varchar = paper: paper, or released
with ordered as (
    select
        *,
        -- grading the weights alone would leave the order of equal ones open; missing ones go last
        list_grade_up(
            list_zip(list_transform(weights, lambda w: coalesce(-w, 'infinity'::float)), range(len(weights)))
        ) as weight_order
    from filtered('decisions', $stack, $layer, $labels, $include_special)
),

chosen as (
    select
        stack,
        layer,
        if($mode = 'released', list_select(experts, weight_order), experts) as experts
    from ordered
    where
        case when $mode in ('paper', 'released') then true else error('mode takes paper or released') end
),

ranks as (
    select unnest(range(1, max(top_k) + 1)) as rank
    from layers
),

ranked_pairs as (
    select
        a.rank as first_rank,
        b.rank as second_rank
    from ranks as a
    inner join ranks as b on a.rank < b.rank
),

counted_pairs as (
    select *
    from ranked_pairs
    where $mode = 'paper' or second_rank = first_rank + 1
),

pairs as (
    select
        chosen.stack,
        chosen.layer,
        chosen.experts[counted_pairs.first_rank] as a,
        chosen.experts[counted_pairs.second_rank] as b
    from chosen
    cross join counted_pairs
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
        a as expert,
        b as other_expert,
        together
    from counted
    union all
    select
        stack,
        layer,
        b as expert,
        a as other_expert,
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
        count(*) as n
    from picked
    where expert is not null
    group by stack, layer, expert
)

select
    if($mode = 'paper', 'coactivation', 'adjacent_coactivation') as metric,
    summed.stack,
    summed.layer,
    summed.expert::integer as expert,
    summed.other_expert::integer as other_expert,
    summed.together / totals.n as value,
    (layers.top_k - 1) / (layers.n_experts - 1) * if($mode = 'paper', 1, 2 / layers.top_k) as baseline,
    totals.n,
    summed.together as count
from summed
inner join totals using (stack, layer, expert)
inner join layers using (stack, layer)
order by metric, summed.stack, summed.layer, summed.expert, summed.other_expert
