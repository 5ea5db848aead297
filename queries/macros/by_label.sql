-- Question: Which rows of a view belong to each label, or to all labels together?
-- Formula: relation and the next four arguments are those of `filtered`. A row of a document with several
--   labels comes once for each of those asked for. pooled: once in all, with label null.
-- Grain: one row per row of the view and label; one per row of the view if pooled.
create or replace macro by_label(relation, of_stack, of_layer, of_labels, with_special, pooled) as table
    with recorded as (
        select * replace (if(pooled, null, label) as label)
        from filtered(relation, of_stack, of_layer, of_labels, with_special)
    ),

    expanded as (
        select recorded.* replace (coalesce(label_sets.label, recorded.label) as label)
        from recorded
        left join label_sets on recorded.label = label_sets.label_set
    )

    select *
    from expanded
    where pooled or of_labels is null or list_contains(of_labels, label)
