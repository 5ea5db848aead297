-- Question: Which experts go with which label?
-- Formula: normalized pointwise mutual information of two events, that e is among the k chosen and that the
--   token is of D: ln(P(e,D) / (P(e) P(D))) / -ln P(e,D), -1 … 1. Probabilities are over tokens, every label
--   counts alike: P(D) = 1/#D, P(e,D) = N_eD / (#D N_D), P(e) its sum over D. 1: e is chosen for all tokens
--   of D and for no others. -1: e is never chosen for D. Baseline 0, for D as often as on average, which is
--   also what a single label gives. Null for an expert that no label chose.
--   The numerator is ln lift, see domain_specialization; the denominator lowers it for rare experts.
-- Source: Bouma 2009, "Normalized (Pointwise) Mutual Information in Collocation Extraction"; for experts and
--   tokens arXiv 2505.14681, see token_npmi.
-- Grain: metric, stack, layer, label, expert; every expert of the layer. n = N_D, the tokens of the label.
-- Reads: assignments
-- Example: --layer 4 --labels eng_Latn,kor_Hang
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
with compared as (
    select
        *,
        avg(frequency) over (partition by stack, layer, expert) as mean_frequency,
        count(*) over (partition by stack, layer, expert) as label_count
    from label_load('assignments', $stack, $layer, $labels, $include_special)
)

select
    'label_npmi' as metric,
    stack,
    layer,
    label,
    expert,
    case
        when mean_frequency = 0 then null
        when frequency = 0 then -1
        when frequency = mean_frequency then 0
        else ln(frequency / mean_frequency) / -ln(frequency / label_count)
    end as value,
    0 as baseline,
    tokens as n,
    picks
from compared
order by stack, layer, label, expert
