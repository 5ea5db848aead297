-- Question: What do edits of the routing do to the model's predictions, beyond edits of other experts?
-- Formula: sums over the documents of label D, with the edits of an arm and without:
--   nats_per_token      (sum of losses with - without) / tokens: how much worse the model predicts.
--   bits_per_character  the same / (ln 2 * characters), of documents that were not cut, so that labels with
--     different tokens per character compare.
--   divergence          sum of KL(without‖with) of the next token's distribution / tokens, in nats.
--   flips               share of tokens whose most probable successor is another one.
--   rerouted            share of the decisions of routers behind the first edited layer with other experts.
--   Special tokens do not count. Batches are the same with and without, so an arm that changes nothing gives
--   exactly 0. Baseline: the mean of the arm's controls, random sets of experts that match it (see
--   `collector intervene --controls`); 0 where there are none. beyond = value - baseline.
--   standard_error and beyond_error have documents as the unit, paired: for a ratio r = sum of x / sum of
--   y they are sqrt(sum over documents of (x - r y)²) / sum of y; null for a single document.
--   p = (1 + controls at least as far from the mean of arm and controls as the arm) / (1 + controls), of the
--   hypothesis that the arm's experts are like any that match; q adjusts it for all rows of the answer
--   (Benjamini-Hochberg). floor = |value| + 1.96 standard errors of the model without edits in other batches,
--   the noise of the arithmetic: what is not above it is no effect.
-- Source: differences of cross entropy; linearized ratio estimator, Cochran 1977, "Sampling Techniques";
--   permutation p, Phipson and Smyth 2010 (arXiv 1603.05766); Benjamini and Hochberg 1995.
-- Grain: metric, arm, label. n = the sum of y: tokens, characters or decisions; documents = those with any.
-- Reads: document_effects
-- Example: --labels eng_Latn,kor_Hang
-- Params:
--   labels varchar[] = null: only these labels (default: all)
--   arm varchar = null: only this arm (default: all)
--   pooled boolean = false: all labels together
with measured as (
    select *
    from effect_sums('document_effects', null, $labels, $pooled)
    where $arm is null or arm in ($arm, 'no edit')
),

paired as (
    select
        metric,
        arm,
        label,
        any_value(x) filter (where control = 0) as x,
        any_value(x) filter (where control = 0) - avg(x) filter (where control > 0) as excess,
        any_value(y) as y
    from measured
    group by metric, arm, label, shard, doc
),

summed as (
    select
        *,
        sum(x) over of_arm as all_x,
        sum(excess) over of_arm as all_excess,
        sum(y) over of_arm as all_y,
        count(*) over of_arm as documents
    from paired
    window of_arm as (partition by metric, arm, label)
),

effects as (
    select
        metric,
        arm,
        label,
        any_value(all_x / all_y) as value,
        any_value(all_excess / all_y) as beyond,
        any_value(all_y)::bigint as n,
        any_value(documents) as documents,
        sqrt(sum(pow(x - y * all_x / all_y, 2))) / any_value(all_y) as error,
        sqrt(sum(pow(excess - y * all_excess / all_y, 2))) / any_value(all_y) as beyond_error
    from summed
    group by metric, arm, label
),

sets as (
    select
        metric,
        arm,
        control,
        label,
        sum(x) / sum(y) as value
    from measured
    where arm != 'no edit'
    group by metric, arm, control, label
),

distances as (
    select
        *,
        abs(value - avg(value) over (partition by metric, arm, label)) as distance
    from sets
),

ranked as (
    select
        metric,
        arm,
        label,
        avg(value) filter (where control > 0) as baseline,
        count(*) filter (where control > 0) as controls,
        -- equal but for the order of additions
        list(distance) filter (where control > 0) as others,
        any_value(distance) filter (where control = 0) * (1 - 1e-12) as own
    from distances
    group by metric, arm, label
),

tested as (
    select
        *,
        if(controls > 0, (1 + len(list_filter(others, lambda each: each >= own))) / (1 + controls), null) as p
    from ranked
),

adjusted as (
    select
        *,
        p * count(p) over () / count(p) over (order by p asc) as scaled
    from tested
),

corrected as (
    select
        *,
        min(scaled) over (order by p desc) as q
    from adjusted
)

select
    effects.metric,
    effects.arm,
    effects.label,
    effects.value,
    coalesce(corrected.baseline, 0) as baseline,
    effects.n,
    effects.documents,
    if(effects.documents > 1, effects.error, null) as standard_error,
    corrected.controls,
    effects.beyond,
    if(effects.documents > 1, effects.beyond_error, null) as beyond_error,
    corrected.p,
    if(corrected.p is null, null, corrected.q) as q,
    abs(noise.value) + 1.96 * noise.error as floor,
    abs(effects.value) > abs(noise.value) + 1.96 * noise.error as above_floor
from effects
inner join corrected
    on
        effects.metric = corrected.metric
        and effects.arm = corrected.arm
        and corrected.label is not distinct from effects.label
left join effects as noise
    on
        noise.arm = 'no edit'
        and effects.metric = noise.metric
        and noise.label is not distinct from effects.label
order by effects.metric, effects.arm, effects.label
