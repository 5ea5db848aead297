-- Question: What does each control of an arm do, beside the arm?
-- Formula: value = sum of x / sum of y over the documents of a label, x and y as in `expert_effect` (metric
--   $of), of the arm (control 0) and of each of its controls. Baseline the mean over the controls; null where
--   there are none.
-- Source: as `expert_effect`.
-- Grain: metric, arm, label, control. n = the sum of y.
-- Reads: document_effects
-- Example: --labels kor_Hang
-- Params:
--   labels varchar[] = null: only these labels (default: all)
--   arm varchar = null: only this arm (default: all)
--   of varchar = nats_per_token: metric of expert_effect
--   pooled boolean = false: all labels together
with sets as (
    select
        metric,
        arm,
        label,
        control,
        sum(x) / sum(y) as value,
        sum(y)::bigint as n
    from effect_sums('document_effects', $of, $labels, $pooled)
    where arm != 'no edit' and ($arm is null or arm = $arm)
    group by metric, arm, label, control
)

select
    metric,
    arm,
    label,
    control,
    value,
    avg(value) filter (where control > 0) over (partition by metric, arm, label) as baseline,
    n
from sets
order by metric, arm, label, control
