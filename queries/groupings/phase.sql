-- Question: Did the model read the token, or write it?
-- Formula: prompt: it was given; generated: the model wrote it, with --generate.
-- Groups: tokens
-- Reads: phases
-- Needs: documents.prompt_tokens
select
    shard,
    tok,
    phase as label
from phases
