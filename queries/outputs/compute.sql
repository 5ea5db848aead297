-- Question: What does a token, or a character, of each label cost, and which part of the model takes it?
-- Formula: a multiply-add counts as 2. Per token of label D, summed over layers:
--   router, shared, dense   2 * matrix entries of the component.
--   experts     2 * matrix entries of one expert * picks that were computed / N_D: drops and experts that
--     compute nothing taken off. In layers that the run did not record, k picks.
--   attention   2 * matrix entries + 2 (d_qk + d_v) * the mean number of positions that a token sees: those
--     before it and itself, in an encoder the whole text, at most the layer's window.
--   total       all of these. The embedding multiplies nothing; the unembedding is not part of the base
--     model.
--   flops_per_token       operations per token. Baseline the mean over the labels, by their tokens.
--   flops_per_character   flops_per_token * tokens per character, over documents that were not cut: the cost
--     of a text in this language. Null where labels are groups of tokens. Baseline as before.
--   active_parameters     those that work on a token; of experts, one expert's * picks computed / N_D.
--     Baseline all parameters.
--   Norms, activations, indexers and scans of state-space and linear attention are not counted.
-- Source: counts, equal to those of FlopCounterMode of torch where no kernel skips masked positions.
-- Grain: metric, stack, label, component. n = N_D, tokens of the encoder or the decoder.
-- Reads: assignments, components, label_sets, label_statistics, labelled_tokens, layers
-- Example: --labels eng_Latn,kor_Hang
-- Params:
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
with placed as (
    select
        shard,
        doc,
        stack,
        label,
        is_special,
        characters,
        truncated,
        if(stack = 'encoder', count(*) over (partition by shard, doc, stack), position + 1) as seen
    from labelled_tokens
),

labelled as (
    select placed.* replace (coalesce(label_sets.label, placed.label) as label)
    from placed
    left join label_sets on placed.label = label_sets.label_set
),

texts as (
    select *
    from labelled
    where ($labels is null or list_contains($labels, label)) and ($include_special or not is_special)
),

documents as (
    select
        stack,
        label,
        shard,
        doc,
        count(*) as tokens,
        any_value(if(truncated, null, characters)) as characters
    from texts
    group by stack, label, shard, doc
),

tokens as (
    select
        stack,
        label,
        sum(tokens)::bigint as n,
        sum(tokens) filter (where characters is not null) / nullif(sum(characters), 0) as per_character
    from documents
    group by stack, label
),

windows as (
    select distinct "window"
    from components
    where component = 'attention'
),

contexts as (
    select
        texts.stack,
        texts.label,
        windows.window,
        avg(least(texts.seen, coalesce(windows.window, texts.seen))) as context
    from texts
    cross join windows
    group by texts.stack, texts.label, windows.window
),

dropped as (
    select
        stack,
        layer,
        label,
        dropped_picks
    from label_sums('label_statistics', null, null, $labels, $include_special)
),

load as (
    select
        stack,
        layer,
        label,
        expert,
        tokens,
        picks
    from label_load('assignments', null, null, $labels, $include_special)
),

picked as (
    select
        load.stack,
        load.layer,
        load.label,
        any_value(load.tokens) as tokens,
        sum(load.picks) filter (where load.expert < components.experts) as picks
    from load
    inner join components using (stack, layer)
    where components.component = 'experts'
    group by load.stack, load.layer, load.label
),

computed as (
    select
        picked.stack,
        picked.layer,
        picked.label,
        (picked.picks - coalesce(dropped.dropped_picks, 0)) / picked.tokens as picks_per_token
    from picked
    left join dropped using (stack, layer, label)
),

usual as (
    select max(top_k) as top_k
    from layers
),

of_layers as (
    select
        tokens.stack,
        tokens.label,
        tokens.n,
        tokens.per_character,
        components.component,
        components.parameters as all_parameters,
        case components.component
            when 'experts' then coalesce(computed.picks_per_token, usual.top_k)
            else 1
        end as times,
        components.flops,
        components.context_flops * coalesce(contexts.context, 0) as context_flops,
        components.parameters / coalesce(components.experts, 1) as parameters
    from components
    inner join tokens on split_part(components.stack, '.', 1) = tokens.stack
    cross join usual
    left join computed
        on
            components.component = 'experts'
            and components.stack = computed.stack
            and components.layer = computed.layer
            and tokens.label = computed.label
    left join contexts
        on
            components.component = 'attention'
            and tokens.stack = contexts.stack
            and tokens.label = contexts.label
            and components.window is not distinct from contexts.window
),

of_components as (
    select
        stack,
        label,
        coalesce(component, 'total') as component,
        any_value(n) as n,
        any_value(per_character) as per_character,
        sum(times * flops + context_flops) as flops,
        sum(times * parameters) as active,
        sum(all_parameters)::double as all_parameters
    from of_layers
    group by grouping sets ((stack, label, component), (stack, label))
),

metrics as (
    select
        'flops_per_token' as metric,
        *,
        flops as value,
        sum(flops * n) over component / sum(n) over component as baseline
    from of_components
    window component as (partition by stack, component)
    union all
    select
        'flops_per_character' as metric,
        *,
        flops * per_character as value,
        sum(flops * per_character * n) over component / sum(n) over component as baseline
    from of_components
    window component as (partition by stack, component)
    union all
    select
        'active_parameters' as metric,
        *,
        active as value,
        all_parameters as baseline
    from of_components
)

select
    metric,
    stack,
    label,
    component,
    value,
    baseline,
    n
from metrics
order by metric, stack, label, component
