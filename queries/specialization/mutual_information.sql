-- Question: How much does the choice of an expert say about the label?
-- Formula: s = N_eD / (k N_D), e's share of D's picks; every label counts alike: P(D) = 1/#D, P(e) = the
--   mean of s over the labels.
--   mutual_information             I(e;D) = 1/#D sum over D, e of s log2(s / P(e)), in bits, 0 … log2 #D.
--   normalized_mutual_information  I(e;D) / H(D), H(D) = log2 #D; 0 … 1, null for a single label.
--   Baseline 0, the same experts for all labels. A finite sample gives more than that: bias = what labels
--   that say nothing give, to first order and with independent tokens,
--   (E_used - k) (#D - 1) / (2 #D^2 ln 2) * sum over D of 1 / (k N_D), with E_used experts chosen at all.
--   The tokens of a document are not independent, so the real bias is larger.
-- Source: Shannon's mutual information of assignment and label; bias as in Miller 1955 and Madow, for k
--   picks without replacement.
-- Grain: metric, stack, layer. n = tokens of all labels, labels = #D.
-- Reads: assignments
-- Biased: mutual_information, normalized_mutual_information
-- Example: --layer 4
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
with load as (
    select
        *,
        picks / (top_k * tokens) as share
    from label_load('assignments', $stack, $layer, $labels, $include_special)
),

mixed as (
    select
        *,
        avg(share) over (partition by stack, layer, expert) as mean_share,
        count(*) over (partition by stack, layer, expert) as label_count
    from load
),

summed as (
    select
        stack,
        layer,
        label_count,
        sum(tokens) / n_experts as n,
        greatest(sum(if(share > 0, share * log2(share / mean_share), 0)) / label_count, 0) as bits,
        (count(distinct expert) filter (where picks > 0) - top_k)
        * (label_count - 1) / (2 * label_count * label_count * ln(2))
        * sum(1 / (top_k * tokens)) / n_experts as bias
    from mixed
    group by stack, layer, label_count, n_experts, top_k
),

metrics as (
    select
        'mutual_information' as metric,
        *,
        1 as unit
    from summed
    union all
    select
        'normalized_mutual_information' as metric,
        *,
        nullif(log2(label_count), 0) as unit
    from summed
)

select
    metric,
    stack,
    layer,
    bits / unit as value,
    0 as baseline,
    n::bigint as n,
    label_count as labels,
    bias / unit as bias
from metrics
order by metric, stack, layer
