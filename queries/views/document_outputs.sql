-- Question: What did the chosen experts put out, document by document?
-- Formula: f = the expert's output before its routing weight g, y = the sum of g f over a token's picks,
--   shared experts apart. Lists in the order of experts, those that were chosen at all: picks = those that
--   the expert computed, drops taken off; weight_sums, norms, squared_norms, weighted_norms,
--   squared_weighted_norms and contributions = sums over these picks of g, |f|, |f|^2, g |f|, g^2 |f|^2 and
--   <g f, y> / |y|^2; largest = the largest absolute entry of f.
-- Grain: one row per (shard, doc, stack, layer, is_special).
-- Reads: outputs, documents
-- Needs: outputs
-- Groups: documents
select
    outputs.*,
    documents.label
from outputs
inner join documents using (shard, doc)
