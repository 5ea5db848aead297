-- Question: Which documents are routed alike, and do they have the same label?
-- Formula: a document's signature is the share of its picks that each expert got, of all layers asked for,
--   one after another. Two documents are as near as the cosine of their signatures.
--   label_agreement   share of the n nearest documents that have label D too, averaged over the documents of
--     D. Baseline (N_D - 1) / (N - 1): neighbours drawn at random.
--   neighbour_cosine  cosine of a document and its neighbour. Baseline the mean over all other documents.
--   The signature of a short document varies by chance, and is less like any other: compare labels whose
--   documents are about as long.
-- Source: nearest neighbours by cosine, as language_overlap compares labels.
-- Grain: metric, label, document, rank; the last two are null for a whole label, and the nearest neighbour
--   has rank 1. n = N, documents compared; for a label those of its documents whose neighbours were sought.
-- Reads: neighbours, document_labels
-- Example: --labels eng_Latn,kor_Hang,jpn_Jpan --n 1
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   n integer >= 1 = 5: neighbours of each document
--   document varchar = null: id of the document whose neighbours are sought, among all others (default: every
--     document)
--   most integer >= 2 = 5000: documents that are compared with each other; of more, a random sample is
with found as (
    select *
    from neighbours
    where
        asked_stack is not distinct from $stack
        and asked_layer is not distinct from $layer
        and labels is not distinct from $labels
        and include_special = $include_special
        and asked_document is not distinct from $document
        and most = $most
        and rank <= $n
),

labelled as (
    select
        found.shard,
        found.doc,
        found.all_documents,
        document_labels.label,
        count(*) over (partition by document_labels.label) as label_documents
    from found
    inner join document_labels using (shard, doc)
    where found.rank = 0
),

agreements as (
    select
        labelled.shard,
        labelled.doc,
        labelled.label,
        labelled.label_documents,
        labelled.all_documents,
        count(other.label) / count(*) as agreement
    from found
    inner join labelled
        on
            found.shard = labelled.shard
            and found.doc = labelled.doc
    left join labelled as other
        on
            found.other_shard = other.shard
            and found.other_doc = other.doc
            and labelled.label = other.label
    where found.rank > 0
    group by labelled.shard, labelled.doc, labelled.label, labelled.label_documents, labelled.all_documents
),

metrics as (
    select
        'label_agreement' as metric,
        label,
        null as document,
        null as rank,
        avg(agreement) as value,
        (label_documents - 1) / (all_documents - 1) as baseline,
        count(*) as n,
        null as neighbour,
        null as neighbour_label
    from agreements
    where $labels is null or list_contains($labels, label)
    group by label, label_documents, all_documents
    union all
    select
        'neighbour_cosine' as metric,
        label,
        document,
        rank,
        cosine as value,
        mean_cosine as baseline,
        all_documents as n,
        other_document as neighbour,
        other_label as neighbour_label
    from found
    where rank > 0
)

select
    metric,
    label,
    document,
    rank,
    value,
    baseline,
    n,
    neighbour,
    neighbour_label
from metrics
order by metric, label, document, rank
