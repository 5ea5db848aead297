-- Question: Which rows of a view does a query ask about?
-- Formula: relation is the name of a view with the columns stack, layer, label and is_special. The other
--   arguments are the parameters of most queries: null for all stacks, layers or labels.
--   A document with several labels has one row, under all of them: of_labels then names these sets, too.
-- Grain: one row per row of the view.
create or replace macro filtered(relation, of_stack, of_layer, of_labels, with_special) as table
    select *
    from query_table(relation)
    where
        (of_stack is null or stack = of_stack)
        and (of_layer is null or layer = of_layer)
        and (of_labels is null or list_contains(of_labels, label))
        and (with_special or not is_special)
