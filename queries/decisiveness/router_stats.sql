-- Question: How are the logits, probabilities and weights of a router distributed?
-- Formula: over the values of N_D tokens: mean (value), standard deviation (of the population), minimum,
--   maximum, and quantiles (the smallest value that at least this share of all does not exceed).
--   logit               z of all E experts.            No baseline: the softmax does not see a shift.
--   probability         p = softmax(z) of all E.       Baseline 1/E.
--   chosen_logit        z of the k chosen experts.
--   chosen_probability  p of the k chosen.             Baseline 1/E, of a choice that does not look at p.
--   weight              w / sum w of the k chosen.     Baseline 1/k.
--   Logits need a run with --store logits, p of all experts --store logits or probabilities; what the run
--   does not have, has no rows. Logits of minus infinity are left out. For quantiles, minimum and maximum the
--   values are rounded to 12 significant bits, a part in 4,000, and counted.
-- Source: Hyndman and Fan 1996, "Sample Quantiles in Statistical Packages", definition 1.
-- Grain: metric, stack, layer, label. n = the values: N_D times E or k.
-- Reads: decisions, layers
-- Needs: logits for metric logit, chosen_logit; probabilities for metric probability, chosen_probability;
--   weights for metric weight
-- Example: --layer 4 --labels kor_Hang
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   pooled boolean = false: all labels together, with label null
with chosen as (
    select
        stack,
        layer,
        label,
        logits,
        probabilities,
        list_filter(experts, lambda e: e is not null) as picks,
        list_filter(weights, lambda w: w is not null)::double[] as weights
    from by_label('decisions', $stack, $layer, $labels, $include_special, $pooled)
),

measured as (
    select
        stack,
        layer,
        label,
        unnest(['logit', 'probability', 'chosen_logit', 'chosen_probability', 'weight']) as metric,
        unnest([
            logits::double[],
            probabilities::double[],
            if(logits is null, null, list_transform(picks, lambda e: logits[e + 1]))::double[],
            if(probabilities is null, null, list_transform(picks, lambda e: probabilities[e + 1]))::double[],
            list_transform(weights, lambda w: w / list_sum(weights))
        ]) as per_pick
    from chosen
),

single as (
    select
        * exclude (per_pick),
        unnest(per_pick) as number
    from measured
),

finite as (
    select
        *,
        -- the last of its 12
        if(number = 0, 1, pow(2, floor(log2(abs(number))) - 11)) as bit
    from single
    where isfinite(number)
),

counted as (
    select
        metric,
        stack,
        layer,
        label,
        round(number / bit) * bit as rounded,
        count(*) as occurrences,
        sum(number) as total,
        sum(number * number) as squares
    from finite
    group by all
),

placed as (
    select
        *,
        sum(occurrences) over (partition by metric, stack, layer, label) as n,
        sum(occurrences) over (partition by metric, stack, layer, label order by rounded) as place
    from counted
),

summarised as (
    select
        metric,
        stack,
        layer,
        label,
        sum(total) / any_value(n) as mean,
        sum(squares) / any_value(n) as mean_square,
        any_value(n)::bigint as n,
        min(rounded) as minimum,
        min(rounded) filter (where place >= 0.05 * n) as percentile_5,
        min(rounded) filter (where place >= 0.25 * n) as first_quartile,
        min(rounded) filter (where place >= 0.5 * n) as median,
        min(rounded) filter (where place >= 0.75 * n) as third_quartile,
        min(rounded) filter (where place >= 0.95 * n) as percentile_95,
        max(rounded) as maximum
    from placed
    group by metric, stack, layer, label
)

select
    summarised.metric,
    summarised.stack,
    summarised.layer,
    summarised.label,
    summarised.mean as value,
    case
        when summarised.metric in ('probability', 'chosen_probability') then 1 / layers.n_experts
        when summarised.metric = 'weight' then 1 / layers.top_k
    end as baseline,
    summarised.n,
    sqrt(greatest(summarised.mean_square - summarised.mean * summarised.mean, 0)) as standard_deviation,
    summarised.minimum,
    summarised.percentile_5,
    summarised.first_quartile,
    summarised.median,
    summarised.third_quartile,
    summarised.percentile_95,
    summarised.maximum
from summarised
inner join layers using (stack, layer)
order by summarised.metric, summarised.stack, summarised.layer, summarised.label
