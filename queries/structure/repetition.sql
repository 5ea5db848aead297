-- Question: Do neighbouring tokens get the same experts?
-- Formula: over pairs of adjacent tokens of the same document, A and B = the k experts chosen for each:
--   top1_same    share of pairs whose highest-weight experts are the same. Baseline 1/E.
--   any_shared   share of pairs with |A and B| > 0. Baseline 1 - C(E - k, k) / C(E, k).
--   mean_shared  mean of |A and B|, 0 … k. Baseline k^2 / E.
--   The baselines are those of k experts drawn at random. Tokens that do not count (special ones) are in no
--   pair, and the tokens on their two sides are none.
-- Source: Mixtral, arXiv 2401.04088, table 5.
-- Grain: metric, stack, layer, label. n = pairs.
-- Reads: token_decisions, label_sets, layers
-- Needs: weights for metric top1_same
-- Example: --layer 4 --labels kor_Hang
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
with expanded as (
    select counted.* replace (coalesce(label_sets.label, counted.label) as label)
    from
        neighbour_counts('token_decisions', $stack, $layer, $labels, $include_special)
            as counted
    left join label_sets on counted.label = label_sets.label_set
),

labelled as (
    select *
    from expanded
    where $labels is null or list_contains($labels, label)
),

measured as (
    select
        labelled.stack,
        labelled.layer,
        labelled.label,
        layers.n_experts as e,
        layers.top_k as k,
        sum(labelled.pairs)::bigint as n,
        sum(labelled.same_top1) / sum(labelled.pairs) as top1_same,
        sum(labelled.any_shared) / sum(labelled.pairs) as any_shared,
        sum(labelled.shared) / sum(labelled.pairs) as mean_shared
    from labelled
    inner join layers using (stack, layer)
    group by labelled.stack, labelled.layer, labelled.label, layers.n_experts, layers.top_k
),

metrics as (
    select
        'top1_same' as metric,
        *,
        top1_same as value,
        1 / e as baseline
    from measured
    union all
    select
        'any_shared' as metric,
        *,
        any_shared as value,
        -- binomials through ln n! = lgamma(n + 1); two sets of more than half always share
        if(
            2 * k > e,
            1,
            1 - exp(2 * lgamma(greatest(e - k, 0) + 1) - lgamma(greatest(e - 2 * k, 0) + 1) - lgamma(e + 1))
        ) as baseline
    from measured
    union all
    select
        'mean_shared' as metric,
        *,
        mean_shared as value,
        k * k / e as baseline
    from measured
)

select
    metric,
    stack,
    layer,
    label,
    value,
    baseline,
    n
from metrics
order by metric, stack, layer, label
