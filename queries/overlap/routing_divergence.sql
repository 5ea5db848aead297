-- Question: Is the same sentence routed differently in two labels?
-- Formula: q = mean over a sentence's tokens of the router's distribution over the experts; JSD in nats.
--   routing_divergence       JSD(q_a, q_b) / (ln E - (H(q_a) + H(q_b)) / 2), 0 … 1, mean over the sentences
--     that both labels have: JSD by the most that it could be, given how concentrated the two are. Baseline
--     0, the same experts; two uniform distributions, which differ in nothing, give 0.
--   topk_routing_divergence  the same where the run stored no probabilities: with w / sum w over the k chosen
--     and 0 elsewhere instead of p. The two are not comparable.
-- Source: routing divergence of parallel sentences, arXiv 2510.04694.
-- Grain: metric, stack, layer, label_a, label_b, both orders of each pair with a parallel_id in common. n =
--   these sentences; documents of a label that share a parallel_id are one. Time grows with the square of
--   the labels.
-- Reads: token_decisions, layers
-- Needs: probabilities for metric routing_divergence; weights for metric topk_routing_divergence
-- Example: --layer 4
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
with chosen as (
    select
        stack,
        layer,
        label,
        parallel_id,
        if(probabilities is null, 'topk_routing_divergence', 'routing_divergence') as metric,
        if(probabilities is null, experts, range(len(probabilities))) as experts,
        if(
            probabilities is null,
            list_transform(weights, lambda w: w / list_sum(weights)),
            probabilities
        ) as shares
    from by_label('token_decisions', $stack, $layer, $labels, $include_special, false)
    where
        parallel_id is not null
),

-- numbers instead of names, because the pairs of texts are many
texts as (
    select
        metric,
        stack,
        layer,
        parallel_id,
        label,
        dense_rank() over (order by metric, stack, layer, parallel_id) as sentence,
        row_number() over (order by metric, stack, layer, parallel_id, label) as id
    from chosen
    group by metric, stack, layer, parallel_id, label
),

entries as (
    select
        texts.sentence,
        texts.id,
        unnest(chosen.experts) as expert,
        unnest(chosen.shares)::double as share
    from chosen
    inner join texts using (metric, stack, layer, parallel_id, label)
),

summed as (
    select
        sentence,
        id,
        expert,
        sum(share) as share
    from entries
    where share > 0
    group by sentence, id, expert
),

distributions as (
    select
        sentence,
        id,
        expert,
        share / sum(share) over (partition by id) as q
    from summed
),

halves as (
    select
        *,
        q / 2 as half,
        q / 2 * ln(q / 2) as half_log
    from distributions
),

entropies as (
    select
        id,
        -sum(q * ln(q)) as h
    from distributions
    group by id
),

-- experts that both use: how H((q_a + q_b) / 2) differs from what the halves would give apart
common as (
    select
        a.id as id_a,
        b.id as id_b,
        sum(a.half_log + b.half_log - (a.half + b.half) * ln(a.half + b.half)) as shared
    from halves as a
    inner join halves as b
        on
            a.sentence = b.sentence
            and a.expert = b.expert
            and a.id < b.id
    group by a.id, b.id
),

paired as (
    select
        a.metric,
        a.stack,
        a.layer,
        a.label as label_a,
        b.label as label_b,
        ln(2) + coalesce(common.shared, 0) as jsd,
        ln(layers.n_experts) - (entropy_a.h + entropy_b.h) / 2 as most
    from texts as a
    inner join texts as b on a.sentence = b.sentence and a.id < b.id
    inner join entropies as entropy_a on a.id = entropy_a.id
    inner join entropies as entropy_b on b.id = entropy_b.id
    inner join layers on a.stack = layers.stack and a.layer = layers.layer
    left join common on a.id = common.id_a and b.id = common.id_b
),

measured as (
    select
        metric,
        stack,
        layer,
        label_a,
        label_b,
        avg(if(most > 1e-9, greatest(jsd, 0) / most, 0)) as value,
        count(*) as n
    from paired
    group by metric, stack, layer, label_a, label_b
),

mirrored as (
    select *
    from measured
    union all by name
    select
        * exclude (label_a, label_b),
        label_b as label_a,
        label_a as label_b
    from measured
)

select
    metric,
    stack,
    layer,
    label_a,
    label_b,
    value,
    0 as baseline,
    n
from mirrored
order by metric, stack, layer, label_a, label_b
