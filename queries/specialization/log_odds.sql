-- Question: Which experts does a label use more than the other labels do, beyond what chance explains?
-- Formula: y = picks of e, n = all picks (k per token), of the label D and of the other labels together (R).
--   The prior of e is alpha = strength E (y_D + y_R) / (n_D + n_R), alpha_0 = strength E in all.
--   log_odds = ln((y_D + alpha) / (n_D + alpha_0 - y_D - alpha))
--            - ln((y_R + alpha) / (n_R + alpha_0 - y_R - alpha))
--   variance = 1 / (y_D + alpha) + 1 / (y_R + alpha)
--   value = log_odds / sqrt(variance), a z-score. Baseline 0, which is also what a single label gives.
--   Null for an expert that got none of the picks, or all. It ranks experts and is no test: the tokens of a
--   document are correlated and the picks of a token exclude each other. R weighs its labels by tokens.
-- Source: log-odds ratio with an informative Dirichlet prior, Monroe, Colaresi and Quinn 2008, Fightin'
--   Words, eq. 22.
-- Grain: metric, stack, layer, label, expert; every expert of the layer. n = N_D, the tokens of the label.
-- Reads: assignments
-- Example: --layer 4 --labels eng_Latn,kor_Hang
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   strength double = 1: of the prior, in picks per expert on average; more pulls rare experts to 0
with load as (
    select
        *,
        top_k * tokens as total
    from label_load('assignments', $stack, $layer, $labels, $include_special)
),

pooled as (
    select
        *,
        sum(picks) over (partition by stack, layer, expert) as all_picks,
        sum(total) over (partition by stack, layer, expert) as all_total
    from load
),

prior as (
    select
        *,
        $strength * n_experts * all_picks / all_total as alpha,
        $strength * n_experts * (all_total - all_picks) / all_total as alpha_others
    from pooled
),

smoothed as (
    select
        *,
        nullif(picks + alpha, 0) as label_picks,
        nullif(total - picks + alpha_others, 0) as label_others,
        nullif(all_picks - picks + alpha, 0) as rest_picks,
        nullif(all_total - total - (all_picks - picks) + alpha_others, 0) as rest_others
    from prior
),

measured as (
    select
        *,
        ln(label_picks / label_others) - ln(rest_picks / rest_others) as log_odds,
        1 / label_picks + 1 / rest_picks as variance
    from smoothed
)

select
    'log_odds_z' as metric,
    stack,
    layer,
    label,
    expert,
    log_odds / sqrt(variance) as value,
    0 as baseline,
    tokens as n,
    picks::bigint as picks,
    log_odds
from measured
order by stack, layer, label, expert
