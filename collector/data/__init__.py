"""Finds documents, reads their files, and plans how they are cut into shards."""
