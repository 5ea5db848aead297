-- Question: How well does the model predict each document?
-- Formula: tokens = those of the decoder that have a loss, all but the first of a document; nats = sum of
--   their losses. Of documents that were not cut to the model's length: whole_nats = nats, and characters,
--   counted in the row of the ordinary tokens; both 0 otherwise. characters is 0, too, where an encoder reads
--   the text.
-- Grain: one row per (shard, doc, label, is_special) with a loss. A document has one label, unless labels are
--   groups of tokens. stack = decoder; layer is null, because a loss belongs to the whole model.
-- Reads: tokens, documents
-- Needs: tokens.loss
select
    tokens.shard,
    tokens.doc,
    tokens.stack,
    null::utinyint as layer,
    documents.label,
    tokens.is_special,
    count(*) as tokens,
    sum(tokens.loss::double) as nats,
    sum(if(documents.truncated, 0, tokens.loss::double)) as whole_nats,
    any_value(
        if(
            documents.truncated or tokens.is_special or documents.target_tokens is not null,
            0,
            documents.characters
        )
    )::bigint as characters
from tokens
inner join documents using (shard, doc)
where tokens.loss is not null
group by tokens.shard, tokens.doc, tokens.stack, documents.label, tokens.is_special
