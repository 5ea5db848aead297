"""One copy of the model: runs the documents of a shard through it and writes the shard's tables."""
