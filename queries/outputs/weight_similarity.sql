-- Question: Which experts have the same weights?
-- Formula: of two experts i and j of a layer, by measure:
--   cosine, cosine_gate, cosine_up, cosine_down   of the flattened matrices, all together or each; blind to
--     experts that differ by the order of their neurons alone.
--   matched   mean cosine of the neurons of i, each paired with one of j so that the sum is highest
--     (Hungarian method); a neuron is its gate row, up row and down column together. Random experts have more
--     than 0 here.
--   router    cosine of the router's two rows.
--   coupling  |W_j r_i| / (|W_j| |r_i|): how much the first matrix W of j answers to the row r of i; i = j is
--     the expert's answer to its own row. No baseline here: 1 / sqrt(d) for a random row of d entries.
--   Baseline 0 of cosines; none of matched and coupling.
-- Source: standard definitions; coupling of routers and experts: arXiv 2512.23447.
-- Grain: metric, stack, layer, expert (i), other_expert (j), both orders of each pair. mean = over the
--   layer's pairs of different experts; place = rank of j among the partners of i, the most alike first.
-- Reads: weights
-- Example: --layer 4 --expert 12 --measure cosine
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   expert integer = null: only pairs of this expert, as i (default: all)
--   measure varchar = matched: cosine, cosine_gate, cosine_up, cosine_down, matched, router or coupling
with measures as (
    select *
    from weights
    where
        ($stack is null or stack = $stack)
        and ($layer is null or layer = $layer)
        and case
            when
                $measure in (
                    'cosine', 'cosine_gate', 'cosine_up', 'cosine_down', 'matched', 'router', 'coupling'
                )
                then measure = $measure
            else error('measure takes matched, cosine, cosine_gate, _up or _down, router, coupling')
        end
),

ranked as (
    select
        stack,
        layer,
        expert::integer as expert,
        other_expert::integer as other_expert,
        value::double as value,
        if(measure in ('matched', 'coupling'), null, 0)::double as baseline,
        avg(value::double) filter (where expert != other_expert) over (partition by stack, layer) as mean,
        row_number() over (
            partition by stack, layer, expert
            order by value desc, other_expert asc
        ) as place
    from measures
)

select
    'weight_similarity' as metric,
    stack,
    layer,
    expert,
    other_expert,
    value,
    baseline,
    mean,
    place
from ranked
where $expert is null or expert = $expert
order by stack, layer, expert, other_expert
