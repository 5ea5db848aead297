-- Question: Which tokens does each expert write?
-- Formula: of each sampled token and chosen expert, the three tokens whose logits the expert's output raises
--   most, through the final norm of that token's stream and the output embedding. n_e = picks of e, n_ex =
--   those with token x among their three, n and n_x the same over all picks of the layer. value = n_ex / n_e.
--   Baseline n_x / n. Ranked by value * ln(value / baseline), e's part of a relative entropy, so that neither
--   the tokens that every expert promotes come first nor those that were promoted once.
--   An output reaches later layers, too, and may be changed by a norm behind the experts: this is what it
--   writes directly.
-- Source: the logit lens (nostalgebraist 2020), of single experts as in arXiv 2604.02178.
-- Grain: metric, stack, layer, expert, rank from 1 to $n. token is the id where there is no vocabulary.
--   n = n_e; count = n_ex.
-- Reads: sampled_picks, vocab
-- Example: --layer 4 --expert 12 --n 5
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   expert integer = null: only this expert (default: all)
--   n integer >= 1 = 10: tokens of each expert
with picks as (
    select
        *,
        count(*) over (partition by stack, layer) as all_picks,
        count(*) over (partition by stack, layer, expert) as own_picks
    from filtered('sampled_picks', $stack, $layer, $labels, true)
),

promoted as (
    select
        stack,
        layer,
        expert,
        all_picks,
        own_picks,
        unnest([first, second, third]) as token_id
    from picks
),

counted as (
    select
        stack,
        layer,
        expert,
        token_id,
        any_value(all_picks) as all_picks,
        any_value(own_picks) as own_picks,
        count(*) as count
    from promoted
    group by stack, layer, expert, token_id
),

compared as (
    select
        *,
        count / own_picks as value,
        sum(count) over (partition by stack, layer, token_id) / all_picks as baseline
    from counted
),

ranked as (
    select
        *,
        row_number() over (
            partition by stack, layer, expert
            order by value * ln(value / baseline) desc, count desc, token_id asc
        ) as rank
    from compared
    where $expert is null or expert = $expert
)

select
    'output_vocabulary' as metric,
    ranked.stack,
    ranked.layer,
    ranked.expert,
    ranked.rank,
    ranked.token_id,
    coalesce(vocab.token, ranked.token_id::varchar) as token,
    ranked.value,
    ranked.baseline,
    ranked.own_picks as n,
    ranked.count
from ranked
left join vocab on ranked.token_id = vocab.token_id
where ranked.rank <= $n
order by ranked.stack, ranked.layer, ranked.expert, ranked.rank
