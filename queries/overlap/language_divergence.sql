-- Question: In which layers do labels use different experts?
-- Formula: s = N_eD / (k N_D), e's share of D's picks; the Jensen-Shannon divergence of s_a and s_b in bits,
--   0 … 1, as in language_overlap, over all pairs of two labels: value = their mean, median and quartiles
--   beside it. Baseline 0, the same use everywhere. A finite sample gives more than that, and so do layers
--   that favour experts for other reasons: compare with the same model with random weights.
-- Source: divergence over depth as in multilingual routing, arXiv 2510.04694, here of whole labels instead of
--   parallel sentences (see routing_divergence for these).
-- Grain: metric, stack, layer. n = pairs of labels; no row for a single label.
-- Reads: assignments
-- Biased: language_divergence
-- Example: --labels eng_Latn,kor_Hang,rus_Cyrl
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
with load as (
    select
        *,
        frequency / top_k as share
    from label_load('assignments', $stack, $layer, $labels, $include_special)
),

paired as (
    select
        a.stack,
        a.layer,
        a.label as label_a,
        b.label as label_b,
        sum(if(a.share > 0, a.share * log2(2 * a.share / (a.share + b.share)), 0)) / 2
        + sum(if(b.share > 0, b.share * log2(2 * b.share / (a.share + b.share)), 0)) / 2 as jsd
    from load as a
    inner join load as b
        on
            a.stack = b.stack
            and a.layer = b.layer
            and a.expert = b.expert
            and a.label < b.label
    group by a.stack, a.layer, a.label, b.label
)

select
    'language_divergence' as metric,
    stack,
    layer,
    greatest(avg(jsd), 0) as value,
    0 as baseline,
    count(*) as n,
    greatest(quantile_cont(jsd, 0.25), 0) as first_quartile,
    greatest(quantile_cont(jsd, 0.5), 0) as median,
    greatest(quantile_cont(jsd, 0.75), 0) as third_quartile
from paired
group by stack, layer
order by metric, stack, layer
