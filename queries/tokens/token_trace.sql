-- Question: What happened to each token of one document?
-- Formula: expert = the one with the highest weight; experts and weights in the model's own order; of this
--   token what router_entropy averages: router_entropy and weight_entropy in nats, topk_mass, margin;
--   dropped_picks = how many of the k a capacity limit kept from their expert; top_logit = the largest of the
--   router's logits, null unless the run stored them.
-- Source: the recorded decisions; token is the vocabulary's own spelling.
-- Grain: document, stack, position (from 0, special tokens counted), layer. The first document, by shard and
--   place in it, that the parameters leave. token is null where the run has no vocabulary for the id.
-- Reads: decisions, labelled_tokens
-- Needs: weights for column expert, weights, weight_entropy; entropy for column router_entropy; topk_mass
--   for column topk_mass; margin for column margin; logits for column top_logit
-- Example: --layer 4 --labels kor_Hang
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   document varchar = null: id of the document (doc_id)
--   shard integer >= 0 = null: number of its shard
--   doc integer >= 0 = null: its place in the shard, from 0
with known as (
    select
        shard,
        doc
    from labelled_tokens
    where
        ($labels is null or list_contains($labels, label))
        and ($document is null or doc_id = $document)
        and ($shard is null or shard = $shard)
        and ($doc is null or doc = $doc)
    order by shard, doc
    limit 1
),

text as (
    select labelled_tokens.*
    from known
    inner join labelled_tokens using (shard, doc)
),

chosen as (
    select
        * exclude (experts, weights),
        list_filter(experts, lambda e: e is not null)::integer[] as experts,
        list_filter(weights, lambda w: w is not null) as weights
    from filtered('decisions', $stack, $layer, null, $include_special)
    where
        -- constants, which reach the files
        shard = (select known.shard from known)
        and tok >= (select min(text.tok) from text)
        and tok <= (select max(text.tok) from text)
)

select
    text.doc_id as document,
    chosen.stack,
    text.position,
    chosen.layer,
    text.token_id,
    text.token,
    text.is_special,
    chosen.label,
    chosen.expert,
    chosen.experts,
    chosen.weights,
    chosen.router_entropy,
    chosen.weight_entropy,
    chosen.topk_mass,
    chosen.margin,
    chosen.dropped_picks,
    list_max(chosen.logits) as top_logit
from chosen
inner join text using (shard, tok)
order by text.doc_id, chosen.stack, text.position, chosen.layer
