-- Question: Which experts specialize in which label?
-- Formula: DS(e, D) = N_eD / N_D, the share of D's tokens for which e was among the k chosen.
--   Baseline k/E, a router that chooses uniformly.
--   exclusivity  DS(e, D) / sum of DS(e, D') over the labels; exclusivity_baseline 1 / number of labels.
--   lift         e's share of D's picks / e's mean share over the labels, each label with equal weight;
--     1 = no preference. Both are null for an expert that no label chose.
--   With $labels given, exclusivity and lift compare those labels only.
-- Source: OLMoE, arXiv 2409.02060, section 5 (domain specialization).
-- Grain: metric, stack, layer, label, expert; every expert of the layer, 0 when never chosen. n = N_D.
-- Reads: assignments
-- Example: --layer 4 --labels heb_Hebr,kor_Hang
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
with compared as (
    select
        *,
        sum(frequency) over (partition by stack, layer, expert) as frequency_total,
        count(*) over (partition by stack, layer, expert) as label_count
    from label_load('assignments', $stack, $layer, $labels, $include_special)
)

-- k is the same for all labels of a layer, so a ratio of frequencies is one of shares
select
    'domain_specialization' as metric,
    stack,
    layer,
    label,
    expert,
    frequency as value,
    top_k / n_experts as baseline,
    tokens as n,
    picks::bigint as picks,
    frequency / nullif(frequency_total, 0) as exclusivity,
    1 / label_count as exclusivity_baseline,
    frequency * label_count / nullif(frequency_total, 0) as lift
from compared
order by stack, layer, label, expert
