-- Question: What did these routers decide about these labels' tokens, special ones included or not?
-- Formula: the columns of `token_decisions`.
-- Grain: one row per (stack, layer, token).
-- Reads: token_decisions
create or replace macro chosen_token_decisions(of_stack, of_layer, of_labels, with_special) as table
    select *
    from token_decisions
    where
        (of_stack is null or stack = of_stack)
        and (of_layer is null or layer = of_layer)
        and (of_labels is null or list_contains(of_labels, label))
        and (with_special or not is_special)
