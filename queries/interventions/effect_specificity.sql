-- Question: Does an arm hurt its own label more than the others, and more so than other experts would?
-- Formula: effect = sum of x / sum of y over the documents of a label, x and y as in `expert_effect`
--   (metric $of). target = the label that the arm is named after; else the label that it hurts most in every
--   other document of each label, and then only the documents between them are evaluated, so that the choice
--   does not flatter the arm; split = false chooses and evaluates in all. Controls choose in the same way.
--   effect       the effect on the label. Baseline the mean over the arm's controls, 0 without any.
--   specificity  effect on the target minus the mean effect on the other labels. Baseline the same of the
--     controls, 0 without any. p = (1 + controls with at least as much) / (1 + controls); q adjusts it for
--     all arms (Benjamini-Hochberg).
--   standard_error has documents as the unit, see `expert_effect`; that of specificity takes labels as
--   independent: sqrt(e_T² + sum of e_D² / (labels - 1)²). Null where a label has a single document.
-- Source: ours; permutation p and q as in `expert_effect`.
-- Grain: metric, arm, label; specificity in the row of the target. n = the sum of y, documents = those with
--   any; of specificity over all labels.
-- Reads: document_effects, labels
-- Example: --labels eng_Latn,kor_Hang
-- Params:
--   labels varchar[] = null: only these labels (default: all)
--   arm varchar = null: only this arm (default: all)
--   of varchar = nats_per_token: metric of expert_effect
--   split boolean = true: choose targets in one half of the documents, and evaluate in the other
with measured as (
    select *
    from effect_sums('document_effects', $of, $labels, false)
    where arm != 'no edit' and ($arm is null or arm = $arm)
),

halved as (
    select
        measured.*,
        labels.label is not null as is_named,
        row_number() over (
            partition by measured.arm, measured.control, measured.label
            order by measured.shard, measured.doc
        ) % 2 = 1 as chooses
    from measured
    left join labels on measured.arm = labels.label
),

first_half as (
    select
        arm,
        control,
        label,
        is_named,
        sum(x) / sum(y) as value
    from halved
    where is_named or not $split or chooses
    group by arm, control, label, is_named
),

chosen as (
    select
        arm,
        control,
        if(any_value(is_named), arm, arg_max(label, value order by label)) as target
    from first_half
    group by arm, control
),

evaluated as (
    select
        *,
        sum(x) over of_label as all_x,
        sum(y) over of_label as all_y
    from halved
    where is_named or not $split or not chooses
    window of_label as (partition by arm, control, label)
),

effects as (
    select
        arm,
        control,
        label,
        any_value(all_x / all_y) as value,
        any_value(all_y) as n,
        count(*) as documents,
        if(count(*) > 1, sum(pow(x - y * all_x / all_y, 2)) / any_value(pow(all_y, 2)), null) as variance
    from evaluated
    group by arm, control, label
),

targeted as (
    select
        effects.*,
        chosen.target,
        count(*) over (partition by effects.arm, effects.control) - 1 as others
    from effects
    inner join chosen using (arm, control)
),

found as (
    select
        'effect' as metric,
        arm,
        control,
        label,
        target,
        value,
        n,
        documents,
        variance
    from targeted
    union all
    select
        'specificity' as metric,
        arm,
        control,
        target as label,
        target,
        sum(value) filter (where label = target) - avg(value) filter (where label != target) as value,
        sum(n) as n,
        sum(documents) as documents,
        if(
            count(variance) = count(*),
            sum(if(label = target, variance, variance / nullif(pow(others, 2), 0))),
            null
        ) as variance
    from targeted
    group by arm, control, target
),

controlled as (
    select
        arms.*,
        avg(controls.value) as baseline,
        count(controls.value) as controls,
        count(*) filter (where controls.value >= arms.value) as as_much
    from found as arms
    left join found as controls
        on
            arms.metric = controls.metric
            and arms.arm = controls.arm
            and controls.control > 0
            and (arms.metric = 'specificity' or arms.label = controls.label)
    where arms.control = 0 and arms.value is not null
    group by all
),

tested as (
    select
        *,
        if(metric = 'specificity' and controls > 0, (1 + as_much) / (1 + controls), null) as p
    from controlled
),

adjusted as (
    select
        *,
        p * count(p) over () / count(p) over (order by p asc) as scaled
    from tested
)

select
    metric,
    arm,
    label,
    value,
    coalesce(baseline, 0) as baseline,
    n::bigint as n,
    documents::bigint as documents,
    sqrt(variance) as standard_error,
    target,
    controls,
    p,
    if(p is null, null, min(scaled) over (order by p desc)) as q
from adjusted
order by metric, arm, label
