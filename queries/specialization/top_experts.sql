-- Question: Which experts does each label use most?
-- Formula: top1  count = tokens of D whose highest-weight expert is e, value = count / N_D.
--   topk  count = N_eD, tokens of D for which e was among the k chosen, value = count / (k N_D).
--   Baseline 1/E for both. Ties go to the lower expert id.
-- Source: a count.
-- Grain: metric, stack, layer, label, rank from 1 to $n; experts that were never chosen are left out.
--   n = N_D.
-- Reads: assignments
-- Needs: weights for metric top1
-- Example: --layer 4 --labels kor_Hang --n 3
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   n integer >= 1 = 10: experts per layer and label
with load as (
    select *
    from label_load('assignments', $stack, $layer, $labels, $include_special)
),

counts as (
    select
        'top1' as metric,
        *,
        top1 as count,
        tokens as total
    from load
    union all
    select
        'topk' as metric,
        *,
        picks::bigint as count,
        top_k * tokens as total
    from load
),

ranked as (
    select
        *,
        row_number() over (partition by metric, stack, layer, label order by count desc, expert asc) as rank
    from counts
    where count > 0
)

select
    metric,
    stack,
    layer,
    label,
    rank,
    expert,
    count / total as value,
    1 / n_experts as baseline,
    tokens as n,
    count
from ranked
where rank <= $n
order by metric, stack, layer, label, rank
