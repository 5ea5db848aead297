-- Question: How much of the text does each expert get, and which experts are dead?
-- Formula: value = N_e / N, the share of all tokens for which e was among the k chosen; sums to k. Baseline
--   k/E, all experts loaded alike. is_dead = value < threshold. Read it with n: in a small sample more
--   experts seem dead. Labels count by their tokens; load_balance sums this up in one number.
-- Source: a count.
-- Grain: metric, stack, layer, expert; every expert of the layer, 0 when never chosen. n = N, tokens of all
--   labels together; picks = N_e.
-- Reads: assignments
-- Example: --layer 4 --labels kor_Hang
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   threshold double = 0.001: share of tokens below which an expert is dead
with load as (
    select
        stack,
        layer,
        expert,
        n_experts,
        top_k,
        sum(tokens)::bigint as tokens,
        sum(picks)::double as picks
    from filtered('assignments', $stack, $layer, $labels, $include_special)
    group by stack, layer, expert, n_experts, top_k
)

select
    'expert_load' as metric,
    stack,
    layer,
    expert,
    picks / tokens as value,
    top_k / n_experts as baseline,
    tokens as n,
    picks::bigint as picks,
    picks / tokens < $threshold as is_dead
from load
order by stack, layer, expert
