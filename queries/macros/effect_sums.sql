-- Question: What are the numerators and denominators of the metrics of effects, document by document?
-- Formula: relation is 'document_effects', of_metric a metric of `expert_effect`, null for all; of_labels and
--   pooled are those of `by_label`. Effects are ratios of sums over documents: sum of x / sum of y.
-- Grain: one row per (metric, arm, control, label, shard, doc) that the metric says something of.
create or replace macro effect_sums(relation, of_metric, of_labels, pooled) as table
    with measured as (
        select
            arm,
            control,
            label,
            shard,
            doc,
            unnest(['nats_per_token', 'bits_per_character', 'divergence', 'flips', 'rerouted']) as metric,
            unnest([
                loss - base_loss,
                if(characters is null, null, (loss - base_loss) / ln(2)),
                divergence,
                flips,
                rerouted
            ]) as x,
            unnest([tokens, characters, tokens, tokens, decisions])::double as y
        from by_label(relation, null, null, of_labels, true, pooled)
        where
            of_metric is null
            or of_metric in ('nats_per_token', 'bits_per_character', 'divergence', 'flips', 'rerouted')
            or error('of takes nats_per_token, bits_per_character, divergence, flips or rerouted')
    )

    select *
    from measured
    where x is not null and y > 0 and (of_metric is null or metric = of_metric)
