-- Question: Do two labels use the same experts?
-- Formula: over the experts of one layer, f = N_eD / N_D (selection frequency), s = f / k (share).
--   jaccard           |A and B| / |A or B| of the m most used experts of each label; an expert that was
--     never chosen is in no set, ties go to the lower id. Baseline: the expectation for two independent
--     uniformly drawn sets of the same sizes a and b, with a hypergeometric intersection i:
--     sum over i of i / (a + b - i) * C(a, i) C(E - a, b - i) / C(E, b).
--   weighted_jaccard  sum of min(f_a, f_b) / sum of max(f_a, f_b), Ruzicka; no baseline.
--   cosine            f_a . f_b / (|f_a| |f_b|); no baseline.
--   jsd               Jensen-Shannon divergence of s_a and s_b in bits, 0 … 1. Baseline 0 (same use).
-- Source: standard definitions; the pairs include each label with itself.
-- Grain: metric, stack, layer, label_a, label_b, both orders of each pair. n = the smaller of n_a and
--   n_b, the tokens of the labels; m as applied.
-- Reads: assignments
-- Biased: weighted_jaccard, cosine, jsd
-- Example: --layer 4 --labels bul_Cyrl,kor_Hang,rus_Cyrl
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   m integer >= 1 = null: size of the sets that jaccard compares (default: the layer's k)
with load as (
    select
        *,
        coalesce($m, top_k) as m,
        frequency / top_k as share,
        row_number() over (partition by stack, layer, label order by picks desc, expert asc) as place
    from label_load('assignments', $stack, $layer, $labels, $include_special)
),

ranked as (
    select
        *,
        frequency > 0 and place <= m as is_top
    from load
),

paired as (
    select
        a.stack,
        a.layer,
        a.label as label_a,
        b.label as label_b,
        a.n_experts,
        a.m,
        a.tokens as n_a,
        b.tokens as n_b,
        count_if(a.is_top)::integer as size_a,
        count_if(b.is_top)::integer as size_b,
        count_if(a.is_top and b.is_top)::integer as shared,
        sum(least(a.frequency, b.frequency)) / sum(greatest(a.frequency, b.frequency)) as weighted_jaccard,
        sum(a.frequency * b.frequency)
        / sqrt(sum(a.frequency * a.frequency) * sum(b.frequency * b.frequency)) as cosine,
        sum(if(a.share > 0, a.share * log2(2 * a.share / (a.share + b.share)), 0)) / 2
        + sum(if(b.share > 0, b.share * log2(2 * b.share / (a.share + b.share)), 0)) / 2 as jsd
    from ranked as a
    inner join ranked as b
        on
            a.stack = b.stack
            and a.layer = b.layer
            and a.expert = b.expert
            and a.label <= b.label
    group by a.stack, a.layer, a.label, b.label, a.n_experts, a.m, a.tokens, b.tokens
),

sizes as (
    select distinct
        n_experts,
        size_a,
        size_b
    from paired
),

-- once for all pairs of labels
expected as (
    select
        *,
        expected_jaccard(n_experts, size_a, size_b) as expected_jaccard
    from sizes
),

compared as (
    select
        paired.*,
        expected.expected_jaccard
    from paired
    inner join expected using (n_experts, size_a, size_b)
),

metrics as (
    select
        'jaccard' as metric,
        *,
        shared / (size_a + size_b - shared) as value,
        expected_jaccard as baseline
    from compared
    union all
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
        greatest(jsd, 0) as value,
        0 as baseline
    from compared
),

mirrored as (
    select *
    from metrics
    union all by name
    select
        * exclude (label_a, label_b, n_a, n_b),
        label_b as label_a,
        label_a as label_b,
        n_b as n_a,
        n_a as n_b
    from metrics
    where label_a < label_b
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
    n_b,
    m
from mirrored
order by metric, stack, layer, label_a, label_b
