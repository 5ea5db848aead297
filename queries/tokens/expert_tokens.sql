-- Question: Which tokens is each expert there for?
-- Formula: N_x = occurrences of token id x, N_xe = those for which e was among the k chosen; ids with
--   N_x >= min_count. value = N_xe / N_x, of the ids for which e has the most of all experts (ties: the lower
--   expert), which are those that expert_topk of vocabulary_specialization averages. Baseline k/E, what each
--   single expert gets by chance; the largest of E gets more, most so for a small N_x.
-- Source: OLMoE, arXiv 2409.02060, section 5 (vocabulary specialization).
-- Grain: metric, stack, layer, expert, rank from 1 to $n; by value, then by N_xe, then by id. token is the id
--   where there is no vocabulary. n = N_x, all labels together; count = N_xe. No rows where the run dropped
--   the ids of its tokens.
-- Reads: token_decisions, layers, vocab
-- Example: --layer 4 --n 3
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   min_count integer >= 1 = 10: ids that occur less often are left out
--   n integer >= 1 = 10: tokens of each expert
with favourites as (
    select
        stack,
        layer,
        token_id,
        tokens,
        list_max(picks) as picks,
        experts[list_position(picks, list_max(picks))] as expert
    from token_counts('token_decisions', $stack, $layer, $labels, $include_special)
    where tokens >= $min_count
),

ranked as (
    select
        *,
        row_number() over (
            partition by stack, layer, expert
            order by picks / tokens desc, picks desc, token_id asc
        ) as rank
    from favourites
)

select
    'expert_tokens' as metric,
    ranked.stack,
    ranked.layer,
    ranked.expert::integer as expert,
    ranked.rank,
    ranked.token_id,
    coalesce(vocab.token, ranked.token_id::varchar) as token,
    ranked.picks / ranked.tokens as value,
    layers.top_k / layers.n_experts as baseline,
    ranked.tokens as n,
    ranked.picks::bigint as count
from ranked
inner join layers using (stack, layer)
left join vocab on ranked.token_id = vocab.token_id
where ranked.rank <= $n
order by ranked.stack, ranked.layer, ranked.expert, ranked.rank
