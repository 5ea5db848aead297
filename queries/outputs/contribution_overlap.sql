-- Question: Do the same experts write the layer's output for two labels?
-- Formula: language_overlap with what experts add in place of how often they are chosen: over the experts of
--   one layer, c = max(0, sum of <g f, y> / |y|^2) / N_D, the contribution per token (see
--   expert_contribution), and s = c / the sum of c.
--   weighted_jaccard  sum of min(c_a, c_b) / sum of max(c_a, c_b), Ruzicka; no baseline.
--   cosine            c_a . c_b / (|c_a| |c_b|); no baseline.
--   jsd               Jensen-Shannon divergence of s_a and s_b in bits, 0 … 1. Baseline 0 (same use).
--   A label whose experts add nothing has no value.
-- Source: standard definitions over contributions, which are ours; the pairs include each label with itself.
-- Grain: metric, stack, layer, label_a, label_b, both orders of each pair. n = the smaller of n_a and n_b,
--   the tokens of the labels.
-- Reads: assignments, label_outputs
-- Biased: weighted_jaccard, cosine, jsd
-- Example: --layer 4 --labels bul_Cyrl,kor_Hang,rus_Cyrl
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
with effects as (
    select
        stack,
        layer,
        label,
        expert,
        tokens,
        greatest(contribution, 0) / tokens as c
    from label_effects('label_outputs', 'assignments', $stack, $layer, $labels, $include_special, false)
),

shares as (
    select
        *,
        c / nullif(sum(c) over (partition by stack, layer, label), 0) as s
    from effects
),

compared as (
    select
        a.stack,
        a.layer,
        a.label as label_a,
        b.label as label_b,
        a.tokens as n_a,
        b.tokens as n_b,
        sum(least(a.c, b.c)) / nullif(sum(greatest(a.c, b.c)), 0) as weighted_jaccard,
        sum(a.c * b.c) / nullif(sqrt(sum(a.c * a.c) * sum(b.c * b.c)), 0) as cosine,
        sum(if(a.s > 0, a.s * log2(2 * a.s / (a.s + b.s)), 0)) / 2
        + sum(if(b.s > 0, b.s * log2(2 * b.s / (a.s + b.s)), 0)) / 2 as divergence,
        sum(a.c) > 0 and sum(b.c) > 0 as has_shares
    from shares as a
    inner join shares as b using (stack, layer, expert)
    group by a.stack, a.layer, a.label, b.label, a.tokens, b.tokens
),

metrics as (
    select
        'weighted_jaccard' as metric,
        *,
        weighted_jaccard as value,
        null as baseline
    from compared
    union all
    select
        'cosine' as metric,
        *,
        cosine as value,
        null as baseline
    from compared
    union all
    select
        'jsd' as metric,
        *,
        if(has_shares, greatest(divergence, 0), null) as value,
        0 as baseline
    from compared
)

select
    metric,
    stack,
    layer,
    label_a,
    label_b,
    value,
    baseline,
    least(n_a, n_b) as n,
    n_a,
    n_b
from metrics
order by metric, stack, layer, label_a, label_b
