-- Question: What does the other run, quantized as a rule, change of the routing, and for which tokens?
-- Formula: A and B = the k experts that the one and the other run chose for a token.
--   topk_jaccard   |A and B| / |A or B|, mean over tokens. Baseline: two random sets of k of E, exactly.
--   top1_flips     share of tokens whose highest-weight expert differs. Baseline 1 - 1/E.
--   Both over all tokens (decile 0) and by tenths of how sure the first run was, 1 the least: decile =
--     1 + floor(10 tokens of the router with a smaller gap / its tokens), over the labels together.
--   specialization_change          |DS'(e, D) - DS(e, D)|, mean over the E experts; DS = N_eD / N_D.
--     Baseline 0.
--   largest_specialization_change  the largest of these. Baseline 0.
--   same_top_expert                1 where D's most chosen expert is the same (ties: the lower id), else 0.
--     Baseline 1/E.
--   Deciles need the gaps of the first run: where it was imported without them, there are none.
--   With $pooled these three are the mean (the largest: the largest) over labels of equal weight.
-- Source: the measures of this package; DS as in OLMoE, arXiv 2409.02060, section 5.
-- Grain: metric, stack, layer, label (null if pooled), decile. n = tokens.
-- Reads: aligned_decisions, assignments, other.assignments, label_sets, layers
-- Needs: weights for metric top1_flips
-- Example: --layer 4 --pooled true
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   pooled boolean = false: all labels together, in one row, instead of label by label
--   by varchar = margin: the gap of the first run that makes the deciles: margin, p of the k-th minus p of
--     the (k+1)-th expert, or lead, the highest weight minus the second (the margin where k = 1)
with weighed as (
    select
        *,
        list_sort(weights, 'desc', 'nulls last') as sorted_weights
    from filtered('aligned_decisions', $stack, $layer, $labels, $include_special)
),

chosen as (
    select
        stack,
        layer,
        label,
        if(
            $by = 'lead',
            coalesce(sorted_weights[1] - sorted_weights[2], margin),
            margin
        ) as gap,
        shared,
        expert != other_expert as is_flip
    from weighed
    where case when $by in ('margin', 'lead') then true else error('by takes margin or lead') end
),

-- gaps are few, because what is recorded is rounded; tokens are many
by_gap as (
    select
        stack,
        layer,
        label,
        gap,
        shared,
        is_flip,
        count(*) as n
    from chosen
    group by stack, layer, label, gap, shared, is_flip
),

gaps as (
    select
        stack,
        layer,
        gap,
        sum(n) as n
    from by_gap
    group by stack, layer, gap
),

deciles as (
    select
        stack,
        layer,
        gap,
        1 + 10 * (sum(n) over (partition by stack, layer order by gap) - n)
        // sum(n) over (partition by stack, layer) as decile
    from gaps
),

recorded as (
    select * replace (if($pooled, null, label) as label)
    from by_gap
),

expanded as (
    select recorded.* replace (coalesce(label_sets.label, recorded.label) as label)
    from recorded
    left join label_sets on recorded.label = label_sets.label_set
),

by_label_and_gap as (
    select *
    from expanded
    where $pooled or $labels is null or list_contains($labels, label)
),

cells as (
    select
        stack,
        layer,
        label,
        0 as decile,
        shared,
        is_flip,
        n
    from by_label_and_gap
    union all
    select
        by_label_and_gap.stack,
        by_label_and_gap.layer,
        by_label_and_gap.label,
        deciles.decile,
        by_label_and_gap.shared,
        by_label_and_gap.is_flip,
        by_label_and_gap.n
    from by_label_and_gap
    inner join deciles using (stack, layer, gap)
),

tokens as (
    select
        cells.stack,
        cells.layer,
        cells.label,
        cells.decile,
        layers.n_experts,
        layers.top_k,
        sum(cells.n)::bigint as n,
        sum(cells.n * cells.shared / (2 * layers.top_k - cells.shared)) / sum(cells.n) as jaccard,
        sum(if(cells.is_flip, cells.n, 0)) / sum(cells.n) as flips
    from cells
    inner join layers using (stack, layer)
    group by cells.stack, cells.layer, cells.label, cells.decile, layers.n_experts, layers.top_k
),

intersections as (
    select distinct
        n_experts as e,
        top_k as k,
        unnest(range(greatest(2 * top_k - n_experts, 0), top_k + 1)) as i
    from layers
),

-- the hypergeometric probability through ln n! = lgamma(n + 1)
expected as (
    select
        e,
        k,
        sum(
            i / (2 * k - i)
            * exp(
                2 * (lgamma(k + 1) + lgamma(e - k + 1))
                - lgamma(i + 1) - 2 * lgamma(k - i + 1) - lgamma(e - 2 * k + i + 1) - lgamma(e + 1)
            )
        ) as jaccard
    from intersections
    group by e, k
),

ours as (
    select *
    from label_load('assignments', $stack, $layer, $labels, $include_special)
),

theirs as (
    select *
    from label_load('other.assignments', $stack, $layer, $labels, $include_special)
),

specialized as (
    select
        ours.stack,
        ours.layer,
        ours.label,
        ours.n_experts,
        any_value(ours.tokens) as n,
        avg(abs(theirs.frequency - ours.frequency)) as change,
        max(abs(theirs.frequency - ours.frequency)) as largest,
        max_by(ours.expert, (ours.frequency, -ours.expert))
        = max_by(ours.expert, (theirs.frequency, -ours.expert)) as is_same
    from ours
    inner join theirs using (stack, layer, label, expert)
    group by ours.stack, ours.layer, ours.label, ours.n_experts
),

changed as (
    select
        stack,
        layer,
        if($pooled, null, label) as label,
        n_experts,
        sum(n)::bigint as n,
        avg(change) as change,
        max(largest) as largest,
        avg(is_same::integer) as same
    from specialized
    group by stack, layer, if($pooled, null, label), n_experts
),

metrics as (
    select
        'topk_jaccard' as metric,
        tokens.*,
        tokens.jaccard as value,
        expected.jaccard as baseline
    from tokens
    inner join expected on tokens.n_experts = expected.e and tokens.top_k = expected.k
    union all by name
    select
        'top1_flips' as metric,
        *,
        flips as value,
        1 - 1 / n_experts as baseline
    from tokens
    union all by name
    select
        'specialization_change' as metric,
        *,
        0 as decile,
        change as value,
        0 as baseline
    from changed
    union all by name
    select
        'largest_specialization_change' as metric,
        *,
        0 as decile,
        largest as value,
        0 as baseline
    from changed
    union all by name
    select
        'same_top_expert' as metric,
        *,
        0 as decile,
        same as value,
        1 / n_experts as baseline
    from changed
)

select
    metric,
    stack,
    layer,
    label,
    decile::integer as decile,
    value,
    baseline,
    n
from metrics
order by metric, stack, layer, label, decile
