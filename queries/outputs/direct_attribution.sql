-- Question: Does each expert's output make the token that came next more likely?
-- Formula: a = g * (raise of the next token's logit - mean raise over the vocabulary), where the raise is
--   that of the expert's output through the final norm of that token's stream and the output embedding; in
--   logits. value = mean of a over the sampled picks of e that have a next token. Baseline: over the same
--   picks the mean a of the other experts that the token chose; null where it chose no other.
--   standard_error is that of value less baseline, or of value where there is no baseline, linearized with
--   documents as the unit; null for a single document.
--   Positive and above the baseline: e does more for the next token than its companions do. What an output
--   does through later layers is not in it, so it is no proof that the model needs e.
-- Source: direct logit attribution, Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits";
--   of single experts as in arXiv 2604.02178.
-- Grain: metric, stack, layer, label, expert. n = picks; documents = those that they are of.
-- Reads: sampled_picks
-- Example: --layer 4 --pooled true
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   expert integer = null: only this expert (default: all)
--   pooled boolean = false: all labels together
with attributed as (
    select
        *,
        (sum(attribution::double) over token - attribution) / nullif(count(*) over token - 1, 0) as of_others
    from by_label('sampled_picks', $stack, $layer, $labels, true, $pooled)
    where attribution is not null
    window token as (partition by shard, stack, layer, tok, label)
),

by_document as (
    select
        stack,
        layer,
        label,
        expert,
        shard,
        doc,
        count(*) as picks,
        sum(attribution::double) as total,
        count(of_others) as accompanied,
        sum(of_others) as total_of_others
    from attributed
    where $expert is null or expert = $expert
    group by stack, layer, label, expert, shard, doc
),

summed as (
    select
        *,
        sum(picks) over expert_of_label as n,
        sum(total) over expert_of_label as all_total,
        sum(accompanied) over expert_of_label as all_accompanied,
        sum(total_of_others) over expert_of_label as all_of_others
    from by_document
    window expert_of_label as (partition by stack, layer, label, expert)
),

differing as (
    select
        *,
        (total - picks * all_total / n) / n
        - if(
            all_accompanied > 0,
            (coalesce(total_of_others, 0) - accompanied * all_of_others / all_accompanied) / all_accompanied,
            0
        ) as deviation
    from summed
)

select
    'direct_attribution' as metric,
    stack,
    layer,
    label,
    expert,
    any_value(all_total / n) as value,
    any_value(all_of_others / nullif(all_accompanied, 0)) as baseline,
    any_value(n)::bigint as n,
    count(*) as documents,
    if(count(*) > 1, sqrt(sum(deviation * deviation)), null) as standard_error
from differing
group by stack, layer, label, expert
order by stack, layer, label, expert
