-- Question: How evenly are the experts loaded?
-- Formula: N_e = times that expert e was among the k chosen, N = tokens, s_e = N_e / (k N); over all E:
--   gini                      sum over e, e' of |s_e - s_e'| / (2 E), 0 … 1. Baseline 0.
--   coefficient_of_variation  standard deviation / mean of N_e. Baseline 0; k of E experts drawn at random
--     give about sqrt((E - k) / (k N)).
--   max_over_mean             largest N_e / mean, 1 … E / k. mean_over_max is its inverse (SGLang's
--     balancedness). Baseline 1.
--   dead_share                experts with N_e / N < threshold, / E. Baseline 0. Read it with n: in a small
--     sample more experts seem dead.
--   coverage                  share of the picks that the m most used experts have. Baseline m / E.
--   load_balance_loss         E sum of s_e P_e, P_e = mean of p over the tokens; only where the run stored
--     probabilities. Baseline 1. Times k it is the loss of transformers for this layer alone.
--   document_union            experts that a document uses / E, mean over documents; n = documents. Baseline
--     mean of 1 - (1 - k/E)^T for T tokens in the document, drawn at random.
-- Source: standard definitions; the loss is that of Switch Transformers, arXiv 2101.03961, section 2.2.
-- Grain: metric, stack, layer, label (null if pooled). n = N, tokens, but for document_union.
-- Reads: assignments, decisions, document_counts, layers
-- Needs: probabilities for metric load_balance_loss
-- Example: --layer 4 --pooled true
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   pooled boolean = false: all labels together, in one row, instead of label by label
--   threshold double = 0.001: share of tokens below which an expert is dead
--   m integer >= 1 = null: experts that coverage counts (default: the layer's k)
with chosen as (
    select *
    from by_label('assignments', $stack, $layer, $labels, $include_special, $pooled)
),

load as (
    select
        stack,
        layer,
        label,
        expert,
        n_experts as e,
        top_k as k,
        least(coalesce($m, top_k), n_experts) as m,
        sum(tokens)::bigint as n,
        sum(picks)::bigint as picks,
        row_number() over (partition by stack, layer, label order by sum(picks) desc, expert asc) as place
    from chosen
    group by stack, layer, label, expert, n_experts, top_k
),

measured as (
    select
        stack,
        layer,
        label,
        e,
        k,
        m,
        n,
        sum((e + 1 - 2 * place) * picks) / (e * sum(picks)) as gini,
        stddev_pop(picks) / avg(picks) as coefficient_of_variation,
        max(picks) / avg(picks) as max_over_mean,
        count_if(picks < $threshold * n) / e as dead_share,
        sum(if(place <= m, picks, 0)) / sum(picks) as coverage,
        list(picks / (k * n) order by expert) as shares
    from load
    group by stack, layer, label, e, k, m, n
),

probable as (
    select
        stack,
        layer,
        label,
        probabilities
    from by_label('decisions', $stack, $layer, $labels, $include_special, $pooled)
    where has_probabilities
),

losses as (
    select
        measured.stack,
        measured.layer,
        measured.label,
        measured.n,
        measured.e * avg(list_dot_product(probable.probabilities::double[], measured.shares)) as loss
    from probable
    inner join measured
        on
            probable.stack = measured.stack
            and probable.layer = measured.layer
            and probable.label is not distinct from measured.label
    group by measured.stack, measured.layer, measured.label, measured.n, measured.e
),

placed as (
    select
        shard,
        doc,
        stack,
        layer,
        label,
        tokens,
        experts
    from by_label('document_counts', $stack, $layer, $labels, $include_special, $pooled)
),

unions as (
    select
        stack,
        layer,
        label,
        sum(tokens) as tokens,
        len(list_distinct(flatten(list(experts)))) as experts
    from placed
    group by shard, doc, stack, layer, label
),

documents_of as (
    select
        unions.stack,
        unions.layer,
        unions.label,
        count(*) as n,
        avg(unions.experts / layers.n_experts) as value,
        avg(1 - (1 - layers.top_k / layers.n_experts) ** unions.tokens) as baseline
    from unions
    inner join layers using (stack, layer)
    group by unions.stack, unions.layer, unions.label
),

metrics as (
    select
        'gini' as metric,
        stack,
        layer,
        label,
        gini as value,
        0 as baseline,
        n
    from measured
    union all
    select
        'coefficient_of_variation' as metric,
        stack,
        layer,
        label,
        coefficient_of_variation as value,
        0 as baseline,
        n
    from measured
    union all
    select
        'max_over_mean' as metric,
        stack,
        layer,
        label,
        max_over_mean as value,
        1 as baseline,
        n
    from measured
    union all
    select
        'mean_over_max' as metric,
        stack,
        layer,
        label,
        1 / max_over_mean as value,
        1 as baseline,
        n
    from measured
    union all
    select
        'dead_share' as metric,
        stack,
        layer,
        label,
        dead_share as value,
        0 as baseline,
        n
    from measured
    union all
    select
        'coverage' as metric,
        stack,
        layer,
        label,
        coverage as value,
        m / e as baseline,
        n
    from measured
    union all
    select
        'load_balance_loss' as metric,
        stack,
        layer,
        label,
        loss as value,
        1 as baseline,
        n
    from losses
    union all
    select
        'document_union' as metric,
        stack,
        layer,
        label,
        value,
        baseline,
        n
    from documents_of
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
