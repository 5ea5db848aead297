-- Question: How balanced is a placement of experts that was planned for one label when it serves another?
-- Formula: planned_for's placement is what EPLB computes from the picks N_e in every other document of that
--   label. A GPU's load is the sum over its experts of N_e, divided evenly among the replicas of e, in the
--   documents of label between them. balancedness = mean load of a GPU / largest, 1/GPUs … 1.
--   value  of planned_for's placement. own  of the label's own placement. loss = own - value.
--   Baseline: experts in their order, slot p holding expert p mod E, which needs no plan.
--   Only labels with two documents can serve: collect more where a label has no row. Read it with n: in a
--   small sample all placements seem less balanced.
-- Source: EPLB, github.com/deepseek-ai/EPLB; SGLang's balancedness (average_utilization_rate).
-- Grain: metric, stack, layer (null for the mean over the layers), label, planned_for. n = tokens of the
--   label in the documents that are measured.
-- Reads: half_load, placements, layers
-- Example: --gpus 8 --labels eng_Latn,kor_Hang,bul_Cyrl
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   gpus integer >= 1 = 8: GPUs that hold the experts of a layer, each equally many
--   replicas integer >= 1 = null: experts in all that they hold, those that are there several times
--     included (default: E, rounded up to a multiple of the GPUs)
--   by_layer boolean = false: a row for each layer instead of the mean over the layers of a stack
with measured as (
    select *
    from by_label('half_load', $stack, $layer, $labels, $include_special, false)
    where not is_first
),

picked as (
    select
        stack,
        layer,
        label,
        expert,
        sum(picks) as picks
    from measured
    group by stack, layer, label, expert
),

served as (
    select
        stack,
        layer,
        label,
        sum(picks) as picks
    from picked
    group by stack, layer, label
),

-- those of other numbers of GPUs and replicas are not computed until somebody asks for them
planned as (
    select *
    from placements
    where gpus = $gpus and replicas is not distinct from $replicas
),

loaded as (
    select
        served.stack,
        served.layer,
        served.label,
        planned.planned_for,
        planned.gpu,
        sum(planned.share * coalesce(picked.picks, 0)) as load
    from served
    inner join planned using (stack, layer)
    left join picked
        on
            served.stack = picked.stack
            and served.layer = picked.layer
            and served.label = picked.label
            and planned.expert = picked.expert
    group by served.stack, served.layer, served.label, planned.planned_for, planned.gpu
),

balanced as (
    select
        stack,
        layer,
        label,
        planned_for,
        avg(load) / max(load) as balancedness
    from loaded
    group by stack, layer, label, planned_for
),

compared as (
    select
        served.stack,
        served.layer,
        served.label,
        other.planned_for,
        other.balancedness as value,
        own.balancedness as own,
        in_order.balancedness as baseline,
        served.picks / layers.top_k as n
    from served
    inner join layers using (stack, layer)
    inner join balanced as other using (stack, layer, label)
    inner join balanced as in_order using (stack, layer, label)
    left join balanced as own
        on
            served.stack = own.stack
            and served.layer = own.layer
            and served.label = own.label
            and served.label = own.planned_for
    where other.planned_for is not null and in_order.planned_for is null
)

select
    'balancedness' as metric,
    stack,
    if($by_layer, layer, null) as layer,
    label,
    planned_for,
    avg(value) as value,
    avg(baseline) as baseline,
    max(n)::bigint as n,
    avg(own) as own,
    avg(own - value) as loss
from compared
group by stack, if($by_layer, layer, null), label, planned_for
order by metric, stack, layer, label, planned_for
