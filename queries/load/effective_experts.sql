-- Question: How many experts does each label really use? Does one language use a smaller set than another?
-- Formula: exp(H), with the load entropy H = - sum over e of s ln s and s = N_eD / (k N_D), e's share of
--   all picks of D: the number of equally loaded experts that have the same entropy, 1 … E.
--   Baseline E, all experts loaded alike.
--   used_experts  experts chosen at least once.
--   half_experts  the fewest experts that together have half of the picks; half_share is it / E.
--   All of them grow with the number of tokens: compare labels of similar n.
-- Source: perplexity of the load; the effective number (Hill number of order 1) of ecology.
-- Grain: metric, stack, layer, label. n = N_D, the tokens of the label.
-- Reads: assignments
-- Biased: effective_experts
-- Example: --layer 4 --labels eng_Latn,kor_Hang
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
with shares as (
    select
        *,
        picks / (top_k * tokens) as share,
        sum(picks) over (
            partition by stack, layer, label
            order by picks desc, expert asc
            rows between unbounded preceding and 1 preceding
        ) as picks_before
    from label_load('assignments', $stack, $layer, $labels, $include_special)
),

summed as (
    select
        stack,
        layer,
        label,
        n_experts,
        tokens,
        sum(if(picks > 0, -share * ln(share), 0)) as load_entropy,
        count_if(picks > 0)::integer as used_experts,
        -- an expert is needed while those before it have less than half
        count_if(2 * coalesce(picks_before, 0) < top_k * tokens)::integer as half_experts
    from shares
    group by stack, layer, label, n_experts, tokens
)

select
    'effective_experts' as metric,
    stack,
    layer,
    label,
    exp(load_entropy) as value,
    n_experts as baseline,
    tokens as n,
    load_entropy,
    used_experts,
    half_experts,
    half_experts / n_experts as half_share
from summed
order by stack, layer, label
