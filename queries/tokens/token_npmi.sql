-- Question: Which tokens go with each expert, more than with the others?
-- Formula: normalized pointwise mutual information of two events, that e is among the k chosen and that the
--   token has id x: ln(P(e,x) / (P(e) P(x))) / -ln P(e,x), -1 … 1. Probabilities are shares of all N tokens
--   with an id, each once, however many experts it has: P(x) = N_x / N, P(e) = N_e / N, P(e,x) = N_xe / N.
--   1: e is chosen for all occurrences of x and for nothing else. Baseline 0, e is chosen for x as often as
--   for any token. Ids with N_x >= min_count; the others still count in N and N_e.
--   An id of expert_tokens is one that e gets most of; here it may be one that most experts get, if e gets
--   it more than it gets others.
-- Source: Bouma 2009, "Normalized (Pointwise) Mutual Information in Collocation Extraction"; arXiv 2505.14681
--   finds the experts of reasoning by that of tokens like <think>: --token_id with --include_special true.
-- Grain: metric, stack, layer, expert, rank from 1 to $n; by value, then by N_xe, then by id; ids for which e
--   was never chosen are left out. token is the id where there is no vocabulary. n = N_x, all labels
--   together; count = N_xe. No rows where the run dropped the ids of its tokens.
-- Reads: token_decisions, vocab
-- Example: --layer 4 --n 3
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   min_count integer >= 1 = 10: ids that occur less often are left out
--   n integer >= 1 = 10: tokens of each expert
--   token_id integer >= 0 = null: only this token, for every expert that was chosen for it (default: all)
with occurring as materialized (
    select *
    from token_counts('token_decisions', $stack, $layer, $labels, $include_special)
),

counted as (
    select
        stack,
        layer,
        token_id,
        tokens,
        unnest(experts)::integer as expert,
        unnest(picks) as picks
    from occurring
),

totals as (
    select
        stack,
        layer,
        sum(tokens) as all_tokens
    from occurring
    group by stack, layer
),

expert_totals as (
    select
        stack,
        layer,
        expert,
        sum(picks) as expert_tokens
    from counted
    group by stack, layer, expert
),

joined as (
    select
        counted.*,
        totals.all_tokens::double as all_tokens,
        expert_totals.expert_tokens
    from counted
    inner join totals using (stack, layer)
    inner join expert_totals using (stack, layer, expert)
),

measured as (
    select
        *,
        (picks * all_tokens) / (expert_tokens * tokens) as lift,
        picks / all_tokens as joint
    from joined
    where
        tokens >= $min_count and ($token_id is null or token_id = $token_id)
),

normalized as (
    select
        *,
        if(lift = 1, 0, ln(lift) / -ln(joint)) as value
    from measured
),

ranked as (
    select
        *,
        row_number() over (
            partition by stack, layer, expert
            order by value desc, picks desc, token_id asc
        ) as rank
    from normalized
)

select
    'token_npmi' as metric,
    ranked.stack,
    ranked.layer,
    ranked.expert,
    ranked.rank,
    ranked.token_id,
    coalesce(vocab.token, ranked.token_id::varchar) as token,
    ranked.value,
    0 as baseline,
    ranked.tokens as n,
    ranked.picks::bigint as count
from ranked
left join vocab on ranked.token_id = vocab.token_id
where ranked.rank <= $n
order by ranked.stack, ranked.layer, ranked.expert, ranked.rank
