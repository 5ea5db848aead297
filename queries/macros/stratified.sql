-- Question: Which rows of a view belong to each label and stratum?
-- Formula: relation is the name of a view of a matched run's strata, whose labels are a label and a stratum,
--   with the unit separator between them; the other arguments are those of `filtered`. A row of a document
--   with several labels comes once for each of those asked for.
-- Grain: one row per row of the view and label.
create or replace macro stratified(relation, of_stack, of_layer, of_labels, with_special) as table
    with divided as (
        select
            * replace (split_part(label, chr(31), 1) as label),
            split_part(label, chr(31), 2) as stratum
        from filtered(relation, of_stack, of_layer, null, with_special)
    ),

    expanded as (
        select divided.* replace (coalesce(label_sets.label, divided.label) as label)
        from divided
        left join label_sets on divided.label = label_sets.label_set
    )

    select *
    from expanded
    where of_labels is null or list_contains(of_labels, label)
