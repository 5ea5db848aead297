-- Question: Where is the document from?
-- Formula: the document's source, as the data named it; (none) where it named none.
-- Groups: documents
-- Reads: recorded_documents
select
    shard,
    doc,
    coalesce(source, '(none)') as label
from recorded_documents
