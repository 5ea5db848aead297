-- Question: Does anything that we observe of an expert predict what the model loses without it?
-- Formula: loss = what a label loses without the expert, as nats_per_token of `expert_effect`, of arms that
--   drop a single expert everywhere. Over the experts of a layer with such an arm, for each observed metric:
--   spearman  rank correlation of metric and loss; ties have their mean rank. Baseline 0. standard_error =
--     1 / sqrt(n - 1), that of ranks without relation.
--   cohens_d  (mean of the metric over the share of experts with the largest loss - mean over the others) /
--     sqrt(pooled variance). Baseline 0. standard_error is null.
--   Observed: frequency N_eD / N_D, top1 (share of tokens whose highest weight it has), weight (sum of w /
--   N_D), weight_if_chosen (sum of w / N_eD), lift (frequency / mean frequency of the labels, not pooled),
--   selectivity (1 - entropy of frequencies over labels / ln of their number), contribution, saliency,
--   activation_norm, ean, weighted_ean (see `expert_contribution`). Experts that a metric says nothing of are
--   left out, and metrics that are the same for all.
-- Source: no observed metric predicted what 2,000 experts of several models are worth: arXiv 2606.10703.
--   Spearman 1904; Cohen 1988, "Statistical Power Analysis", with the pooled standard deviation.
-- Grain: metric, observed, stack, layer, label. n = experts.
-- Reads: arms, document_effects, assignments, label_outputs
-- Example: --layer 4 --labels kor_Hang
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   pooled boolean = false: all labels together
--   share double = 0.25: part of the experts that counts as important
with dropped as (
    select
        arm,
        any_value(stack) as stack,
        any_value(layer) as layer,
        any_value(expert) as expert
    from arms
    where control = 0
    group by arm
    having
        count(*) = 1
        and any_value(operation) = 'drop'
        and count(label) + count(token_class) + count(position) = 0
),

effects as (
    select *
    from by_label('document_effects', null, null, $labels, true, $pooled)
),

losses as (
    select
        dropped.stack,
        dropped.layer,
        dropped.expert,
        effects.label,
        sum(effects.loss - effects.base_loss) / sum(effects.tokens) as loss
    from effects
    inner join dropped using (arm)
    where effects.control = 0
    group by dropped.stack, dropped.layer, dropped.expert, effects.label
    having sum(effects.tokens) > 0
),

of_labels as (
    select
        stack,
        layer,
        expert,
        frequency,
        frequency / nullif(sum(frequency) over of_expert, 0) as part,
        count(*) over of_expert as labels
    from label_load('assignments', $stack, $layer, $labels, false)
    window of_expert as (partition by stack, layer, expert)
),

spread as (
    select
        stack,
        layer,
        expert,
        avg(frequency) as mean_frequency,
        1 + sum(if(part > 0, part * ln(part), 0)) / nullif(ln(any_value(labels)), 0) as selectivity
    from of_labels
    group by stack, layer, expert
),

routed as (
    select
        stack,
        layer,
        label,
        expert,
        sum(tokens) as tokens,
        sum(picks) as picks,
        sum(top1) as top1,
        sum(weight_sum) as weight_sum
    from by_label('assignments', $stack, $layer, $labels, false, $pooled)
    group by stack, layer, label, expert
),

written as (
    select *
    from label_effects('label_outputs', 'assignments', $stack, $layer, $labels, false, $pooled)
),

observations as (
    select
        routed.stack,
        routed.layer,
        routed.label,
        routed.expert,
        unnest([
            'frequency', 'top1', 'weight', 'weight_if_chosen', 'lift', 'selectivity',
            'contribution', 'saliency', 'activation_norm', 'ean', 'weighted_ean'
        ]) as observed,
        unnest([
            routed.picks / routed.tokens,
            routed.top1 / routed.tokens,
            routed.weight_sum / routed.tokens,
            routed.weight_sum / nullif(routed.picks, 0),
            if(routed.label is null, null, routed.picks / routed.tokens / nullif(spread.mean_frequency, 0)),
            if(spread.mean_frequency > 0, spread.selectivity, null),
            written.contribution / written.tokens,
            written.weighted_norm / nullif(written.picks, 0),
            written.norm / nullif(written.picks, 0),
            written.norm / written.tokens,
            written.weighted_norm / written.tokens
        ]) as x
    from routed
    inner join spread
        on routed.stack = spread.stack and routed.layer = spread.layer and routed.expert = spread.expert
    inner join written
        on
            routed.stack = written.stack
            and routed.layer = written.layer
            and routed.label is not distinct from written.label
            and routed.expert = written.expert
),

-- threads add up in any order, and ties must stay ties
compared as (
    select
        observations.* replace (round(observations.x, 12) as x),
        round(losses.loss, 12) as loss
    from observations
    inner join losses
        on
            observations.stack = losses.stack
            and observations.layer = losses.layer
            and observations.label is not distinct from losses.label
            and observations.expert = losses.expert
    where observations.x is not null
),

ranked as (
    select
        *,
        rank() over (partition by observed, stack, layer, label order by x)
        + (count(*) over (partition by observed, stack, layer, label, x) - 1) / 2 as rank_x,
        rank() over (partition by observed, stack, layer, label order by loss)
        + (count(*) over (partition by observed, stack, layer, label, loss) - 1) / 2 as rank_loss,
        row_number() over (partition by observed, stack, layer, label order by loss desc, expert asc)
        <= ceil(
            if($share > 0 and $share < 1, $share, error('share takes a part of the experts, between 0 and 1'))
            * count(*) over (partition by observed, stack, layer, label)
        ) as matters
    from compared
),

summed as (
    select
        observed,
        stack,
        layer,
        label,
        count(*) as n,
        max(x) > min(x) and max(loss) > min(loss) as varies,
        corr(rank_x, rank_loss) as rho,
        avg(x) filter (where matters) - avg(x) filter (where not matters) as difference,
        var_pop(x) filter (where matters) * count(*) filter (where matters)
        + var_pop(x) filter (where not matters) * count(*) filter (where not matters) as squares
    from ranked
    group by observed, stack, layer, label
),

answers as (
    select
        *,
        'spearman' as metric,
        rho as value,
        1 / sqrt(n - 1) as standard_error
    from summed
    where varies
    union all by name
    select
        *,
        'cohens_d' as metric,
        difference / nullif(sqrt(squares / nullif(n - 2, 0)), 0) as value,
        null as standard_error
    from summed
    where varies
)

select
    metric,
    observed,
    stack,
    layer,
    label,
    value,
    0::double as baseline,
    n,
    standard_error
from answers
where value is not null
order by metric, observed, stack, layer, label
