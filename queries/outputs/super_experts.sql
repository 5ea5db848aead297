-- Question: Which few experts put out extreme activations?
-- Formula: value = the largest absolute entry of any of e's outputs, before the routing weight. Baseline the
--   percentile (99.5) of value over all experts of all recorded layers of the stack. is_super = value >
--   baseline and value > share (a tenth) of the stack's largest, in a layer below depth (3/4) of the model;
--   the depth is taken from the highest layer recorded. Super experts make the massive activations of a few
--   tokens, mostly of the first, so special tokens count here.
-- Source: super experts, arXiv 2507.23279.
-- Grain: metric, stack, layer, expert; the top experts of each stack by value. n = picks that e computed, of
--   all labels together; place = rank within the stack.
-- Reads: document_outputs
-- Example: --top 3
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all); the percentile and the
--     maximum stay those of all layers
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = true: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes)
--   percentile double = 99.5: of all experts, above which one is super
--   share double = 0.1: of the stack's maximum, above which one is super
--   depth double = 0.75: part of the model's layers, from the input, in which experts may be super
--   top integer >= 1 = 20: rows of each stack
with picked as (
    select
        stack,
        layer,
        unnest(experts) as expert,
        unnest(picks) as picks,
        unnest(largest) as largest
    from filtered('document_outputs', $stack, null, $labels, $include_special)
),

experts as (
    select
        stack,
        layer,
        expert::integer as expert,
        sum(picks)::bigint as n,
        max(largest)::double as value
    from picked
    group by stack, layer, expert
),

compared as (
    select
        *,
        quantile_cont(value, $percentile / 100) over (partition by stack) as baseline,
        max(value) over (partition by stack) as most,
        max(layer) over (partition by stack) + 1 as layers,
        row_number() over (partition by stack order by value desc, layer asc, expert asc) as place
    from experts
)

select
    'super_experts' as metric,
    stack,
    layer,
    expert,
    value,
    baseline,
    n,
    place,
    value > baseline and value > $share * most and layer < $depth * layers as is_super
from compared
where ($layer is null or layer = $layer) and place <= $top
order by stack, place
