-- Question: How special is what each expert writes?
-- Formula: p_x = share of token x among all that e's sampled picks promote, three each (see
--   output_vocabulary), q_x = the same over all picks of the layer. value = Jensen-Shannon divergence of p
--   and q in bits, 0 … 1. Baseline: its expectation if e's promoted tokens were as many independent draws
--   from q, exactly, token by token over the binomial distribution; few picks look special by chance.
--   An expert is part of its layer, so the value is below 1 even where it promotes tokens of its own.
-- Source: Lin 1991, "Divergence measures based on the Shannon entropy"; the baseline is ours.
-- Grain: metric, stack, layer, expert; experts without a sampled pick have no row. n = picks.
-- Reads: sampled_picks
-- Example: --layer 4
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
with promoted as (
    select
        stack,
        layer,
        expert,
        unnest([first, second, third]) as token_id
    from filtered('sampled_picks', $stack, $layer, $labels, true)
),

counted as (
    select
        stack,
        layer,
        expert,
        token_id,
        count(*) as own
    from promoted
    group by stack, layer, expert, token_id
),

totals as (
    select
        *,
        sum(own) over (partition by stack, layer, expert)::double as draws,
        own / sum(own) over (partition by stack, layer, expert) as p,
        sum(own) over (partition by stack, layer, token_id) / sum(own) over (partition by stack, layer) as q
    from counted
),

-- a token that e never promotes adds q / 2, so that only the others need be visited
divergences as (
    select
        stack,
        layer,
        expert,
        any_value(draws) as draws,
        0.5 + sum((p * log2(2 * p / (p + q)) + q * log2(2 * q / (p + q)) - q) / 2) as value
    from totals
    group by stack, layer, expert
),

-- most tokens share their q with many others
levels as (
    select
        stack,
        layer,
        q,
        count(distinct token_id) as tokens
    from totals
    group by stack, layer, q
),

sizes as (
    select distinct
        stack,
        layer,
        draws
    from divergences
),

-- ten deviations beyond the mean, and some more where it is small
reached as (
    select
        sizes.stack,
        sizes.layer,
        sizes.draws,
        levels.q,
        levels.tokens,
        least(sizes.draws, ceil(sizes.draws * levels.q + 10 * sqrt(sizes.draws * levels.q) + 20)) as most
    from sizes
    inner join levels using (stack, layer)
),

drawn as (
    select
        *,
        unnest(range(1, most::bigint + 1)) as own,
        own / draws as p
    from reached
),

expected as (
    select
        stack,
        layer,
        draws,
        0.5 + sum(
            tokens
            * case
                when q < 1
                    then exp(
                        lgamma(draws + 1) - lgamma(own + 1) - lgamma(draws - own + 1)
                        + own * ln(q) + (draws - own) * ln(1 - q)
                    )
                else (own = draws)::integer
            end
            * (p * log2(2 * p / (p + q)) + q * log2(2 * q / (p + q)) - q) / 2
        ) as baseline
    from drawn
    group by stack, layer, draws
)

select
    'output_specialization' as metric,
    divergences.stack,
    divergences.layer,
    divergences.expert,
    greatest(divergences.value, 0) as value,
    greatest(expected.baseline, 0) as baseline,
    (divergences.draws / 3)::bigint as n
from divergences
inner join expected using (stack, layer, draws)
order by divergences.stack, divergences.layer, divergences.expert
