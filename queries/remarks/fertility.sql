-- Question: Why is there no value per character?
-- Reads: labelled_tokens, documents
select 'characters are not recorded of groups of tokens, so they have no values per character' as remark
from labelled_tokens
having
    count(*) > 0
    and count(characters) = 0
    -- an imported run has none at all
    and (select count(documents.characters) from documents) > 0
