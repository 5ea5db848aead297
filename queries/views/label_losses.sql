-- Question: How well does the model predict each label's text?
-- Formula: the columns are sums of those of `document_losses`.
-- Grain: one row per (label, is_special) with a loss.
-- Reads: document_losses
-- Needs: tokens.loss
select
    stack,
    layer,
    label,
    is_special,
    sum(tokens)::bigint as tokens,
    sum(nats) as nats,
    sum(whole_nats) as whole_nats,
    sum(characters)::bigint as characters
from document_losses
group by stack, layer, label, is_special
