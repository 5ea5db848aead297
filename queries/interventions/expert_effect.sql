-- Question: What do edits of the routing do to the model's predictions?
-- Formula: sums over the documents of label D, with the edits of an arm and without:
--   nats_per_token      (sum of losses with - without) / tokens: how much worse the model predicts.
--   bits_per_character  the same / (ln 2 * characters), of documents that were not cut, so that labels with
--     different tokens per character compare.
--   divergence          sum of KL(without‖with) of the next token's distribution / tokens, in nats.
--   flips               share of tokens whose most probable successor is another one.
--   rerouted            share of the decisions of routers behind the first edited layer with other experts.
--   Baseline 0, an arm that changes nothing, exactly: batches are the same with and without. Special tokens
--   do not count. standard_error has documents as the unit: sqrt(sum over them of (x - value * y)²) / sum of
--   y, for value = sum of x / sum of y; null for a single document. What is special about an arm shows beside
--   arms with other experts of the same layers, chosen as often.
-- Source: differences of cross entropy; linearized ratio estimator, Cochran 1977, "Sampling Techniques".
-- Grain: metric, arm, label. n = the sum of y: tokens, characters or decisions; documents = those with any.
-- Reads: document_effects
-- Example: --labels eng_Latn,kor_Hang
-- Params:
--   labels varchar[] = null: only these labels (default: all)
--   arm varchar = null: only this arm (default: all)
--   pooled boolean = false: all labels together
with effects as (
    select *
    from by_label('document_effects', null, null, $labels, true, $pooled)
    where $arm is null or arm = $arm
),

measured as (
    select
        arm,
        label,
        unnest(['nats_per_token', 'bits_per_character', 'divergence', 'flips', 'rerouted']) as metric,
        unnest([
            loss - base_loss,
            if(characters is null, null, (loss - base_loss) / ln(2)),
            divergence,
            flips,
            rerouted
        ]) as x,
        unnest([tokens, characters, tokens, tokens, decisions])::double as y
    from effects
),

totals as (
    select
        *,
        sum(x) over of_arm as all_x,
        sum(y) over of_arm as all_y
    from measured
    where x is not null and y > 0
    window of_arm as (partition by metric, arm, label)
)

select
    metric,
    arm,
    label,
    any_value(all_x / all_y) as value,
    0::double as baseline,
    any_value(all_y)::bigint as n,
    count(*) as documents,
    if(count(*) > 1, sqrt(sum(pow(x - y * all_x / all_y, 2))) / any_value(all_y), null) as standard_error
from totals
group by metric, arm, label
order by metric, arm, label
