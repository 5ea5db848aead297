-- Question: Does the routing of a prompt tell that of its answer?
-- Formula: q = a document's picks of each expert / all its picks, in its prompt and in its answer apart.
--   answer_divergence  JSD in bits of a document's prompt and its own answer, mean over documents.
--     Baseline: of the prompt and the answers of $others other documents of the label, mean over both.
--   own_answer_nearer  probability that a document's own answer is nearer to its prompt than one of the
--     others is, ties half. Baseline 1/2: the prompt tells nothing about the answer that its label does not.
--   The others follow in a fixed random order. Documents without counted tokens in both phases are left out.
--   Short texts bias JSD up, for other answers as much as for a document's own where they are as long.
-- Source: Jensen-Shannon divergence, Lin 1991; probability of superiority (Mann and Whitney 1947).
-- Grain: metric, stack, layer, label (null if pooled). n = documents. standard_error: of value - baseline,
--   with documents as the unit; null for a single one, which has no others and no baseline.
-- Reads: token_decisions, phases
-- Example: --layer 4
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   pooled boolean = false: all labels together; others are then documents of any label
--   others integer >= 1 = 8: answers of other documents that a prompt is compared with
with decided as (
    select *
    from by_label('token_decisions', $stack, $layer, $labels, $include_special, $pooled)
),

picked as (
    select
        decided.stack,
        decided.layer,
        decided.label,
        decided.shard,
        decided.doc,
        phases.phase,
        unnest(decided.experts) as expert
    from decided
    inner join phases using (shard, tok)
),

counted as (
    select
        stack,
        layer,
        label,
        shard,
        doc,
        phase,
        expert,
        count(*) as picks
    from picked
    where expert is not null
    group by stack, layer, label, shard, doc, phase, expert
),

answered as (
    select
        stack,
        layer,
        label,
        shard,
        doc
    from counted
    group by stack, layer, label, shard, doc
    having count(distinct phase) = 2
),

-- numbers instead of names, because the pairs of documents are many
placed as (
    select
        *,
        dense_rank() over (order by stack, layer, label) as of_group,
        row_number() over of_label - 1 as place,
        count(*) over (partition by stack, layer, label) as documents
    from answered
    window
        of_label as (
            partition by stack, layer, label
            order by (shard::bigint * 1000003 + doc) * 2654435761 % 4294967296, shard, doc
        )
),

halves as (
    select
        placed.of_group,
        placed.place,
        counted.phase,
        counted.expert,
        counted.picks / sum(counted.picks) over of_phase / 2 as half
    from counted
    inner join placed
        on
            counted.stack = placed.stack
            and counted.layer = placed.layer
            and counted.label is not distinct from placed.label
            and counted.shard = placed.shard
            and counted.doc = placed.doc
    window of_phase as (partition by placed.of_group, placed.place, counted.phase)
),

pairs as (
    select
        of_group,
        documents,
        place,
        unnest(range(least($others + 1, documents))) as step
    from placed
),

-- experts that both use: how H((q_a + q_b) / 2) differs from what the halves would give apart
common as (
    select
        pairs.of_group,
        pairs.place,
        pairs.step,
        sum(
            prompts.half * log2(prompts.half) + answers.half * log2(answers.half)
            - (prompts.half + answers.half) * log2(prompts.half + answers.half)
        ) as shared
    from pairs
    inner join halves as prompts
        on
            pairs.of_group = prompts.of_group
            and pairs.place = prompts.place
            and prompts.phase = 'prompt'
    inner join halves as answers
        on
            pairs.of_group = answers.of_group
            and (pairs.place + pairs.step) % pairs.documents = answers.place
            and prompts.expert = answers.expert
            and answers.phase = 'generated'
    group by pairs.of_group, pairs.place, pairs.step
),

divergences as (
    select
        pairs.of_group,
        pairs.place,
        pairs.step,
        round(greatest(1 + coalesce(common.shared, 0), 0), 9) as jsd,
        max(if(pairs.step = 0, jsd, null)) over (partition by pairs.of_group, pairs.place) as own
    from pairs
    left join common using (of_group, place, step)
),

of_documents as (
    select
        of_group,
        place,
        any_value(own) as own,
        avg(jsd) filter (where step > 0) as other,
        avg((sign(jsd - own) + 1) / 2) filter (where step > 0) as nearer
    from divergences
    group by of_group, place
),

metrics as (
    select
        'answer_divergence' as metric,
        of_group,
        avg(own) as value,
        avg(other) as baseline,
        stddev_samp(own - other) / sqrt(count(other)) as standard_error,
        count(*) as n
    from of_documents
    group by of_group
    union all
    select
        'own_answer_nearer' as metric,
        of_group,
        avg(nearer) as value,
        0.5 as baseline,
        stddev_samp(nearer) / sqrt(count(nearer)) as standard_error,
        count(nearer) as n
    from of_documents
    group by of_group
    having count(nearer) > 0
),

labelled as (
    select distinct
        of_group,
        stack,
        layer,
        label
    from placed
)

select
    metrics.metric,
    labelled.stack,
    labelled.layer,
    labelled.label,
    metrics.value,
    metrics.baseline,
    metrics.standard_error,
    metrics.n
from metrics
inner join labelled using (of_group)
order by metrics.metric, labelled.stack, labelled.layer, labelled.label
